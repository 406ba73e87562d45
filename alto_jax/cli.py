"""What the commands share: one clear line for bad input instead of a stack trace, and a progress line."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import gc
import logging
import os
import sys
import time
import traceback
from typing import TextIO

from alto_jax.config import QUANTIZE, ConfigError, keep_programs, local_path
from alto_jax.parallel import devices, distributed

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from what was saved.


class Stopped(Exception):
    """The run was asked to stop; the message says where it goes on. The command exits with EXIT_RESUMABLE."""


def run(main: Callable[[], int | None]) -> None:
    """Runs a command; bad input ends it with one line on stderr and exit code 2 instead of a stack trace.

    ALTO_TRACEBACK=1 in the environment shows the stack trace as well. A run that was asked to stop, or that lost one of
    its processes, ends with exit code 75: the same command goes on from what was saved. One of several processes ends
    at once, whatever it ends with, and the others then learn that it is gone.
    """
    keep_programs()
    # Note: tracing makes many objects that stay; looking through them again and again takes a tenth of a start.
    gc.set_threshold(10_000, 10, 10)
    # Note: Orbax reports every file that a checkpoint of another kind would have.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        devices.claim_gpu_memory()
        sys.exit(main() or 0)
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(EXIT_RESUMABLE)
    except distributed.ProcessLost as error:
        tell(f"error: {error}")
        distributed.leave(EXIT_RESUMABLE)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        if os.environ.get("ALTO_TRACEBACK"):
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        tell(f"error: {message}")
        distributed.leave(2)
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on from the last checkpoint")
        sys.exit(130)
    except Exception:
        if not distributed.is_joined():
            raise
        traceback.print_exc()
        distributed.leave(1)


def tell(line: str) -> None:
    """One line on stderr. In one write: `print` writes the end of the line apart, and other threads log meanwhile."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def check_paths(given: Mapping[str, str | os.PathLike | None]) -> None:
    """Raises ConfigError if one of the paths that a command was given ({"--out": …}, None: not given) is a URL."""
    for option, path in given.items():
        local_path(path or "", option)


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Adds the option --quantize of commands that open a checkpoint for use."""
    parser.add_argument("--quantize", choices=[kind for kind in QUANTIZE if kind], default="",
                        help="the language model's kernels in 8 bits (docs/running.md)")  # fmt: skip


MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # Forms without loss: a mask stays 0 and 255.
PICTURE_SUFFIXES = (*MASK_SUFFIXES, ".jpg", ".jpeg", ".webp")


def check_outputs(
    outputs: Mapping[str, tuple[str | None, Sequence[str]]], inputs: Mapping[str, str | None] | None = None
) -> None:
    """Checks before any work that its results can be written.

    Args:
      outputs: flag → (file, the suffixes that it may have); a file of None is not wanted.
      inputs: flag → file that is read, which no output may overwrite.

    Raises:
      ConfigError: a folder is missing, a file may not be written, has an unknown suffix, or stands twice.
    """
    places: dict[str, str] = {}

    def claim(flag: str, path: str) -> None:
        place = os.path.realpath(path)
        twin = next((other for known, other in places.items() if _is_same(known, place)), None)
        if twin is not None:
            raise ConfigError(f"{flag}={path}: the same file as {twin}")
        places[place] = flag

    for flag, path in (inputs or {}).items():
        places |= {os.path.realpath(path): f"{flag}, which is read"} if path else {}
    for flag, (path, suffixes) in outputs.items():
        if path is None:
            continue
        folder, suffix = os.path.dirname(path) or ".", os.path.splitext(path)[1].lower()
        is_device = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
        if not os.path.basename(path) or os.path.isdir(path):
            raise ConfigError(f"{flag}={path}: expected a file's name, got {'a folder' if path else 'nothing'}")
        if suffix not in suffixes and not is_device:
            raise ConfigError(f"{flag}={path}: expected a name that ends in {', '.join(suffixes)}")
        if not os.path.isdir(folder):
            raise ConfigError(f"{flag}={path}: there is no folder {folder}")
        if not os.access(path if os.path.exists(path) else folder, os.W_OK):
            raise ConfigError(f"{flag}={path}: no permission to write there")
        if not is_device:
            claim(flag, path)


def _is_same(first: str, second: str) -> bool:
    """Whether two names are one file."""
    if os.path.exists(first) and os.path.exists(second):
        return os.path.samefile(first, second)
    return first == second


class Progress:
    """A progress line: step, share, metrics, speed and time left."""

    def __init__(self, name: str, total: int, start: int = 0, stream: TextIO | None = None, unit: str = "steps"):
        self._name, self._total, self._start, self._unit = name, total, start, unit
        self._stream = stream or sys.stdout
        self._began = time.monotonic()

    def restart_clock(self, step: int) -> None:
        """Leaves what came before `step` (compilation) out of the speed."""
        self._began, self._start = time.monotonic(), step

    def line(self, step: int, metrics: dict[str, float]) -> None:
        """Prints one line for `step` of the total."""
        values = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        text = f"[{self._name}] {step}/{self._total}  {values}"
        if step > self._start:
            rate = (step - self._start) / max(time.monotonic() - self._began, 1e-9)
            speed = f"{rate:.1f} {self._unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self._unit.removesuffix('s')}"
            text += f"  {speed}  ETA {duration((self._total - step) / rate)}"
        print(text, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    seconds = int(round(seconds))
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
