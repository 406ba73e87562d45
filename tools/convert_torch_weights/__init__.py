"""Weights between the PyTorch reference's checkpoints and alto_jax, in both directions."""
