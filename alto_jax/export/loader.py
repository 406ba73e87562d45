"""Runs an exported ALTo model. Needs JAX and NumPy, and `flatbuffers`, with which JAX reads its own format.

    import alto_loader  # this file, which lies beside manifest.json

    model = alto_loader.load("DIR")
    codes = model.encode(mask)                          # mask: bool[H, W]
    mask = model.decode(codes, (height, width), image)  # image: uint8[H, W, 3]
    answer = model.segment(image, model.prompt("the red apple"))
    answer.mask, answer.codes, answer.length

`prompt` needs the package `tokenizers`; `segment` takes any list of token ids. `model.call(name, ...)` runs a program
on whole batches of arrays, as manifest.json lists them. The file stands alone and may be copied.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import numbers
import os
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np

FORMAT = 1
MANIFEST, WEIGHTS, TEXT = "manifest.json", "weights.safetensors", "tokenizer.json"
# Names of the safetensors format.
DTYPES: dict[str, Any] = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8, "I32": np.int32, "BOOL": np.bool_,
}  # fmt: skip
_MAX_SIDE = 1 << 14  # of a mask that codes are decoded to


class ExportError(ValueError):
    """An export, or an argument, that cannot be used; the message names the file or the value."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer with its mask.

    Attributes:
      mask: bool[H, W] at the image's size, all False if the answer holds no mask.
      probability: float32[H, W].
      codes: of the first mask; length: their number, 0 without a mask; num_masks: how many the answer holds.
      token_ids: what was generated, after the prompt.
      logps: log-probability of each.
    """

    mask: np.ndarray
    probability: np.ndarray
    codes: list[int]
    length: int
    num_masks: int
    token_ids: list[int]
    logps: list[float]


def load(directory: str | os.PathLike) -> "Exported":
    """Opens an export; programs and weights are read when they are first used.

    Args:
      directory: with manifest.json.

    Raises:
      ExportError: there is none, or one of another format.
    """
    return Exported(pathlib.Path(directory))


class Exported:
    """Programs with their weights; manifest: what manifest.json says."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        file = directory / MANIFEST
        try:
            self.manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            found = self.manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{file}: cannot be read as an export's manifest: {error!r}") from error
        if found != FORMAT:
            raise ExportError(f"{file}: format {found!r}; this loader reads {FORMAT}")
        self._programs: dict[str, Any] = {}
        self._weights: dict[str, jax.Array] = {}
        self._text: Any = None

    def call(self, name: str, *inputs: Any) -> dict[str, np.ndarray]:
        """Runs a program on a batch.

        Args:
          name: of the program.
          inputs: arrays of the shapes and types in the manifest, such as float32[b, 64, 64]; b, the number of rows, is
            any, but alike for all.

        Raises:
          ExportError: no such program, inputs that do not fit, or a file that is damaged.
        """
        about = self.manifest["programs"].get(name)
        if about is None:
            raise ExportError(f"{self.directory}: no program {name!r}; it has {', '.join(self.manifest['programs'])}")
        given = [np.asarray(array) for array in inputs]
        self._check(name, about["inputs"], given)
        if name not in self._programs:
            self._programs[name] = jax.jit(self._read_program(about).call)
        weights = self._read_weights(about["weights"])
        results = jax.device_get(self._programs[name](weights, *given))
        return {output["name"]: value for output, value in zip(about["outputs"], results, strict=True)}

    def encode(self, mask: np.ndarray, length: str | int = "adaptive") -> list[int]:
        """Codes of a mask.

        Args:
          mask: bool[H, W], or non-negative integers that are not zero in the mask; any size.
          length: "adaptive" (as many as are needed), "full", or a number.

        Raises:
          ExportError: an empty mask, numbers of another type, or a length out of range.
        """
        mask = np.asarray(mask)
        if mask.dtype.kind not in "bui" or mask.min(initial=0) < 0:
            raise ExportError(f"mask: expected bool or integers of at least 0, got {mask.dtype}")
        if mask.ndim != 2 or not mask.any():
            raise ExportError(f"mask: expected an array [H, W] that is not empty, got shape {mask.shape}")
        count = self._count(length)
        small = soft_mask((mask > 0).astype(np.uint8) * 255, self.manifest["model"]["mask_size"])
        found = self.call("encode", small[None])
        return found["codes"][0, : int(found["length"][0]) if count is None else count].tolist()

    def decode(self, codes: Sequence[int], size: tuple[int, int], image: np.ndarray | None = None) -> np.ndarray:
        """The mask bool[H, W] that codes stand for.

        Args:
          codes: 1..L of them.
          size: (height, width) of the result.
          image: uint8[H, W, 3], whose features sharpen the mask; None: none.

        Raises:
          ExportError: too many or too few codes, one out of range, or no such size or image.
        """
        model = self.manifest["model"]
        most, values = model["num_latent_tokens"], model["codebook_size"]
        if not _are_whole(codes, 0, values - 1) or not 1 <= len(codes) <= most:
            raise ExportError(f"codes: expected 1..{most} codes in 0..{values - 1}, got {codes!r:.80}")
        if not _are_whole(size, 1, _MAX_SIDE) or len(size) != 2:
            raise ExportError(f"size: expected (height, width) in 1..{_MAX_SIDE}, got {size!r:.80}")
        padded = np.zeros((1, most), np.int32)
        padded[0, : len(codes)] = codes
        inputs = [padded, np.array([len(codes)], np.int32)]
        if image is None or not model["has_image_features"]:
            found = self.call("decode", *inputs)
        else:
            pixels = squash(_checked(image), model["image_size"])
            found = self.call("decode_with_image", *inputs, pixels[None])
        return resize_probability(found["probability"][0], *size) > 0.5

    def prompt(self, phrase: str, *, full: bool = False) -> list[int]:
        """Token ids of a request.

        Args:
          phrase: the object ("the red apple"), or boxes as the model reads them, `<box>[[x1,y1,x2,y2]]</box>` in
            thousandths of the image's sides.
          full: asks for all mask tokens, not as many as are needed.

        Raises:
          ExportError: no object named, a special token in the phrase, or `tokenizers` is not installed.
        """
        if not isinstance(phrase, str) or not any(c.isalnum() for c in phrase):
            raise ExportError(f"phrase: expected the name or description of an object, got {phrase!r:.80}")
        about, text = self._prompt(), self._tokenizer()
        encode = lambda words: text.encode(words, add_special_tokens=False).ids
        if wrong := [i for i in encode(phrase) if i in set(about["reserved_ids"])]:
            raise ExportError(f"phrase: the special token {text.decode(wrong[:1], skip_special_tokens=False)!r} in it")
        marked = phrase if "<ref>" in phrase or "<box>" in phrase else f"<ref>{phrase}</ref>"
        turns = about["full" if full else "adaptive"]
        return about["begin"] + [i for turn in turns for i in encode(turn.replace("{}", marked))]

    def segment(
        self,
        image: np.ndarray,
        prompt_ids: Sequence[int],
        *,
        length: str | int = "adaptive",
        min_length: int = 1,
        max_length: int | None = None,
        end_bias: float = 0.0,
    ) -> Answer:
        """Answers a request about an image.

        Args:
          image: uint8[H, W, 3] RGB.
          prompt_ids: of the request, see `prompt`; not longer than the program's prompts.
          length: "adaptive" or "full", as the request was worded, or an exact number of mask tokens.
          min_length, max_length: limits of an adaptive number (None: all).
          end_bias: added to the logit of the mask's end; positive gives shorter masks.

        Raises:
          ExportError: an image or a number that does not fit, or a prompt that is too long.
        """
        model, image = self.manifest["model"], _checked(image)
        longest = self._prompt()["max_tokens"]
        if not _are_whole(prompt_ids, 0, np.iinfo(np.int32).max):
            raise ExportError(f"prompt_ids: expected token ids, such as those of `prompt`, got {prompt_ids!r:.80}")
        ids = [int(i) for i in prompt_ids]
        if not 0 < len(ids) <= longest:
            raise ExportError(f"prompt_ids: expected 1..{longest} ids, as exported (--prompt_tokens), got {len(ids)}")
        count, most = self._count(length), model["num_latent_tokens"]
        low, high = (min_length, most if max_length is None else max_length) if count is None else (count, count)
        if not _are_whole([low, high], 1, most) or low > high:
            raise ExportError(f"min_length, max_length: expected 1 <= min <= max <= {most}, got {low!r}, {high!r}")
        if not isinstance(end_bias, numbers.Real) or not math.isfinite(end_bias):
            raise ExportError(f"end_bias: expected a finite number, got {end_bias!r}")
        row = np.full((1, longest), self._prompt()["pad"], np.int32)
        row[0, longest - len(ids) :] = ids
        there = np.arange(longest)[None] >= longest - len(ids)
        sizes = model["vision_size"], model["image_size"]
        seen = [squash(image, size)[None] for size in sizes]
        limits = np.array([low], np.int32), np.array([high], np.int32), np.array([end_bias], np.float32)
        found = {name: value[0] for name, value in self.call("segment", *seen, row, there, *limits).items()}
        count, pixels = int(found["length"]), resize_probability(found["probability"], *image.shape[:2])
        return Answer(
            mask=(pixels > 0.5) & bool(count),
            probability=pixels,
            codes=found["codes"][:count].tolist(),
            length=count,
            num_masks=int(found["num_masks"]),
            token_ids=found["token_ids"][found["token_mask"]].tolist(),
            logps=found["token_logps"][found["token_mask"]].tolist(),
        )

    def _count(self, length: Any) -> int | None:
        """Number of mask tokens of "full" or an integer; None for "adaptive"."""
        most = self.manifest["model"]["num_latent_tokens"]
        if isinstance(length, str) and length in ("adaptive", "full"):
            return None if length == "adaptive" else most
        if _are_whole([length], 1, most):
            return int(length)
        raise ExportError(f"length: expected 'adaptive', 'full' or a whole number in 1..{most}, got {length!r}")

    def _check(self, name: str, inputs: Sequence[Mapping[str, Any]], given: Sequence[np.ndarray]) -> None:
        if len(inputs) != len(given):
            raise ExportError(f"{name}: expected {', '.join(one['name'] for one in inputs)}, got {len(given)} arrays")
        rows = given[0].shape[:1]
        for one, array in zip(inputs, given):
            shape = [*rows, *one["shape"][1:]]
            if list(array.shape) != shape or array.dtype != one["dtype"] or not rows or rows[0] < 1:
                wanted = f"{one['dtype']}{one['shape']}".replace("'", "")
                raise ExportError(f"{name}: {one['name']}: expected {wanted}, got {array.dtype}{list(array.shape)}")

    def _read_program(self, about: Mapping[str, Any]) -> Any:
        """jax.export's program of a file."""
        from jax import export  # late: not all of JAX's users need it

        file = self.directory / about["file"]
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ExportError(f"{file}: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise ExportError(f"{file}: damaged: it is not the file that was exported (SHA-256)")
        program = export.deserialize(bytearray(content))
        platform = jax.devices()[0].platform  # Note: "gpu" for those of every maker.
        if not {"gpu": {"cuda", "rocm"}}.get(platform, {platform}) & {*program.platforms}:
            raise ExportError(f"{file}: exported for {', '.join(program.platforms)}, but this machine has {platform}")
        return program

    def _read_weights(self, names: Sequence[str]) -> dict[str, jax.Array]:
        """Weights by name, on the first device; read once."""
        missing = [name for name in names if name not in self._weights]
        if missing:
            stored = read_safetensors(self.directory / WEIGHTS)
            if lost := [name for name in missing if name not in stored]:
                raise ExportError(f"{self.directory / WEIGHTS}: lacks {lost[0]}")
            self._weights |= {name: jax.device_put(stored[name]) for name in missing}
        return {name: self._weights[name] for name in names}

    def _prompt(self) -> dict[str, Any]:
        """What the manifest says of prompts."""
        if "prompt" not in self.manifest:
            raise ExportError(f"{self.directory}: a mask tokenizer alone; there is no language model to ask")
        return self.manifest["prompt"]

    def _tokenizer(self) -> Any:
        if self._text is None:
            try:
                from tokenizers import Tokenizer  # late: token ids do without
            except ImportError as error:
                raise ExportError("prompt: needs `pip install tokenizers`; or give token ids") from error
            file = self.directory / TEXT
            try:
                self._text = Tokenizer.from_file(str(file))
            except Exception as error:  # Note: the package raises no kind of its own.
                raise ExportError(f"{file}: cannot be read: {error}") from error
        return self._text


def read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped into memory.

    Raises:
      ExportError: it is cut short, or no such file.
    """
    try:
        content = np.memmap(file, np.uint8, "r")
        begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:begin].tobytes())
        entries = {name: about for name, about in header.items() if name != "__metadata__"}
        if begin + max((about["data_offsets"][1] for about in entries.values()), default=0) != len(content):
            raise ValueError("its size is not what its header says")
        at = lambda about: content[begin + about["data_offsets"][0] : begin + about["data_offsets"][1]]
        return {name: at(about).view(DTYPES[about["dtype"]]).reshape(about["shape"]) for name, about in entries.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{file}: cannot be read: {error}") from error


def _are_whole(values: Any, low: int, high: int) -> bool:
    """Whether `values` is a list (or tuple, or array) of integers of any type in low..high."""
    if hasattr(values, "__array__"):
        values = np.asarray(values)
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray) or getattr(values, "ndim", 1) != 1:
        return False
    whole = [isinstance(value, numbers.Integral) and not isinstance(value, bool) for value in values]
    return all(whole) and all(low <= int(value) <= high for value in values)


def _checked(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < 8:
        raise ExportError(f"image: expected uint8[H, W, 3] of 8 pixels a side or more, got {image.dtype}{image.shape}")
    return image


def squash(image: np.ndarray, side: int) -> np.ndarray:
    """uint8[H, W(, 3)] → uint8[side, side(, 3)], as Pillow's antialiased bicubic resize, bit for bit."""
    for axis in (1, 0):
        if image.shape[axis] != side:
            index, weights = _taps(image.shape[axis], side, cubic=True)
            whole = np.trunc(weights * (1 << 22) + np.copysign(0.5, weights)).astype(np.int64)
            summed = _along(image.astype(np.int64), axis, index, whole) + (1 << 21)
            image = np.clip(summed >> 22, 0, 255).astype(np.uint8)
    return image


def soft_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """uint8[H, W] in 0..255 → float32[side, side] in 0..1; of an object too small for that, the pixels it touches."""
    small = squash(mask, side)
    if mask.any() and small.max() <= 127:
        down, across = (np.arange(side) * size // side for size in mask.shape)
        touched = np.maximum.reduceat(np.maximum.reduceat(mask, down, axis=0), across, axis=1)
        small = np.where(touched > touched.max() // 2, np.uint8(255), np.uint8(0))
    return small.astype(np.float32) / np.float32(255)


def resize_probability(probability: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32[h, w] → float32[height, width], as Pillow's bilinear resize."""
    values = np.asarray(probability, np.float32)
    for axis, side in ((1, width), (0, height)):
        if values.shape[axis] != side:
            index, weights = _taps(values.shape[axis], side, cubic=False)
            values = _along(values.astype(np.float64), axis, index, weights).astype(np.float32)
    return values


def _taps(source: int, target: int, cubic: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions int[target, K] and weights float64[target, K], as Pillow's `precompute_coeffs` has them."""
    scale = source / target
    wide = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * wide
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), source)
    index = first[:, None] + np.arange(math.ceil(support) * 2 + 1)
    x = np.abs((index - centre[:, None] + 0.5) * (1.0 / wide))
    if cubic:  # Keys' kernel with a = -0.5
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    else:
        weights = np.where(x < 1, 1.0 - x, 0.0)
    weights = np.where(index < last[:, None], weights, 0.0)
    total = np.zeros(target)
    for k in range(weights.shape[1]):  # Note: in Pillow's order, for the same bits.
        total += weights[:, k]
    return np.minimum(index, source - 1), weights / total[:, None]


def _along(values: np.ndarray, axis: int, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of taps along one axis."""
    shape = [1] * values.ndim
    shape[axis] = len(index)
    total = 0
    for k in range(index.shape[1]):
        total = total + values.take(index[:, k], axis=axis) * weights[:, k].reshape(shape)
    return np.asarray(total)
