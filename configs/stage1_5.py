"""Stage 1.5: the token length predictor, through the straight-through chunking; all else is frozen.

    python -m alto_jax.main --config=configs/stage1_5.py:tiny --config.init_from=runs/stage1 --workdir=runs/stage1_5

Sizes: base (the paper's; not yet run), tiny (a laptop; measured as part of configs/quickstart.py), small (a
GPU), debug; each also as SIZE_no_pixels, after a stage 1 of that size.
"""

from configs import common, stage1

SIZES = stage1.SIZES


def get_config(size=None):
    """The configuration for one of SIZES."""
    size = common.check_size(size, SIZES, "stage1_5.py")
    config = stage1.get_config(size)
    config.stage = "stage1_5"
    size = size.removesuffix(stage1.NO_PIXELS)
    config.optim.trainable = "^tokenizer/length/"
    config.tokenizer.update({"keep_tokens": "adaptive", "unquantized_steps": 0, "reseed_every": 0, "reseed_until": 0})
    if size == "base":
        # Note: the paper's 3 hours at the speed of its stage 1, 300,000 steps in 2 days.
        config.train.update({"steps": 18_750, "checkpoint_every": 1000})
        config.eval.every = 1000
    else:
        config.optim.update({"lr": 3e-4, "weight_decay": 0.0})
        config.tokenizer.loss.length = 0.03
        # The lengths are for a de-tokenizer that has the image.
        config.tokenizer.withhold_image = 0.0
    if size in ("tiny", "small"):
        config.optim.lr = 1e-3
        config.train.update({"steps": 600, "checkpoint_every": 300})
    return config
