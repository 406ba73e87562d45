"""The quickstart: a tour of alto-tiny in five minutes, or all stages from nothing.

    python -m alto_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m alto_jax.main --config=configs/quickstart.py:train --workdir=runs/train

Hardware: two CPU cores. `:train` trains stages 0, 1, 1.5, 2 and 3 at `tiny` size on the built-in data (hours);
`:debug` does a few steps of them (a check of the installation, not a result).
"""

import ml_collections

from configs import common, stage0, stage1, stage1_5, stage2, stage3

STAGES = ("stage0", "stage1", "stage1_5", "stage2", "stage3")


def get_config(size=None):
    """{"stages": names in order, NAME: configuration of the stage, "num_predictions": N}; the tour's: see tour.py."""
    size = common.check_size(size, ("tour", "train", "debug"), "quickstart.py")
    if size == "tour":
        return tour()
    size = {"train": "tiny"}.get(size, size)
    modules = {"stage0": stage0, "stage1": stage1, "stage1_5": stage1_5, "stage2": stage2, "stage3": stage3}
    config = ml_collections.ConfigDict({name: modules[name].get_config(size) for name in STAGES})
    config.stages = STAGES
    config.num_predictions = 12
    return config


def tour():
    """Two short runs of stage 3 from alto-tiny, which differ in the length penalty alone."""
    config = ml_collections.ConfigDict({"checkpoint": "alto-tiny", "num_scenes": 40, "kinds": ("box", "boxes")})
    config.stages = ("low_penalty", "high_penalty")
    for name, weight in zip(config.stages, (1e-3, 1e-2)):
        stage = stage3.get_config("small")
        stage.train.update({"steps": 12, "batch_size": 4, "log_every": 4, "checkpoint_every": 12})
        stage.eval.num_samples = 0
        stage.grpo.reward.length_weight = weight
        config[name] = stage
    return config
