"""Stage 0: a language model from nothing learns to see and name, in text; the loop and loss of stage 2.

    python -m alto_jax.main --config=configs/stage0.py:tiny --workdir=runs/stage0

The paper has no such stage: it begins with InternVL. Sizes: tiny (a laptop), small (a GPU; part of what made
alto-tiny), debug (seconds). Stage 2 then takes its mask tokenizer from another run:
    python -m alto_jax.main --config=configs/stage2.py:tiny --config.init_from=runs/stage0 \\
        --config.tokenizer_from=runs/stage1_5 --workdir=runs/stage2
"""

from configs import common, stage2

SIZES = common.DEMO_SIZES[::-1]


def get_config(size=None):
    """The configuration for one of SIZES."""
    size = common.check_size(size, SIZES, "stage0.py")
    config = stage2.get_config(size)
    config.stage = "stage0"
    config.data.max_length = {"tiny": 160, "small": 240, "debug": 320}[size]
    config.sft.mask_loss_weight = 0.0
    if size != "debug":
        config.optim.warmup_steps = 200
        # What has many words of answer for its question comes more often.
        kinds = ("map", "list", "list", "where", "where", "name", "place", "colour", "count", "exists")
        config.data.scene_lessons = {"kinds": kinds, "turns": 3, "map_fraction": 0.75}
        config.train.update({"steps": 2000, "log_every": 50, "checkpoint_every": 250})
    if size == "small":
        config.train.update({"steps": 6000, "log_every": 200, "checkpoint_every": 1000})
    return config
