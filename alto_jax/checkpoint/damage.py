"""A step that cannot be read: why, in words, and without the stack traces of the libraries that tried."""

from collections.abc import Callable, Iterator
import contextlib
import json
import logging
import pathlib
import sys
import traceback
from types import TracebackType
from typing import Any
import warnings

import jax

# Note: set once, since `warnings.catch_warnings` is not safe in threads. When a read has failed, Orbax leaves others
# behind that it has not begun.
warnings.filterwarnings("ignore", r"coroutine 'Store\..*' was never awaited", RuntimeWarning)

# What a step's folder must hold → what that is.
_PARTS = {
    "meta/metadata": "the description (meta/metadata)",
    "state": "the folder with the arrays (state)",
    "state/_METADATA": "the list of the arrays (state/_METADATA)",
    "data": "the position in the data (the folder data)",
}

_ARRAYS = {"_METADATA": "the list of the arrays (_METADATA)"}
# Words of TensorStore's errors.
_LIBRARY = ("DATA_LOSS", "NOT_FOUND", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "ocdbt", "zarr", "kvstore")
_told: set[pathlib.Path] = set()


def is_news(folder: pathlib.Path) -> bool:
    """Whether nobody in this process has asked for this step's folder before: one damaged step, one warning."""
    is_new = folder not in _told
    _told.add(folder)
    return is_new


def reason(folder: pathlib.Path, error: BaseException, *, is_step: bool = True) -> str:
    """Why a step cannot be read: what is missing from its folder or damaged in it; else what the error says.

    is_step: False: it is a folder of arrays alone.
    """
    if not folder.is_dir():
        return "its folder is missing"
    parts = _PARTS if is_step else _ARRAYS
    missing = [words for part, words in parts.items() if not (folder / part).exists()]
    missing = [words for words in missing if words != _PARTS["data"] or not _holds_parameters_alone(folder)]
    if missing:
        return f"{missing[0]} is missing"
    for part in (part for part in parts if part.lower().endswith("metadata")):
        try:
            json.loads((folder / part).read_bytes())
        except (ValueError, OSError):
            size = (folder / part).stat().st_size
            return f"{parts[part]} is damaged ({size} bytes, not JSON)"
    state = folder / "state" if is_step else folder
    manifests = [state / "manifest.ocdbt", *sorted(state.glob("ocdbt.process_*/manifest.ocdbt"))]
    if any(state.glob("ocdbt.process_*")) and not all(file.exists() for file in manifests):
        return f"the index of the arrays ({manifests[0].relative_to(folder)}) is missing"
    for data in (state / "d", *(file.parent / "d" for file in manifests[1:])) if manifests[0].exists() else ():
        if not data.is_dir() or not any(data.iterdir()):
            return f"the data of the arrays ({data.relative_to(folder)}) are missing"
    text = " ".join(str(error).split()).replace(f"{folder}/", "").removeprefix(f"{folder}: ") or type(error).__name__
    if isinstance(error, (AttributeError, TypeError)):
        return "the data of the arrays are damaged: their index cannot be read"
    is_library = not isinstance(error, (ValueError, OSError)) or any(word in text for word in _LIBRARY)
    return f"the data of the arrays are damaged: {text[:120]}" if is_library else text[:300]


def _holds_parameters_alone(folder: pathlib.Path) -> bool:
    """Whether a step is of a conversion, which has no position in the data."""
    return not list(folder.glob("state/ocdbt.process_*"))


def _is_late_future(error: BaseException | None, trace: TracebackType | None) -> bool:
    """Whether this is a result that arrives when nobody waits for it any more."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    is_asyncio = trace is None or "asyncio" in trace.tb_frame.f_code.co_filename
    return type(error) is RuntimeError and "Event loop is closed" in str(error) and is_asyncio


class _WithoutLateFutures:
    """A hook of `sys.unraisablehook` that passes these over, and gives the one before it the rest."""

    def __init__(self, hook: Callable[["sys.UnraisableHookArgs"], Any]):
        self._hook = hook

    def __call__(self, found: "sys.UnraisableHookArgs") -> None:
        if not _is_late_future(found.exc_value, found.exc_traceback):
            self._hook(found)


def _is_other_news(record: logging.LogRecord) -> bool:
    """Whether a line of asyncio's log is about something else than a result that nobody waits for any more."""
    return "exception was never retrieved" not in record.getMessage()


def _is_no_failed_save(record: logging.LogRecord) -> bool:
    """Whether a line of a log is about something else than an error that Orbax raises for who saves, too."""
    frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else ()
    return not any("orbax" in frame.filename for frame in frames) and _is_other_news(record)


def quiet_saves() -> None:
    """From here on no library prints a stack trace for each array that could not be written: who saves says it once.

    Note: they print in threads of their own, and asyncio when what has failed is collected, at any later time.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_failed_save)
    if not isinstance(sys.unraisablehook, _WithoutLateFutures):
        sys.unraisablehook = _WithoutLateFutures(sys.unraisablehook)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Around an attempt to read: keeps asyncio from printing a stack trace for every array that could not be read.

    Note: TensorStore goes on reading in threads of its own after the first array has failed, and finds the event loop
    closed. Each of these results comes to `sys.unraisablehook` or, when it is collected, to asyncio's log, some of them
    later: so hook and filter stay after a failure.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    stays = _is_other_news in logger.filters  # An attempt before this one has failed.
    logger.addFilter(_is_other_news)
    sys.unraisablehook = _WithoutLateFutures(hook)
    yield
    sys.unraisablehook = hook
    if not stays:
        logger.removeFilter(_is_other_news)


class Failures:
    """Turns what Orbax raises when files cannot be written into OSError; its manager then looks at what is there."""

    def __init__(self, manager: Any, folder: pathlib.Path):
        self._manager, self._folder = manager, folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        text = " ".join(str(error).split())
        words = ("No space left", "RESOURCE_EXHAUSTED", "File too large", "Disk quota", "errno")
        # Note: JAX's own errors speak of devices and processes; those of files are of other types.
        is_disk = not isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in words)
        if not is_disk and not isinstance(error, OSError):
            return
        self._manager.reload()
        raise OSError(f"{self._folder}: a checkpoint could not be written: {text}") from error
