"""What an evaluation is asked: the options of the command, for Python callers too."""

from collections.abc import Sequence
import dataclasses
import math
import os
from typing import Any, Literal

from alto_jax.config import QUANTIZE, ConfigError, Quantize, local_path, require
from alto_jax.data.masks import AUTO, parse_rule
from alto_jax.data.reading import EXIF, Exif
from alto_jax.data.refcoco import PROTOCOLS
from alto_jax.storage.bucket import checked


def length_modes(length: str) -> tuple[str, ...]:
    """The modes that `length` names, in its order: "adaptive", "fixed", or a number of mask tokens.

    Raises:
      ConfigError: something else in it.
    """
    found: list[str] = []
    for name in (part.strip() for part in length.split(",")):
        if name not in ("adaptive", "fixed", "both") and not (name.isascii() and name.isdigit() and int(name) >= 1):
            raise ConfigError(f"--length: expected adaptive, fixed, both, or numbers of mask tokens, got {length!r}")
        found += ("adaptive", "fixed") if name == "both" else (str(int(name)) if name.isdigit() else name,)
    return tuple(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Options of one evaluation; `python -m alto_jax.evaluate --help` has the same.

    Attributes:
      checkpoint: a run's directory.
      benchmarks: names, see `--list`; "all" is every one whose files are there.
      out: the directory for results, tables and plots.
      data: the data folder, or a prepared data set.
      images: the COCO images, if they are not at a usual place in the data folder.
      protocol: sentences of a referent as one request, or each by itself.
      length: "adaptive", "fixed", "both" as two rows, or numbers of mask tokens, each a row; with commas between. A
        number asks as "fixed" does and ends the mask after so many tokens.
      batch_size: over all devices.
      limit: only the first samples; 0: all.
      max_tiles: of an image in POPE, VQAv2 and MME, see data/tiles.py; masks always have one.
      max_new_tokens: of an answer; 0: one mask and a sentence.
      grammar: allow only well-formed masks.
      forced_prefix: the answer's start is given, the mask's end ends it.
      end_bias: added to the logit of the mask's end; positive gives shorter masks, negative longer ones.
      min_pixels: fewer predicted pixels count as no mask; None: 0, or what the results were scored with (`rescore`).
      reference: the reference's scoring: nearest upsampling, ignored pixels as hits, malformed answers decoded from no
        codes.
      max_bad_fraction: unreadable samples left out at most.
      exif, mask_rule: how image and mask files are read, see data/reading.py and data/masks.py.
      scenes: samples of the built-in benchmark.
      paper_rows: JSON file {table: [{"row": name, benchmark: value}]} to add to the tables.
      title: name of our rows; default: the checkpoint's folder.
      step: which of the run's checkpoints; None: the newest that can be read.
      quantize: the language model's kernels in 8 bits, "int8" or "fp8"; "": as they are.
      rescore: compute everything again from the results in `out`, without a model.
      worst: samples of lowest IoU of each benchmark that are shown as pictures (0: none).
      timed_samples: samples of each benchmark that are also timed one at a time (0: none).
      fsdp, tensor: devices that share the parameters; heads and vocabulary.
      threads: that read samples.
    """

    checkpoint: str | os.PathLike
    benchmarks: Sequence[str]
    out: str | os.PathLike
    data: str | os.PathLike = "."
    images: str | os.PathLike | None = None
    protocol: Literal["joined", "per_sentence"] = "joined"
    length: str = "adaptive"
    batch_size: int = 8
    limit: int = 0
    max_tiles: int = 1
    max_new_tokens: int = 0
    grammar: bool = False
    forced_prefix: bool = False
    end_bias: float = 0.0
    min_pixels: int | None = None
    reference: bool = False
    max_bad_fraction: float = 0.001
    exif: Exif = "stored"
    mask_rule: str = AUTO
    scenes: int = 256
    paper_rows: str | os.PathLike | None = None
    title: str | None = None
    step: int | None = None
    quantize: Quantize = ""
    rescore: bool = False
    worst: int = 12
    timed_samples: int = 8
    fsdp: int = 1
    tensor: int = 1
    threads: int = 2

    def __post_init__(self) -> None:
        for name in ("step", "quantize"):
            value = getattr(self, name)
            require(not self.rescore or value in (None, ""), name, value, "nothing, with --rescore")
        for name in ("checkpoint", "out"):
            checked(getattr(self, name) or "", f"--{name}")
        for name in ("data", "images", "paper_rows"):
            local_path(getattr(self, name) or "", f"--{name.replace('_', '-')}")
        require(not isinstance(self.benchmarks, str), "benchmarks", self.benchmarks, "a list of names")
        for name in ("limit", "max_new_tokens", "min_pixels", "worst", "timed_samples"):
            require((getattr(self, name) or 0) >= 0, name, getattr(self, name), "at least 0")
        require(math.isfinite(self.end_bias), "end_bias", self.end_bias, "a finite number")
        for name, known in (("protocol", PROTOCOLS), ("exif", EXIF), ("quantize", QUANTIZE)):
            require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(known)}")
        length_modes(self.length)
        for name in ("max_tiles", "scenes", "fsdp", "tensor", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        parse_rule(self.mask_rule, "--mask-rule")
        require(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "0..1")

    def replace(self, **changes: Any) -> "EvaluateOptions":
        """The same options with some changes, by their names."""
        return dataclasses.replace(self, **changes)
