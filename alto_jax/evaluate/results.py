"""Per-sample results that survive a kill.

A result file is JSONL: a header line with everything that the results depend on, then one line a sample in
order. Lines are appended batch by batch; opened again, a file is cut back to its last whole batch, so that the
run goes on there and ends with the same bytes as one that was never stopped. Times are in a file of their own.
"""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

from alto_jax.config import ConfigError, naming, write_whole

VERSION = 2  # Of the lines; results of another one are not continued.


def result_path(out: str | os.PathLike, task: str) -> pathlib.Path:
    """The result file of a task."""
    return pathlib.Path(out) / "results" / f"{task}.jsonl"


class ResultFile:
    """The JSONL of one benchmark; only the first process writes.

    Attributes:
      done: samples that are in the file, a whole number of batches (or all).
    """

    def __init__(self, path: str | os.PathLike, header: Mapping[str, Any], *, batch_size: int, total: int):
        """Opens or makes the file; ConfigError if it holds results of another checkpoint or other options."""
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first = json.dumps(dict(header), sort_keys=True)
        kept, self.done = "", 0
        if self.path.exists():
            content = self.path.read_bytes().decode("utf-8", "replace")
            lines = content[: content.rfind("\n") + 1].splitlines()
            if lines and lines[0] != first:
                raise ConfigError(f"--out: {self.path} holds results of {difference(lines[0], first)}; choose another "
                                  "directory, or delete it")  # fmt: skip
            count = min(len(lines) - 1, total) if lines else 0
            self.done = count if count == total else count - count % batch_size
            kept = "".join(line + "\n" for line in lines[1 : 1 + self.done])
        text = first + "\n" + kept
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            write_whole(self.path, text)
        self._file = self.path.open("ab")

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends the lines of a batch."""
        with naming(self.path):
            self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.done += len(lines)

    def close(self) -> None:
        with naming(self.path):
            self._file.close()


def difference(old: str, new: str) -> str:
    """What differs between two headers, in words."""
    try:
        before, now = json.loads(old), json.loads(new)
        return "; ".join(f"{k} {before.get(k)!r} (now {now.get(k)!r})" for k in now if before.get(k) != now.get(k))
    except ValueError:
        return "something else"


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The header of a result file; ConfigError if it has none."""
    with pathlib.Path(path).open("rb") as file:
        return _header(file.readline(), path)


def read_results(path: str | os.PathLike) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and samples of a result file, without a last line that a kill has cut short.

    Raises:
      ConfigError: no header, or a line that is damaged.
    """
    content = pathlib.Path(path).read_bytes()
    first, *lines = content[: content.rfind(b"\n") + 1].split(b"\n")
    return _header(first, path), [_parsed(line, path, number) for number, line in enumerate(lines[:-1], 2)]


def _header(line: bytes, path: str | os.PathLike) -> dict[str, Any]:
    found = _parsed(line, path, 1)
    if not {"checkpoint", "task", "family", "benchmark", "samples"} <= found.keys():
        raise ConfigError(f"{path}: expected a file of results with its header; delete it and evaluate again")
    return found


def _parsed(line: bytes, path: str | os.PathLike, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} line {number}: expected a JSON object, got {line[:40].decode(errors='replace')!r}; "
                          "delete the file and evaluate again")  # fmt: skip
    return found


def merge_lines(parts: Sequence[Sequence[dict[str, Any]]], total: int) -> list[dict[str, Any]]:
    """The lines of all processes in order of their "index", each once (processes may share samples), below `total`."""
    by_index = {line["index"]: line for part in reversed(parts) for line in part}
    return [by_index[index] for index in sorted(by_index) if index < total]
