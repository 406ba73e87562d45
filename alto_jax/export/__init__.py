"""Checkpoint → programs that run without this package: `python -m alto_jax.export`, docs/export.md."""
