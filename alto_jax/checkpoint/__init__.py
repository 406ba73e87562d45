"""What a run saves, and opening it for use."""

from alto_jax.checkpoint import packed  # noqa: F401 - packed checkpoints open like runs
