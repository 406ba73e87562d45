"""Many requests into one folder: in batches, a line each; a run that was killed goes on where it was.

The folder gets results.jsonl (a line for each request that was answered, in their order), options.json (what all lines
depend on) and bad.jsonl (what could not be read in the last run; the next one tries again). A line is there when all
files of its request are.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import fcntl
import json
import os
import pathlib
import time
from typing import Any, Protocol

from alto_jax import cli
from alto_jax.config import ConfigError, naming, write_whole
from alto_jax.data import bad_data
from alto_jax.evaluate.results import difference
from alto_jax.inference.requests import Request

RESULTS, OPTIONS, BAD = "results.jsonl", "options.json", "bad.jsonl"
EXIT_LEFT_OUT = 1  # All that can be answered is, but some requests could not be read.
_NAMED = 10  # bad requests that are named on the terminal
_VERSION = 1  # Of the lines; those of another one are not continued.


class Work(Protocol):
    """What is done with requests.

    Attributes:
      name: of the command, for its lines.
      batch_size: requests that are answered together.
      options: all that a line depends on beside its request, JSON-compatible.
    """

    name: str
    batch_size: int
    options: dict[str, Any]

    def read(self, request: Request) -> Any:
        """What of a request goes into the model; in a thread. ValueError or OSError: it cannot be read."""

    def answer(self, requests: Sequence[Request], items: Sequence[Any], folder: pathlib.Path) -> list[dict[str, Any]]:
        """The rest of the line of each request, of a batch or fewer, after its files are written into the folder."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: requests answered by it, answered before, and left out by kind."""

    answered: int
    before: int
    left_out: dict[str, int]

    @property
    def exit_code(self) -> int:
        """Of the command."""
        return EXIT_LEFT_OUT if self.left_out else 0


class ResultLines:
    """results.jsonl, for one process at a time.

    Attributes:
      asked: id → what was asked, of all lines.
    """

    def __init__(self, folder: pathlib.Path, options: Mapping[str, Any]):
        """Opens or makes the file, and takes off a line that a killed run has begun.

        Raises:
          ConfigError: another run writes there, or has with other options; the file is not of this module.
        """
        self._path = folder / RESULTS
        self._file = self._path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"--out={folder}: another process writes there") from error
        wanted, kept = json.dumps({"version": _VERSION, **options}, sort_keys=True), folder / OPTIONS
        if kept.exists():
            before = kept.read_text()
            if before != wanted:
                what = difference(before, wanted)
                raise ConfigError(f"--out={folder}: holds results of {what}; choose another folder")
        elif os.path.getsize(self._path):
            raise ConfigError(f"--out={folder}: holds a {RESULTS}, but no {OPTIONS}; choose another folder")
        else:
            write_whole(kept, wanted)
        self.asked = dict(self._read())

    def _read(self) -> Iterator[tuple[str, Any]]:
        whole = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                value = json.loads(line)
                yield value["id"], value["request"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"--out: {self._path} line {number} is none of a result: {line[:60]!r}") from error
            whole += len(line)
        self._file.truncate(whole)

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines; when this returns they are on the disk."""
        with naming(self._path):
            self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets another process write."""
        with naming(self._path):
            self._file.close()


def run(requests: Sequence[Request], work: Work, folder: str | os.PathLike) -> Outcome:
    """Answers what has no line yet.

    Args:
      requests: all of them, each with an id of its own.
      work: what is done.
      folder: for lines and files; made if it is not there.

    Raises:
      ConfigError: the folder holds results of other options, or of another request of the same id.
    """
    out = pathlib.Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    lines = ResultLines(out, work.options)
    try:
        good = [request for request in requests if request.error is None]
        todo = [request for request in requests if request.error is not None or request.id not in lines.asked]
        for request in good:
            if (before := lines.asked.get(request.id, request.given)) != request.given:
                what = difference(json.dumps(before), json.dumps(request.given))
                raise ConfigError(f"--out={out}: request {request.id!r} was answered for {what}; choose another folder")
        return _run(todo, len(requests) - len(todo), work, out, lines)
    finally:
        lines.close()


def _run(todo: Sequence[Request], before: int, work: Work, out: pathlib.Path, lines: ResultLines) -> Outcome:
    total, answered, shown, batch = before + len(todo), 0, 0.0, []  # type: ignore[var-annotated]
    bad: Counter[str] = Counter()
    if before:
        print(f"[{work.name}] goes on after {before} of {total}", flush=True)
    progress = cli.Progress(work.name, total, before, unit="requests")

    def finish() -> None:
        nonlocal answered, shown
        asked, items = [request for request, _ in batch], [item for _, item in batch]
        found = work.answer(asked, items, out) if batch else []
        lines.append([{"id": r.id, "request": r.given, **line} for r, line in zip(asked, found, strict=True)])
        now, is_first = time.monotonic(), not answered
        answered += len(batch)
        batch.clear()
        step = before + answered + bad.total()
        if is_first:
            progress.restart_clock(step)
        if now - shown > 2 or step == total:
            progress.line(step, {"left out": bad.total()} if bad else {})
            shown = now

    with (out / BAD).open("w") as of_bad:
        for request, item in _read_ahead(todo, work):
            if isinstance(item, Exception):
                kind = bad_data.kind_of(item)
                bad[kind] += 1
                message = bad_data.one_line(item)
                told = {"id": request.id, "request": request.given, "error": message, "kind": kind}
                with naming(out / BAD):
                    of_bad.write(json.dumps(told) + "\n")
                    of_bad.flush()
                if bad.total() <= _NAMED:
                    cli.tell(f"[{work.name}] left out: {message}")
            else:
                batch.append((request, item))
            if len(batch) == work.batch_size:
                finish()
        if batch or bad:
            finish()
    if bad:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(bad.items()))
        cli.tell(f"[{work.name}] {bad.total()} of {total} left out ({kinds}); {out / BAD} names them")
    return Outcome(answered, before, dict(bad))


def _read_ahead(todo: Sequence[Request], work: Work) -> Iterator[tuple[Request, Any]]:
    """What was read of each request, or the exception; the next two batches are read in threads meanwhile."""

    def read(request: Request) -> Any:
        try:
            if request.error is not None:
                raise request.error
            return work.read(request)
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        waiting: deque[tuple[Request, Future]] = deque()
        try:
            for request in todo:
                waiting.append((request, pool.submit(read, request)))
                if len(waiting) > 2 * work.batch_size:
                    first, item = waiting.popleft()
                    yield first, item.result()
            while waiting:
                first, item = waiting.popleft()
                yield first, item.result()
        finally:
            for _, item in waiting:
                item.cancel()
