"""alto_jax: adaptive-length mask tokens for segmentation with multimodal LLMs, in JAX.

`alto_jax.load(directory)` opens a checkpoint for prediction. Importing the package imports neither
JAX nor Flax: those come in with the first call.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alto_jax.inference.tokenizer import TokenizerModel

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def load(directory: str | os.PathLike, **kwargs: Any) -> "TokenizerModel":
    """Opens a checkpoint for prediction; see `alto_jax.inference.segmenter.load`."""
    from alto_jax.inference import segmenter  # late: keeps the start fast

    return segmenter.load(directory, **kwargs)
