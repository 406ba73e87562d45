"""Checkpoints in use: what `alto_jax.load` gives, its calls, and their results."""
