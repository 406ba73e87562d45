"""All or nothing: a directory that gets its name when it is complete, and leaves nothing behind otherwise."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
from pathlib import Path
import shutil
import signal
import threading
from typing import Any

_LOCK = ".writing"


class _TooSmall(OSError):
    """Known before anything was written."""


@contextlib.contextmanager
def staged(out: str | os.PathLike, nbytes: int = 0) -> Iterator[Path]:
    """Gives a directory beside `out` to write into; renames it to `out` at the end of the block.

    If the block fails or is interrupted (SIGTERM included), the directory is removed. What a killed process
    left is removed by the next one.

    Args:
      out: the final name; must not exist.
      nbytes: about how much will be written.

    Raises:
      FileExistsError: `out` exists.
      OSError: another process is writing it, or the disk is too small or full.
    """
    out = Path(out).absolute()
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.incomplete")
    lock = _claim(temporary, out)
    free = shutil.disk_usage(out.parent).free  # what a killed process left is gone by now
    try:
        if nbytes > free:
            raise _TooSmall(
                errno.ENOSPC, f"{out}: needs {nbytes / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free"
            )
        with _terminable():
            yield temporary
        check_free(out)
        (temporary / _LOCK).unlink()
        temporary.rename(out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception) and not isinstance(error, _TooSmall) and _is_full(error):
            raise OSError(errno.ENOSPC, f"{out}: the disk is full; what had been written is removed") from error
        raise
    finally:
        lock.close()


def check_free(out: Path) -> None:
    """Raises FileExistsError if the name is taken."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out}: exists already; choose another name or remove it")


def _claim(temporary: Path, out: Path) -> Any:
    """Makes the directory anew, locked; what lies there without a living owner is removed."""
    if temporary.is_dir():
        with open(temporary / _LOCK, "a") as old:
            if not _lock(old):
                raise BlockingIOError(f"{out}: another process is writing it")
            shutil.rmtree(temporary)
    temporary.mkdir()
    lock = open(temporary / _LOCK, "a")  # noqa: SIM115 (held until the end)
    _lock(lock)
    return lock


def _lock(stream: Any) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM an exception, so that clean-up runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk (TensorStore only says so in its text)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(word in str(error) for word in ("No space left", "ENOSPC", "RESOURCE_EXHAUSTED", "File too large")):
            return True
        error = error.__cause__ or error.__context__
    return False
