"""Losses of all stages.

Pure functions of arrays; whatever dtype comes in, the arithmetic is float32. Dimension letters are those of
`alto_jax.batch`.
"""
