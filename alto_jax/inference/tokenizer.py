"""The mask tokenizer of a checkpoint: mask → codes → mask."""

from collections.abc import Callable, Sequence
import numbers
import threading
from typing import Any

import jax
import numpy as np

from alto_jax import layers, metrics
from alto_jax.data import images, transforms
from alto_jax.tokenizer.alto import ALTo

_MAX_SIDE = 1 << 14  # of a mask that codes are decoded to


class TokenizerModel:
    """A mask tokenizer from a checkpoint: `encode` and `decode`.

    Attributes:
      identity: of the checkpoint; changes when that is saved anew.
    """

    identity = ""

    def __init__(self, cfg: Any, params: dict, directory: str):
        self.cfg, self.params, self.directory = cfg, params, directory
        self._functions: dict = {}
        self._lock = threading.Lock()

    def compiled(self, name: Any, make: Callable[[], Callable], donated: str | None = None) -> Any:
        """The function `make()`, compiled once a shape; the first of each name is kept. `donated`: the argument whose
        memory the result takes over."""
        with self._lock:
            if name not in self._functions:
                self._functions[name] = jax.jit(make(), donate_argnames=donated)
            return self._functions[name]

    def method(self, name: str) -> Any:
        """The tokenizer's method `name` as a function of (parameters, *arguments), compiled once per shape."""
        model, precision = ALTo(self.cfg.tokenizer), self.cfg.matmul_precision

        def run(params: dict, *args: Any) -> Any:
            with layers.told_precision(precision):
                return model.apply({"params": params}, *args, method=name)

        return self.compiled(name, lambda: run)

    def encode(self, mask: np.ndarray, length: str | int = "adaptive") -> list[int]:
        """Codes of a mask.

        Args:
          mask: bool[H, W], or non-negative integers that are not zero in the mask; any size.
          length: "adaptive" (the predictor's), "full", or a number of leading codes.

        Raises:
          ValueError: no such mask, an empty one, or a length out of range.
        """
        return self.encode_batch([self.small_mask(mask)], length)[0]

    def small_mask(self, mask: np.ndarray) -> np.ndarray:
        """A mask as for `encode` at the model's size, float32[m, m]; ValueError as there."""
        mask = as_mask(mask, "mask")
        if not mask.any():
            raise ValueError("mask: it is empty, there is nothing to encode")
        return transforms.soft_mask(mask.astype(np.uint8) * 255, self.cfg.tokenizer.mask_size)

    def encode_batch(self, small: Sequence[np.ndarray], length: str | int, rows: int = 1) -> list[list[int]]:
        """Codes of masks of `small_mask`, `rows` at most; fewer are filled up, so that one program serves."""
        count = token_count(length, self.cfg.tokenizer.num_latent_tokens)
        codes, predicted = self.method("tokenize")(self.params["tokenizer"], _filled(small, rows))
        lengths = np.asarray(predicted).tolist() if count is None else [count] * len(small)
        return [row[:k].tolist() for row, k in zip(np.asarray(codes)[: len(small)], lengths)]

    def decode(self, codes: list[int], size: tuple[int, int], image: Any = None) -> np.ndarray:
        """The mask bool[H, W] of `size` that codes stand for.

        Args:
          codes: 1..L codes.
          size: (height, width) of the result.
          image: uint8[H, W, 3], a file or a Pillow image (these two are turned upright); its features sharpen the
            mask; None: none.

        Raises:
          ValueError: too many or too few codes, or one out of range.
        """
        self.check_codes(codes, size)
        seen = None if image is None else [self.small_image(images.as_array(image))]
        return self.decode_batch([codes], [size], seen)[0]

    def check_codes(self, codes: Any, size: Any) -> None:
        """Raises ValueError as `decode`."""
        tokenizer = self.cfg.tokenizer
        if not isinstance(codes, Sequence | np.ndarray) or isinstance(codes, str):
            raise ValueError(f"codes: expected a list, got {codes!r:.60}")
        if not 1 <= len(codes) <= tokenizer.num_latent_tokens:
            raise ValueError(f"codes: expected 1..{tokenizer.num_latent_tokens} codes, got {len(codes)}")
        bad = [c for c in codes if not is_whole(c, 0, tokenizer.codebook_size - 1)]
        if bad:
            raise ValueError(f"codes: expected values in 0..{tokenizer.codebook_size - 1}, got {bad[0]!r}")
        if (
            not isinstance(size, Sequence | np.ndarray)
            or len(size) != 2
            or not all(is_whole(side, 1, _MAX_SIDE) for side in size)
        ):
            raise ValueError(f"size: expected height and width in 1..{_MAX_SIDE}, got {size!r}")

    def small_image(self, image: np.ndarray) -> np.ndarray:
        """An image uint8[H, W, 3] at the size of `decode_batch`."""
        return transforms.squash(image, self.cfg.tokenizer.image_size)

    def decode_batch(
        self,
        codes: Sequence[Sequence[int]],
        sizes: Sequence[tuple[int, int]],
        pictures: Sequence[np.ndarray] | None = None,
        rows: int = 1,
    ) -> list[np.ndarray]:
        """Masks bool[H, W] of codes, `rows` at most; fewer are filled up, so that one program serves.

        Args:
          codes, sizes: of each, as for `decode`. pictures: of each, of `small_image`; None: without.
        """
        tokenizer, params, features = self.cfg.tokenizer, self.params["tokenizer"], None
        if pictures is not None and tokenizer.sam is not None:
            features = self.method("image_features")(params, _filled(pictures, rows))
        padded, length = np.zeros((rows, tokenizer.num_latent_tokens), np.int32), np.ones(rows, np.int32)
        for row, own in enumerate(codes):
            padded[row, : len(own)], length[row] = own, len(own)
        logits = self.method("decode_codes")(params, padded, length, features)
        small = np.asarray(jax.nn.sigmoid(logits))
        return [metrics.resize_probability(one, *size) > 0.5 for one, size in zip(small, sizes)]

    def drawn(self, masks: Sequence[Sequence[int]], features: Any = None) -> np.ndarray:
        """Probabilities of masks, each of 1..L codes, float32[len(masks), h, w]; features: [g, g, F] of their image."""
        most, found = self.cfg.tokenizer.num_latent_tokens, []
        for start in range(0, len(masks), most):
            part = masks[start : start + most]
            rows = next(rows for rows in self.rows_at_once() if rows >= len(part))
            codes, length = np.zeros((rows, most), np.int32), np.ones(rows, np.int32)
            for row, mask in enumerate(part):
                codes[row, : len(mask)], length[row] = mask, len(mask)
            each = None if features is None else np.repeat(np.asarray(features)[None], rows, axis=0)
            logits = self.method("decode_codes")(self.params["tokenizer"], codes, length, each)
            found.append(np.asarray(jax.nn.sigmoid(logits))[: len(part)])
        return np.concatenate(found)

    def rows_at_once(self) -> list[int]:
        """The numbers of masks, 1, 8, 16, … L, that `drawn` computes at once; a program is compiled for each."""
        most = self.cfg.tokenizer.num_latent_tokens
        return sorted({1, *(8 << step for step in range(most.bit_length()) if 8 << step < most), most})


