"""Stage 2: supervised fine-tuning of the MLLM on text and mask tokens.

    python -m alto_jax.main --config=configs/stage2.py:tiny --config.init_from=runs/stage1_5 --workdir=runs/stage2

Sizes: 8b (the paper's, from a converted InternVL2.5 + ALTo start; not yet run), 1b, 2b, 4b, 26b (the same
family; not yet run), tiny (a laptop; measured as part of configs/quickstart.py), small (a GPU), debug. On your
own files: --config.data.source=jsonl --config.data.meta=FILE.
"""

from configs import common

SIZES = ("8b", "1b", "2b", "4b", "26b", "tiny", "small", "debug")
# Hugging Face's grouping: no decay for biases and layer norms; RMSNorm, layer scales and embeddings do decay.
NO_DECAY = r"(/bias|^vision/.*norm\d/scale|^projector/norm/scale)$"


def get_config(size=None):
    """The configuration for one of SIZES."""
    size = common.check_size(size, SIZES, "stage2.py")
    model = common.mllm(size)
    if size not in common.DEMO_SIZES:
        config = common.base_config("stage2", common.large_model_types(model))
        config.data.num_workers = -1
        config.data.update({"source": "scenes", "max_length": 1024, "max_masks": 1, "system": common.SYSTEM})
        config.optim = {"lr": 4e-5, "schedule": "cosine", "warmup_steps": 300, "weight_decay": 0.05,
                        "no_decay": NO_DECAY, "trainable": "^(vision|projector|language_model)/",
                        "frozen_dtype": "bfloat16"}  # fmt: skip
        config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
        config.train = {"steps": 10_000, "batch_size": 64, "log_every": 10, "checkpoint_every": 500}
        config.eval = {"every": 0, "num_samples": 256, "batch_size": 32}
        config.sft = {"mask_loss_weight": 1.0}
        return config
    config = common.base_config("stage2", model)
    config.data.update({"max_length": 160, "max_masks": 1, "base_vocab_size": 768})
    # Forty names, in new scenes: the shapes are those of training in evaluation too, see alto_jax.evaluate.scenes.
    config.data.scenes.update({"num_scenes": 400_000, "max_objects": 4, "min_size": 0.25, "max_size": 0.6,
                               "shapes": "train", "vocabulary": 40})  # fmt: skip
    config.optim = {"lr": 1.5e-3, "schedule": "cosine", "warmup_steps": 100, "b2": 0.98, "weight_decay": 0.05,
                    "no_decay": NO_DECAY, "trainable": "^(vision|projector|language_model)/"}  # fmt: skip
    config.data.scene_chats = {"box_fraction": 0.4, "unnamed_fraction": 0.25}
    config.train = {"steps": 2000, "batch_size": 16, "log_every": 50, "checkpoint_every": 250}
    config.eval = {"every": 0, "num_samples": 256, "batch_size": 32, "max_new_tokens": 56}
    # Note: the mask loss of soft tokens lowered the gIoU of greedy answers at this size (0.17 against 0.27).
    config.sft = {"mask_loss_weight": 0.0}
    if size == "small":
        config.optim.update({"lr": 1e-3, "warmup_steps": 300})
        config.data.max_length = 176
        config.data.scene_chats.update({"adaptive_fraction": 0.8, "box_fraction": 0.5})
        config.train.update({"steps": 6000, "batch_size": 128, "log_every": 200, "checkpoint_every": 1000})
    if size == "debug":
        config = common.debug_run(config)
        config.data.update({"max_length": 160, "base_vocab_size": 400})
        config.sft.mask_loss_weight = 1.0
    return config
