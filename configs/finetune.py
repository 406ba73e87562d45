"""Your own masks: low-rank adapters on a finished model, evaluated before and after on pictures held out.

    python -m alto_jax.main --config=configs/finetune.py --config.data.meta=FILE --workdir=runs/finetuned

FILE is the meta.json that `python -m alto_jax.data.convert` writes. Sizes: small (alto-tiny, on a CPU or any GPU;
a name that it was never taught from gIoU 0.183 to 0.509 in 319 processor seconds, docs/finetune.md), 2b, 8b (a
converted checkpoint, --config.init_from=DIR, on one GPU; not yet run), debug.
"""

from configs import common, stage2

SIZES = ("small", "2b", "8b", "debug")


def get_config(size=None):
    """The configuration for one of SIZES."""
    size = common.check_size(size, SIZES, "finetune.py")
    config = stage2.get_config(size)
    config.data.update({"source": "jsonl", "meta": "runs/mine/meta.json", "validation_fraction": 0.1})
    config.eval.update({"at_start": True, "every": 50, "num_samples": 256})
    config.train.update({"patience": 3, "keep_best": 1, "keep_checkpoints": 1, "best_metric": "eval/giou",
                         "best_mode": "max", "checkpoint_every": 50})  # fmt: skip
    config.lora = {"rank": 16, "alpha": 32.0}
    # Note: adapters are small, and begin with nothing: a higher rate than for the whole model, and no decay.
    config.optim.update({"lr": 2e-4, "warmup_steps": 20, "weight_decay": 0.0})
    if size in ("small", "debug"):
        config.init_from = "alto-tiny"
        # What alto-tiny knows are built-in scenes; without some among the user's own it forgets them.
        config.data.replay = 0.33
        config.train.update({"steps": 100, "batch_size": 16, "log_every": 20, "checkpoint_every": 50})
        config.optim.update({"lr": 3e-3, "warmup_steps": 10})
        config.eval.update({"every": 50, "num_samples": 64, "batch_size": 32})
    else:
        config.train.update({"steps": 1000, "batch_size": 16, "accumulate": 16, "log_every": 10})
        config.eval.update({"batch_size": 8})
        config.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    if size == "debug":
        config.train.update({"steps": 4, "batch_size": 2, "log_every": 1, "checkpoint_every": 2})
        config.eval.update({"every": 2, "num_samples": 4, "batch_size": 4})
        config.sft.mask_loss_weight = 0.0
    return config
