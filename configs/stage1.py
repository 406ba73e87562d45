"""Stage 1: the mask tokenizer (encoder, quantizer, decoder) on a random number of leading tokens.

    python -m alto_jax.main --config=configs/stage1.py:tiny --workdir=runs/stage1

Sizes: base (the paper's, from a converted TiTok + SAM start; not yet run), tiny (a laptop; measured as part
of configs/quickstart.py, see there), small (a GPU), debug (seconds). Each also as SIZE_no_pixels (base_no_pixels, …;
not yet run): the same without the image encoder, for the paper's Table 7. On SA-1B: --config.data.source=sa1b
--config.data.root=DIR.
"""

from configs import common

NO_PIXELS = "_no_pixels"
SIZES = ("base", "tiny", "small", "debug", *(size + NO_PIXELS for size in ("base", "tiny", "small", "debug")))
TRAINED = "^tokenizer/(encoder|quantizer|decoder)/"


def get_config(size=None):
    """The configuration for one of SIZES."""
    size = common.check_size(size, SIZES, "stage1.py")
    if size.endswith(NO_PIXELS):
        config = get_config(size.removesuffix(NO_PIXELS))
        config.model.tokenizer.sam = None
        config.tokenizer.withhold_image = 0.0  # there is nothing to withhold
        return config
    if size == "base":
        config = common.base_config("stage1", common.large_model_types({"tokenizer": common.tokenizer()}))
        config.data.num_workers = -1
        # Note: as the reference, which took two days on 8 GPUs; docs/hyperparameters.md has all values side by side.
        config.optim = {"lr": 1e-5, "schedule": "reference", "warmup_steps": 1000, "final_ratio": 0.5, "b1": 0.99,
                        "weight_decay": 0.1, "trainable": TRAINED}  # fmt: skip
        config.train = {"steps": 300_000, "batch_size": 8, "log_every": 50, "checkpoint_every": 5000}
        config.eval = {"every": 5000, "num_samples": 1000, "batch_size": 8, "token_counts": [8, 16, 24, 32]}
        config.tokenizer = {"keep_tokens": "random", "commitment_cost": 0.01, "length_loss_reaches_encoder": False,
                            "loss": {"edge_weighted_mse": 1.0, "edge": 0.2, "length": 0.01}}  # fmt: skip
        return config
    config = common.base_config("stage1", {"tokenizer": common.tokenizer(size)})
    # From scratch everything trains but the length predictor, which has its own stage.
    config.optim = {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 100, "b2": 0.98, "weight_decay": 0.05,
                    "trainable": "^tokenizer/(?!length/)"}  # fmt: skip
    # Masks from one plain object to eight, a number that is uniform where the scene has as many.
    config.data.scenes.update({"num_scenes": 400_000, "max_objects": 10, "min_size": 0.12, "max_size": 0.6})
    config.data.scene_masks = {"max_union": 8, "union_probability": None}
    config.train = {"steps": 9000, "batch_size": 16, "log_every": 100, "checkpoint_every": 500}
    config.eval = {"every": 0, "num_samples": 256, "batch_size": 64, "token_counts": [1, 2, 4, 8, 16, 32]}
    config.tokenizer = {
        "keep_tokens": "random",
        "commitment_cost": 0.25,
        "loss": {"edge_weighted_mse": 0.0, "edge": 0.0, "bce": 1.0, "dice": 1.0, "length": 0.0},
        "unquantized_steps": 400,
        "reseed_every": 50,
        "reseed_until": 8000,
        "reseed_threshold": 0.1,
        "length_loss_reaches_encoder": False,
        "withhold_image": 0.5,
    }
    if size == "small":
        config.train.update({"steps": 6000, "batch_size": 128, "log_every": 200, "checkpoint_every": 1000})
        config.tokenizer.reseed_until = 5000
    return common.debug_run(config) if size == "debug" else config
