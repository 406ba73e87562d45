"""Objects under a URL: s3:// and gs://, and file:// and memory:// for rehearsals. The one place that knows of fsspec.

Comes in: a URL as its user wrote it. Goes out: names, sizes and contents of the objects below it. An object is there
whole or not at all. Whatever a service or its package raises becomes an OSError of one line that names the URL.
"""

from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import time
from typing import Any, TypeVar

from alto_jax.config import URL, ConfigError

# Scheme → what reads it, beside fsspec itself: the package and our extra that brings it.
_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "file": None, "memory": None}
_PAUSES = (0.5, 2.0, 8.0)  # seconds before a request that failed is made again
_PART = re.compile(r"(^|/)\.[^/]*\.part$")  # what a process that was killed left of a file
T = TypeVar("T")


def is_url(path: str | os.PathLike | None) -> bool:
    """Whether a path is a URL (scheme://…)."""
    return bool(path) and URL.match(os.fspath(path or "")) is not None


def checked(path: str | os.PathLike, field: str) -> str | pathlib.Path:
    """A path that may be on this machine or in a bucket: a pathlib.Path, or a URL in its one spelling.

    Args:
      path: as given by the user.
      field: what gave it, such as "--workdir", for the message.

    Raises:
      ConfigError: a URL of a scheme that is not known, or without a bucket.
    """
    if not is_url(path):
        return pathlib.Path(path)
    scheme, _, rest = os.fspath(path).partition(":")
    scheme, parts = scheme.lower(), [part for part in rest.split("/") if part not in ("", ".")]
    if scheme not in _PACKAGES:
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise ConfigError(
            f"{field}: expected a path on this machine, or a URL of {known} (mount other places),"
            f" got {os.fspath(path)!r}"
        )
    if not parts or ".." in parts:
        raise ConfigError(f"{field}: expected {scheme}://BUCKET/DIRECTORY, got {os.fspath(path)!r}")
    return f"{scheme}://{'/' * (scheme == 'file')}{'/'.join(parts)}"


def place(path: str | os.PathLike) -> str:
    """One spelling of a directory, so that two can be compared: its URL, or its absolute path without links."""
    found = checked(path, "path")
    return found if isinstance(found, str) else os.path.realpath(found)


@functools.cache
def _file_system(scheme: str) -> Any:
    import fsspec  # late: only buckets need it

    try:
        return fsspec.filesystem(scheme, **({"auto_mkdir": True} if scheme == "file" else {}))
    except ImportError as error:
        package, extra = _PACKAGES[scheme] or ("fsspec", "")
        raise ConfigError(f"{scheme}:// needs {package}: pip install 'alto_jax[{extra}]' ({error})") from error


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The objects below a URL, by the rest of their name, such as "checkpoints/3/meta/metadata".

    Attributes:
      url: in its one spelling, see `checked`.
    """

    url: str

    def _full(self, name: str = "") -> str:
        scheme, _, path = self.url.partition("://")
        path = f"/{path}" if scheme == "memory" else path
        return f"{path}/{name}" if name else path

    def _do(self, action: Callable[[Any], T]) -> T:
        """`action(file system)`, again after a pause where that may help.

        Raises:
          FileNotFoundError: no such object, or no such bucket. OSError: everything else.
        """
        files = _file_system(self.url.partition("://")[0])
        for pause in (*_PAUSES, None):
            try:
                return action(files)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self.url}: {_words(error)}") from error
            except Exception as error:  # noqa: BLE001 - each service has errors of its own
                if pause is None or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
                    raise OSError(f"{self.url}: {_words(error)}") from error
                time.sleep(pause)
        raise AssertionError

    def sizes(self, under: str = "") -> dict[str, int]:
        """{name: bytes} of all objects (of those below a folder); {} if there is none, or no such bucket."""
        folder = self._full(under)

        def action(files: Any) -> dict[str, int]:
            files.invalidate_cache()
            found = files.find(folder, detail=True)
            start = len(self._full()) + 1
            objects = {name[start:]: int(info["size"]) for name, info in found.items() if info["type"] == "file"}
            return {name: size for name, size in objects.items() if not _PART.search(name)}

        return self._do(action)

    def read(self, name: str) -> bytes:
        """The content of an object. Raises FileNotFoundError if there is none."""
        return self._do(lambda files: files.cat_file(self._full(name)))

    def write(self, name: str, content: bytes) -> None:
        """Writes an object."""
        if self.url.startswith("file://"):
            self._replace(name, lambda path: path.write_bytes(content))
        else:
            self._do(lambda files: files.pipe_file(self._full(name), content))

    def upload(self, file: pathlib.Path, name: str) -> None:
        """Writes an object from a file, however large."""
        if self.url.startswith("file://"):
            self._replace(name, lambda path: shutil.copyfile(file, path))
        else:
            self._do(lambda files: files.put_file(str(file), self._full(name)))

    def download(self, name: str, file: pathlib.Path) -> None:
        """Reads an object, however large, into a file, whose folders are made."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._do(lambda files: files.get_file(self._full(name), str(file)))

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects, in order; one that is not there is no error."""
        for name in map(self._full, names):
            with contextlib.suppress(FileNotFoundError):
                self._do(functools.partial(_remove, name))

    def _replace(self, name: str, write: Callable[[pathlib.Path], Any]) -> None:
        """A file that is there whole or not at all, as objects of the other schemes are by themselves."""
        path = pathlib.Path(self._full(name))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _remove(name: str, files: Any) -> None:
    files.rm_file(name)


def _words(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def bucket(url: str | os.PathLike, field: str) -> Bucket:
    """The objects below a URL; field: what gave it, for messages.

    Raises:
      ConfigError: no URL that can be used, or the package that reads it is missing.
    """
    found = checked(url, field)
    if isinstance(found, pathlib.Path):
        raise ConfigError(f"{field}: expected a URL, got {os.fspath(url)!r}")
    try:
        _file_system(found.partition("://")[0])
    except ConfigError as error:
        raise ConfigError(f"{field}: {found}: {error}") from error
    return Bucket(found)
