"""Where the wall clock of a run went: goodput, the updates that count, and badput, the rest; over all of its starts.

Comes in: which part of its work the loop is at (`Account.during`, `Account.enter`). Goes out: `goodput.jsonl` of the
run's directory, which process 0 appends to so that a killed process leaves its account, and from it seconds by part
since the first start (`summary`), which add up to the wall clock:

  start     from the start of the process to its first update: imports, data, fresh or restored parameters
  compile   the first update of a start, which compiles
  step      updates that count: goodput
  data      waiting for the next batch
  evaluate  evaluations
  save      what saves hold up (they are written beside the updates), and the end of a run
  lost      work after the checkpoint that a later start went on from, which was therefore done again
  down      from the last line of a start that did not reach its end to the next start: in a queue, or killed before
            the next line (one comes with every save, and at least every NOTE_SECONDS or update)

From one start to the next goes the machine's own clock, which nobody sets, or the wall's where the machine is another.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from typing import Any

from alto_jax.cli import Stopped, duration
from alto_jax.config import ConfigError, to_dict
from alto_jax.experiment import ExperimentConfig

FILE = "goodput.jsonl"
NOTE_SECONDS = 20.0
PARTS = ("step", "start", "compile", "data", "evaluate", "save", "lost", "down")
DEVICE = "device"  # The part of `step` in which the process waits for its devices.
_WORK = ("step", "data", "evaluate", "save")
# What ends a command with one clear line, so that nothing starts it again by itself.
_ENDS = (ValueError, OSError, ImportError, FloatingPointError, MemoryError, KeyboardInterrupt)


def process_age() -> float:
    """Seconds since this process started; 0 where the system does not say."""
    try:
        ticks = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        started = int(ticks) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


def since_boot() -> tuple[str, float]:
    """A name of this machine since it was last switched on, and the seconds since then; ("", 0.0): not known."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return "", 0.0


@dataclasses.dataclass
class Start:
    """What one start of a run has left in its account.

    config is "" of a start that died before its account (`train.early`).
    began: Unix time. newest: step of the newest checkpoint that it found (0: none). config: a hash of its
    configuration. went_on: step that it went on from (None: it did not come so far). marks: (updates done, seconds of
    each part so far). end: how it ended by itself ("done", "stopped", "error"), "" if it did not. boot, uptime: when it
    began, as `since_boot` has it.
    """

    began: float
    newest: int
    config: str
    went_on: int | None = None
    marks: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    end: str = ""
    boot: str = ""
    uptime: float = 0.0

    @property
    def spent(self) -> dict[str, float]:
        """Seconds of each part at the last mark."""
        return self.marks[-1][1] if self.marks else {}

    def until(self, later: "Start") -> float:
        """Seconds from this start to a later one."""
        if self.boot and self.boot == later.boot:
            return later.uptime - self.uptime
        return later.began - self.began


