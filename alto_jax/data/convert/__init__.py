"""Your own masks → the JSONL that stages 2 and 3 read: `python -m alto_jax.data.convert`, a module a format."""
