"""Many requests into one folder: in batches, a line each; a run that was killed goes on where it was.

The folder gets results.jsonl (a line for each request that was answered, in their order), options.json (what all lines
depend on) and bad.jsonl (what could not be read in the last run; the next one tries again). A line is there when all
files of its request are, and it knows the file that was read by size and digest: folders may move, but not change.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import fcntl
import functools
import hashlib
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
from alto_jax.parallel.at_once import batches_at_once, in_order

RESULTS, OPTIONS, BAD = "results.jsonl", "options.json", "bad.jsonl"
EXIT_LEFT_OUT = 1  # All that can be answered is, but some requests could not be read.
_NAMED = 10  # bad requests that are named on the terminal
_THREADS = min(4, os.cpu_count() or 1)
_KNOWN_FILES = 1024  # whose digest is kept, since several requests may read one
_VERSION = 1  # Of the lines; those of another one are not continued.
_Read = tuple[Request, Any, dict[str, Any]]  # a request, what was read of it or the exception, more for its line


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

    def source(self, request: Request) -> pathlib.Path | None:
        """The file that `read` opens; None: none."""

    def read(self, request: Request) -> Any:
        """What of a request goes into the model; in a thread. ValueError or OSError: it cannot be read."""

    def answer(self, requests: Sequence[Request], items: Sequence[Any], folder: pathlib.Path) -> list[dict[str, Any]]:
        """The rest of the line of each request, of a batch or fewer, after its files are written into the folder.

        Several threads may call it, each with requests of its own.
        """


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
      inputs: id → what `describe_file` said of the file that was read, of the lines that have it.
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
        self.asked: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        self._read()

    def _read(self) -> None:
        whole = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                value = json.loads(line)
                self.asked[value["id"]] = value["request"]
                if (given := value.get("input")) is not None:  # Compat: lines of earlier versions have none.
                    self.inputs[value["id"]] = given
            except (ValueError, KeyError, TypeError, AttributeError) as error:
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


def describe_file(path: str | os.PathLike) -> dict[str, Any]:
    """{"bytes": its size, "sha256": of its content}; OSError."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def run(requests: Sequence[Request], work: Work, folder: str | os.PathLike) -> Outcome:
    """Answers what has no line yet.

    Args:
      requests: all of them, each with an id of its own.
      work: what is done.
      folder: for lines and files; made if it is not there.

    Raises:
      ConfigError: the folder holds results of other options, or of another request of the same id, or of a file that
        has another content now.
    """
    describe = functools.lru_cache(_KNOWN_FILES)(describe_file)
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
        _check_inputs(good, work, out, lines.inputs, describe)
        return _run(todo, len(requests) - len(todo), work, out, lines, describe)
    finally:
        lines.close()


def _check_inputs(
    requests: Sequence[Request], work: Work, out: pathlib.Path, before: Mapping[str, Any], describe: Callable
) -> None:
    """Raises ConfigError if the file of an answered request has another content now; one that is gone has not."""

    def changed(request: Request) -> str:
        try:
            path = work.source(request)
            now = None if path is None else describe(path)
        except (ValueError, OSError):
            return ""
        return f"{path} ({now['bytes']} bytes)" if now is not None and now != before[request.id] else ""

    known = [request for request in requests if request.id in before]
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(known), _KNOWN_FILES):
            part = known[start : start + _KNOWN_FILES]
            for request, file in zip(part, pool.map(changed, part), strict=True):
                if file:
                    told = f"--out={out}: request {request.id!r} was answered for another content of {file}"
                    raise ConfigError(f"{told}; choose another folder for other files")


def _run(
    todo: Sequence[Request],
    before: int,
    work: Work,
    out: pathlib.Path,
    lines: ResultLines,
    describe: Callable,
) -> Outcome:
    total, answered, shown, told = before + len(todo), 0, 0.0, 0
    bad: Counter[str] = Counter()
    if before:
        print(f"[{work.name}] goes on after {before} of {total}", flush=True)
    progress = cli.Progress(work.name, total, before, unit="requests")

    def show(step: int) -> None:
        nonlocal told
        told = step
        progress.line(step, {"left out": bad.total()} if bad else {})

    with (out / BAD).open("w") as of_bad:

        def leave_out(request: Request, error: Exception) -> None:
            kind, message = bad_data.kind_of(error), bad_data.one_line(error)
            bad[kind] += 1
            line = {"id": request.id, "request": request.given, "error": message, "kind": kind}
            with naming(out / BAD):
                of_bad.write(json.dumps(line) + "\n")
                of_bad.flush()
            if bad.total() <= _NAMED:
                # Note: what is no request says itself where it stands.
                place = f"{request.id}: " if request.error is None else ""
                cli.tell(f"[{work.name}] left out: {place}{message}")

        def answer(batch: list[_Read]) -> tuple[list[_Read], list[dict[str, Any]]]:
            return batch, work.answer([request for request, *_ in batch], [item for _, item, _ in batch], out)

        batches = _batches(_read_ahead(todo, work, describe), work.batch_size, leave_out)
        for batch, found in in_order((functools.partial(answer, batch) for batch in batches), batches_at_once()):
            pairs = zip(batch, found, strict=True)
            lines.append([{"id": r.id, "request": r.given, **own, **line} for (r, _, own), line in pairs])
            now, step = time.monotonic(), before + answered + len(batch) + bad.total()
            if not answered:
                progress.restart_clock(step)
            answered += len(batch)
            if now - shown > 2 or step == total:
                show(step)
                shown = now
    if bad:
        if told != total:
            show(total)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(bad.items()))
        cli.tell(f"[{work.name}] {bad.total()} of {total} left out ({kinds}); {out / BAD} names them")
    return Outcome(answered, before, dict(bad))


def _batches(
    read: Iterable[_Read], size: int, leave_out: Callable[[Request, Exception], None]
) -> Iterator[list[_Read]]:
    """What was read, `size` at a time; of what could not be, `leave_out` is told."""
    batch: list[_Read] = []
    for request, item, own in read:
        if isinstance(item, Exception):
            leave_out(request, item)
        else:
            batch.append((request, item, own))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_ahead(todo: Sequence[Request], work: Work, describe: Callable) -> Iterator[_Read]:
    """What was read of each request, or the exception, and {"input": what its file is}; the next two batches are read
    in threads meanwhile."""

    def read(request: Request) -> tuple[Any, dict[str, Any]]:
        try:
            if request.error is not None:
                raise request.error
            item, path = work.read(request), work.source(request)
            return item, {} if path is None else {"input": describe(path)}
        except (ValueError, OSError) as error:
            return error, {}

    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[tuple[Request, Future]] = deque()
        try:
            for request in todo:
                waiting.append((request, pool.submit(read, request)))
                if len(waiting) > 2 * work.batch_size:
                    first, item = waiting.popleft()
                    yield first, *item.result()
            while waiting:
                first, item = waiting.popleft()
                yield first, *item.result()
        finally:
            for _, item in waiting:
                item.cancel()
