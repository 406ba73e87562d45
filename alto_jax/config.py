"""From plain configuration values to frozen dataclasses that validate.

A config file gives nested plain values (an `ml_collections.ConfigDict`); `build` turns them into the
dataclasses that stand beside the modules which use them, and rejects what does not fit with the dotted
name of the field and the value received. `write_whole` is how every room writes a small file, `local_path` how
it takes a path from its user.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import platform
import re
import socket
import types
import typing
from typing import Any

Quantize = typing.Literal["", "int8", "fp8"]  # Kernels for inference: as they are, or in a type of 8 bits.
QUANTIZE: tuple[str, ...] = typing.get_args(Quantize)


class ConfigError(ValueError):
    """A configuration value that cannot be used; the message names the field and the value."""


def build(cls: type, values: Mapping[str, Any] | Any, where: str = "config") -> Any:
    """Builds the frozen dataclass `cls` from nested plain values.

    Args:
      cls: a dataclass type; its field types may be int, float, bool, str, tuples of these, `X | None`,
        or further dataclasses.
      values: a mapping with any subset of the fields (missing ones take their defaults).
      where: dotted name of `values`, for messages.

    Returns:
      An instance of `cls`.

    Raises:
      ConfigError: an unknown field, a missing required field, a value of another type, or a value that
        the dataclass's own `__post_init__` refuses. The message names the dotted field.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a group of fields for {cls.__name__}, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where}.{name}: unknown field; known: {', '.join(sorted(fields))}")
    kwargs = {}
    for name, field in fields.items():
        if name in values:
            kwargs[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name}: required field is missing")
    try:
        return cls(**kwargs)
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from error  # the message starts with the field's name


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Checks `value` against the type `hint` and converts lists to tuples and ints to floats."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        rest = [o for o in options if o is not type(None)]
        for option in rest[:-1]:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        return _convert(rest[-1], value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where}: expected one of {typing.get_args(hint)}, got {value!r}")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        args = typing.get_args(hint)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise ConfigError(f"{where}: expected {len(args)} values, got {value!r}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def to_dict(config: Any) -> Any:
    """Turns a dataclass of `build` back into plain JSON-compatible values (tuples become lists)."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    return config


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of the leaves of nested dicts that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if old == new else [(name, old, new)]


def require(condition: bool, field: str, value: Any, expected: str) -> None:
    """Raises ConfigError naming `field`, `value` and what was `expected`, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field}: expected {expected}, got {value!r}")


# Note: pathlib makes one slash of two.
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | os.PathLike, field: str) -> pathlib.Path:
    """The path of a file or folder, which must be on a file system of this machine.

    Args:
      path: as given by the user.
      field: what gave it, such as "--workdir", for the message.

    Raises:
      ConfigError: it is a URL (scheme://…), which would become a local folder of that name.
    """
    if URL.match(os.fspath(path)):
        raise ConfigError(f"{field}: expected a path on this machine (mount the bucket), got {os.fspath(path)!r}")
    return pathlib.Path(path)


def cache_folder() -> pathlib.Path:
    """Where indexes and unpacked checkpoints are kept: ALTO_CACHE, else alto_jax in XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("ALTO_CACHE"):
        return pathlib.Path(os.environ["ALTO_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "alto_jax"


def keep_programs() -> None:
    """Has JAX, which must not be imported yet, keep compiled programs for later runs of a command.

    They lie in ALTO_COMPILE_CACHE ("off": nowhere), else in a folder of `cache_folder` for this kind of CPU, since
    a program for a CPU uses what that one can do. A folder that JAX was given (JAX_COMPILATION_CACHE_DIR) stays.
    """
    chosen = os.environ.get("ALTO_COMPILE_CACHE", "")
    if chosen == "off":
        return
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        can = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        can = ""
    kind = hashlib.sha256(f"{platform.machine()} {platform.processor()} {can}".encode()).hexdigest()[:12]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", chosen or str(cache_folder() / f"programs-{kind}"))


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Gives an OSError that says not where, as of a full disk, the name of the file that is being written."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file that others see whole or not at all, also where several processes or machines write it.

    Args:
      path: of the file; its folder must be there.
      content: text (UTF-8) or bytes.

    Raises:
      OSError: it cannot be written; what was there before is still there.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with naming(path):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
