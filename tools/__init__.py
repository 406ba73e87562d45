"""Command-line tools around alto_jax."""
