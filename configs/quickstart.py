"""The quickstart: stages 1, 1.5, 2 and 3 in sequence at `tiny` size on the built-in data, then a report.

    python -m alto_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: two CPU cores. `:debug` does a few steps of everything (a check of the installation, not a result).
"""

import ml_collections

from configs import common, stage1, stage1_5, stage2, stage3

STAGES = ("stage1", "stage1_5", "stage2", "stage3")


def get_config(size=None):
    """{"stages": names in order, NAME: configuration of the stage, "num_predictions": N}."""
    size = common.check_size(size, ("tiny", "debug"), "quickstart.py")
    modules = {"stage1": stage1, "stage1_5": stage1_5, "stage2": stage2, "stage3": stage3}
    config = ml_collections.ConfigDict({name: modules[name].get_config(size) for name in STAGES})
    config.stages = STAGES
    config.num_predictions = 12
    return config
