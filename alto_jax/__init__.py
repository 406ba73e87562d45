"""alto_jax: adaptive-length mask tokens for segmentation with multimodal LLMs, in JAX.

`alto_jax.load(directory)` opens a checkpoint for prediction. Importing the package imports neither
JAX nor Flax: those come in with the first call.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alto_jax.config import Quantize
    from alto_jax.inference.tokenizer import TokenizerModel

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def load(directory: str | os.PathLike, step: int | None = None, quantize: "Quantize" = "") -> "TokenizerModel":
    """Opens a checkpoint: a `Segmenter` after stages 2 and 3, else a `TokenizerModel`.

    Args:
      directory: of a run or of a packed or converted checkpoint; or "alto-tiny", which comes with the package.
      step: of a run's checkpoints; None: the newest readable one.
      quantize: the language model's kernels in 8 bits, "int8" or "fp8" (docs/running.md); "": as they are.

    Raises:
      FileNotFoundError: no complete checkpoint there.
      ConfigError: no such step, another `quantize`, or no language model for it.
      ValueError: the checkpoint lacks parameters of its own model.
    """
    from alto_jax.inference import segmenter  # late: keeps the start fast

    return segmenter.load(directory, step, quantize)