def read_starts(directory: pathlib.Path) -> list[Start]:
    """The starts of a run, in order; lines that a killed process left half written are passed over."""
    file = directory / FILE
    starts: list[Start] = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
            if "start" in record:
                clock = {name: record[name] for name in ("boot", "uptime") if name in record}
                starts.append(Start(record["start"], record["newest"], record["config"], **clock))
            elif starts:
                starts[-1].went_on = record.get("went_on", starts[-1].went_on)
                starts[-1].end = record.get("end", starts[-1].end)
                if "seconds" in record:
                    starts[-1].marks.append((record["step"], record["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue
    return starts


def total(starts: Iterable[Start]) -> dict[str, float]:
    """Seconds of each of PARTS over several starts, in order."""
    starts = list(starts)
    found = dict.fromkeys(PARTS, 0.0)
    for index, start in enumerate(starts):
        later = [other.went_on for other in starts[index + 1 :] if other.went_on is not None]
        kept: dict[str, float] = {}
        if later:
            kept = next((spent for step, spent in reversed(start.marks) if step <= min(later)), {})
        for part, seconds in start.spent.items():
            stays = kept.get(part, 0.0) if later and part in _WORK else seconds
            found[part] += stays
            found["lost"] += seconds - stays
        if index + 1 < len(starts) and start.end != "done":
            found["down"] += max(start.until(starts[index + 1]) - sum(start.spent.values()), 0.0)
    return found


def _digest(config: ExperimentConfig) -> str:
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def require_progress(directory: pathlib.Path, config: ExperimentConfig, newest: int) -> None:
    """Refuses to start again what ends again and again before its next checkpoint.

    Args:
      directory: of the run.
      config: `train.max_restarts` says how often (0: for ever); starts of another configuration do not count.
      newest: step of the newest checkpoint (0: none).

    Raises:
      ConfigError: so many starts in a row did not come to another checkpoint, nor to an end of their own.
    """
    limit, count, digest = config.train.max_restarts, 0, _digest(config)
    for start in reversed(read_starts(directory)):
        if not start.config:  # It died before its processes had joined, see `train.early`.
            continue
        if start.end or (start.newest, start.config) != (newest, digest):
            break
        count += 1
    if 0 < limit <= count:
        where = f"the one of step {newest}" if newest else "the beginning"
        raise ConfigError(
            f"config.train.max_restarts: {count} starts in a row of {directory} died before a checkpoint after {where};"
            f" see what they said last, then start it with another number than {limit} (0: no limit)"
        )


class Account:
    """The account of one start; at each moment the process is in one part, so that the parts add up.

    Attributes:
      seconds: of each part so far, since the start of the process; `DEVICE` apart from `step`.
    """

    def __init__(
        self,
        directory: pathlib.Path | None = None,
        config: ExperimentConfig | None = None,
        newest: int = 0,
        *,
        age: float = 0.0,
        early: Iterable[Start] = (),
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        uptime: Callable[[], tuple[str, float]] = since_boot,
    ):
        """Begins with the part "start".

        Args:
          directory: of the run, to which the account is written; None: nothing is written (process 1 and up).
          config: of the run; must be given with a directory.
          newest: step of the newest checkpoint that the start has found (0: none).
          age: seconds since the process started.
          early: starts that died before their account began, see `train.early`.
          clock: never goes back. wall: Unix time. uptime: see `since_boot`.
        """
        self.seconds = dict.fromkeys((*PARTS[:-2], DEVICE), 0.0) | {"start": age}
        self._clock, self._part, self._since = clock, "start", clock()
        self._noted, self._step, self._file = self._since, 0, None
        self._before: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._starts: list[Start] = []
        boot, seconds = uptime()
        self._now = Start(wall() - age, newest, "", boot=boot, uptime=seconds - age)
        if directory is not None:
            assert config is not None
            self._starts = read_starts(directory)
            self._file = (directory / FILE).open("ab", buffering=0)
            known = {start.began for start in self._starts}  # Note: a start may have died while it took them over.
            self._starts += (new := [start for start in early if start.began not in known])
            for start in new:
                self._begin(start)
            self._begin(dataclasses.replace(self._now, config=_digest(config)))

    def _begin(self, start: Start) -> None:
        clock = {"boot": start.boot, "uptime": round(start.uptime, 3)} if start.boot else {}
        self._say({"start": start.began, "newest": start.newest, "config": start.config} | clock)

    def _say(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            try:
                # Note: a line of its own also after one that a killed process left half written.
                self._file.write(f"\n{json.dumps(record)}\n".encode())
            except OSError:  # Note: a full disk must not end the run; the next line holds what this one would.
                pass

    def _switch(self, part: str) -> str:
        now, before = self._clock(), self._part
        self.seconds[before] += now - self._since
        self._since, self._part = now, part
        return before

    def enter(self, part: str) -> None:
        """From now on the process is in this part."""
        self._switch(part)

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """The process is in this part inside of the block."""
        before = self._switch(part)
        try:
            yield
        finally:
            self._switch(before)

    def snapshot(self) -> dict[str, float]:
        """A copy of `seconds` up to now."""
        self._switch(self._part)
        return dict(self.seconds)

    def _spent(self) -> dict[str, float]:
        spent = self.snapshot()
        spent["step"] += spent.pop(DEVICE)
        return spent

    def go_on_from(self, step: int) -> None:
        """The state is there, of so many updates: what earlier starts did after it is lost."""
        self._say({"went_on": step})
        self._before = total([*self._starts, dataclasses.replace(self._now, went_on=step)])
        self.note(step)

    def note(self, step: int) -> None:
        """Writes the account so far, after so many updates."""
        self._noted, self._step = self._clock(), step
        self._say({"step": step, "seconds": {part: round(s, 3) for part, s in self._spent().items()}})

    def beat(self, step: int) -> None:
        """`note`, if the last one is NOTE_SECONDS ago."""
        self._step = step
        if self._clock() - self._noted >= NOTE_SECONDS:
            self.note(step)

    def _parts(self) -> dict[str, float]:
        """Seconds of each of PARTS, of this start and all before."""
        spent = self._spent()
        return {part: self._before[part] + spent.get(part, 0.0) for part in PARTS}

    def metrics(self) -> dict[str, float]:
        """Shares of the wall clock so far: perf/goodput, and perf/badput/PART of the rest."""
        parts = self._parts()
        whole = max(sum(parts.values()), 1e-9)
        shares = {f"perf/badput/{part}": parts[part] / whole for part in PARTS if part != "step"}
        return {"perf/goodput": parts["step"] / whole} | shares

    def summary(self) -> dict[str, Any]:
        """{"share": of `step` in the wall clock, "wall_seconds", "starts", "seconds": {part: seconds}} up to now."""
        parts = self._parts()
        whole = sum(parts.values())
        return {
            "share": round(parts["step"] / max(whole, 1e-9), 4),
            "wall_seconds": round(whole, 3),
            "starts": len(self._starts) + 1,
            "seconds": {part: round(seconds, 3) for part, seconds in parts.items()},
        }

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Around the run: says how it ended, unless it may be started again as it is and was not asked to stop."""
        try:
            yield
            self._end("done")
        except Stopped:
            self._end("stopped")
            raise
        except _ENDS:
            self._end("error")
            raise
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _end(self, how: str) -> None:
        self.note(self._step)
        self._say({"end": how})


def line(found: dict[str, Any]) -> str:
    """A `summary` in one line."""
    parts = sorted(found["seconds"].items(), key=lambda item: -item[1])
    told = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts if seconds >= 0.05)
    times = "start" if found["starts"] == 1 else "starts"
    return f"goodput {found['share']:.1%} of {duration(found['wall_seconds'])} in {found['starts']} {times}: {told}"