def _filled(arrays: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """Arrays as one of `rows` rows, the last of them repeated."""
    return np.stack([*arrays, *[arrays[-1]] * (rows - len(arrays))])


def as_mask(mask: Any, name: str) -> np.ndarray:
    """A mask of a caller as bool[H, W].

    Args:
      mask: bool[H, W], or non-negative integers that are not zero in the mask.
      name: of the argument, for messages.

    Raises:
      ValueError: something else, such as probabilities, of which nearly all are above zero.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"{name}: expected an array [H, W], got shape {mask.shape}")
    if mask.dtype.kind not in "bui":
        raise ValueError(f"{name}: expected bool or integers, got {mask.dtype}; of probabilities give {name} > 0.5")
    if mask.min(initial=0) < 0:
        raise ValueError(f"{name}: expected values of at least 0, got {mask.min()}")
    return mask > 0


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer of any type (NumPy's too, but no bool) in low..high."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high


def token_count(length: Any, num_tokens: int) -> int | None:
    """Number of mask tokens of "full" or an integer of any type; None for "adaptive"."""
    if isinstance(length, str) and length in ("adaptive", "full"):
        return None if length == "adaptive" else num_tokens
    if is_whole(length, 1, num_tokens):
        return int(length)
    raise ValueError(f"length: expected 'adaptive', 'full' or a whole number in 1..{num_tokens}, got {length!r}")
