"""Stage 3: GRPO with the reward of format, IoU and length.

    python -m alto_jax.main --config=configs/stage3.py:tiny --config.init_from=runs/stage2 --workdir=runs/stage3

Sizes: 8b (the paper's: G 12, temperature 1, top-k 10, beta 1e-3, lambda 1e-3; not yet run), 1b, 2b, 4b, 26b
(not yet run), tiny (a laptop; measured as part of configs/quickstart.py), small (a GPU), debug.
"""

from configs import common, stage2

SIZES = stage2.SIZES


def get_config(size=None):
    """The configuration for one of SIZES."""
    size = common.check_size(size, SIZES, "stage3.py")
    config = stage2.get_config(size)
    config.stage = "stage3"
    del config.sft
    config.optim.update({"schedule": "constant", "lr": 1e-6, "trainable": "^language_model/"})
    config.grpo = {
        "num_generations": 12,
        "updates_per_rollout": 1,
        "advantage_normalization": "paper",
        "generate": {"max_new_tokens": 64, "temperature": 1.0, "top_k": 10},
        "reward": {"kind": "paper", "format_weight": 1.0, "iou_weight": 1.0, "length_weight": 1e-3},
        "loss": {"objective": "paper", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 1e-3},
    }
    if size not in common.DEMO_SIZES:
        config.data.max_length = 512
        # Note: the paper's "few hundred" steps.
        config.train.update({"steps": 300, "log_every": 1, "checkpoint_every": 50})
        return config
    config.optim.update({"schedule": "cosine", "lr": 2e-4, "warmup_steps": 5})
    config.train.update({"steps": 100, "batch_size": 4, "log_every": 4, "checkpoint_every": 50})
    config.grpo.generate.max_new_tokens = 56
    config.grpo.reward.length_weight = 2e-3
    if size == "debug":
        config = common.debug_run(config)
        config.grpo.num_generations = 4
        config.grpo.generate.max_new_tokens = 16
    return config
