"""Benchmarks from the command line: one command gives the numbers of every table.

    python -m alto_jax.evaluate --checkpoint DIR --benchmark refcoco_val,grefcoco_testA --data ROOT --out DIR

Writes to the out directory `results/*.jsonl` (a line a sample, in order), `metrics.json`, `tables.md`, plots, and
`timing.json`. Killed and started again, it goes on after the last whole batch; everything but `timing.json` ends
byte for byte as without the kill. A benchmark is one of those that --list names, or `tokenizer_NAME`: the mask
tokenizer alone on the masks of benchmark NAME, of `scenes`, or of the SA-1B folder given by --data (`tokenizer_sa1b`).
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import json
import pathlib
import time
from typing import Any

from alto_jax import cli
from alto_jax.config import ConfigError

_NUM_TIMED_FROM = 1  # Note: the first batch of a process compiles and is left out of the times.


class Runner:
    """Runs tasks (see eval_tasks.py) batch by batch into result files, and keeps the times."""

    def __init__(
        self, out: str | pathlib.Path, mesh: Any, *, batch_size: int, max_bad_fraction: float, threads: int = 2
    ):
        """ConfigError: a batch size that does not split over the devices, or devices that do not over the processes."""
        import jax

        self.out, self.mesh, self.batch_size = pathlib.Path(out), mesh, batch_size
        self._max_bad, self._threads = max_bad_fraction, threads
        self._process, self._processes = jax.process_index(), jax.process_count()
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        if batch_size < 1 or batch_size % parts:
            raise ConfigError(f"--batch-size: expected a multiple of the {parts} devices, got {batch_size}")
        if parts % self._processes:
            raise ConfigError(
                f"--tensor: devices that share one sample must be of one process, got {mesh.shape['tensor']} of "
                f"{mesh.size} devices in {self._processes} processes"
            )

    def run(self, task: Any, header: dict[str, Any]) -> tuple[list[dict], dict]:
        """Runs what is left of a task.

        Returns:
          The samples of its result file, and its times {"seconds_per_sample", "tokens_per_second", …}.

        Raises:
          ConfigError: the out directory holds results of another checkpoint or other options.
          ValueError: more bad samples than `max_bad_fraction` allows.
        """
        from alto_jax.cli import Progress
        from alto_jax.data import bad_data
        from alto_jax.evaluate import results

        total = len(task)
        path = self.out / "results" / f"{task.name}.jsonl"
        header = header | {"task": task.name, "samples": total, "batch_size": self.batch_size, **task.options}
        file, done, earlier = self._open(path, header, total)
        progress = Progress(task.name, total, done)
        bad = bad_data.BadRecords(total, self._max_bad, name=task.name, option="--max-bad-fraction")
        if done:
            print(f"[{task.name}] resumed after {done} of {total} samples")
            _count(bad, earlier)
        timing, shown = _Timing(self.out / "results" / f"{task.name}.timing.jsonl"), 0.0
        try:
            for number, (start, examples) in enumerate(self._batches(task, done, total)):
                began = time.monotonic()
                lines, tokens = self._batch(task, examples)
                lines = results.gather_lines(lines)[: total - start]
                lines = [{"index": start + i, **line} for i, line in enumerate(lines)]
                if file is not None:
                    file.append(lines)
                    if number >= _NUM_TIMED_FROM:
                        timing.add(start, len(lines), tokens, time.monotonic() - began)
                _count(bad, lines)
                if number == 0:
                    progress.restart_clock(start + len(lines))
                if self._process == 0 and (time.monotonic() - shown > 2 or start + len(lines) == total):
                    progress.line(start + len(lines), task.headline(lines))
                    shown = time.monotonic()
        finally:
            if file is not None:
                file.close()
        if len(bad) and self._process == 0:
            print(f"[{task.name}] {len(bad)} of {total} samples left out: {bad.by_kind()}")
        return (results.read_results(path)[1], timing.summary()) if self._process == 0 else ([], {})

    def _open(self, path: pathlib.Path, header: dict[str, Any], total: int) -> tuple[Any, int, list[dict]]:
        """The result file (None but in the first process), the samples it holds, and those of them without a result.

        Every process comes to the same numbers, or raises the same ConfigError: only the first one sees the file.
        """
        from alto_jax.evaluate import results

        file, found = None, {"error": ""}
        if self._process == 0:
            try:
                file = results.ResultFile(path, header, batch_size=self.batch_size, total=total)
                found |= {"done": file.done, "bad": [x for x in results.read_results(path)[1] if "error" in x]}
            except ConfigError as error:
                found["error"] = str(error)
        found = results.gather_lines([found])[0]
        if found["error"]:
            raise ConfigError(found["error"])
        return file, found["done"], found["bad"]

    def _batches(self, task: Any, done: int, total: int) -> Iterator[tuple[int, list]]:
        """(index of the first sample, this process's examples) of each batch, read ahead by threads.

        A last batch that is not full is filled up with its last sample.
        """
        part = self.batch_size // self._processes
        with ThreadPoolExecutor(max_workers=self._threads) as pool:
            submit = lambda start: [
                pool.submit(_example, task, min(start + self._process * part + i, total - 1)) for i in range(part)
            ]
            starts = list(range(done, total, self.batch_size))
            ahead = [submit(start) for start in starts[:2]]
            for number, start in enumerate(starts):
                examples = [future.result() for future in ahead.pop(0)]
                if number + 2 < len(starts):
                    ahead.append(submit(starts[number + 2]))
                yield start, examples

    def _batch(self, task: Any, examples: Sequence[dict]) -> tuple[list[dict], int]:
        """Result lines of a batch's examples, and the tokens generated for them."""
        good = next((e for e in examples if "line" not in e), None)
        if good is None and self._processes == 1:
            return [e["line"] for e in examples], 0
        filled = [e if "line" not in e else (good or task.blank()) for e in examples]
        lines, tokens = task.run(filled, self.mesh)
        return [e.get("line", line) for e, line in zip(examples, lines)], tokens


def _example(task: Any, index: int) -> dict:
    """A sample ready for the device; {"line": …} where it can't be evaluated."""
    try:
        return task.example(index)
    except (ValueError, OSError) as error:
        return {"line": {"error": " ".join(str(error).split())}}


def _count(bad: Any, lines: Sequence[dict]) -> None:
    """Counts and logs the samples among `lines` that have no result; ValueError above the limit."""
    for line in lines:
        if "error" in line:
            bad.add(line["index"], line["error"])


class _Timing:
    """Seconds and tokens of each timed batch, kept over restarts."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def add(self, start: int, samples: int, tokens: int, seconds: float) -> None:
        line = {"start": start, "samples": samples, "tokens": tokens, "seconds": round(seconds, 5)}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def summary(self) -> dict[str, Any]:
        lines = []
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:  # cut short by a kill
                continue
        seconds = sum(line["seconds"] for line in lines)
        samples, tokens = sum(line["samples"] for line in lines), sum(line["tokens"] for line in lines)
        if not samples:
            return {"timed_samples": 0}
        rate = tokens / seconds if tokens else None
        return {"timed_samples": samples, "seconds_per_sample": seconds / samples, "tokens_per_second": rate}


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmarks of the command line and writes metrics, tables and plots.

    Returns:
      What `metrics.json` holds: task name → numbers.
    """
    import jax

    from alto_jax.checkpoint import loading
    from alto_jax.data import bad_data
    from alto_jax.evaluate import tables, tasks
    from alto_jax.parallel import sharding

    mesh = sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=options.fsdp, tensor=options.tensor))
    loaded = loading.load_model(options.checkpoint, mesh)
    cfg, identity = loaded.cfg, loaded.identity
    system = loaded.meta["data"]["system"]
    found_tasks = tasks.make_tasks(options, cfg, loaded.params, loaded.text, system)
    runner = Runner(options.out, mesh, batch_size=options.batch_size, max_bad_fraction=options.max_bad_fraction,
                    threads=options.threads)  # fmt: skip
    found, timing, samples = {}, {}, {}
    for task in found_tasks:
        lines, times = runner.run(task, {"checkpoint": identity})
        if jax.process_index() == 0:
            kinds = Counter(bad_data.kind_of(line["error"]) for line in lines if "error" in line)
            found[task.name] = {"family": task.family, "benchmark": task.benchmark, **task.options,
                                **task.summary(lines), "bad_by_kind": dict(sorted(kinds.items()))}  # fmt: skip
            timing[task.name], samples[task.name] = times, lines
    if jax.process_index() == 0:
        out = pathlib.Path(options.out)
        title = options.title or pathlib.Path(options.checkpoint).name
        paper = json.loads(pathlib.Path(options.paper_rows).read_text()) if options.paper_rows else {}
        _write(out / "metrics.json", json.dumps({"checkpoint": identity, "tasks": found}, indent=1) + "\n")
        _write(out / "tables.md", tables.markdown(found, title, paper))
        _write(out / "timing.json", json.dumps(timing, indent=1) + "\n")
        _write(out / "timing.md", tables.timing_markdown(found, timing, title))
        tables.plots(found, cfg.tokenizer.num_latent_tokens, out)
        print((out / "tables.md").read_text(), end="")
    return found


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    from alto_jax.data.refcoco import PROTOCOLS

    found = argparse.ArgumentParser(prog="python -m alto_jax.evaluate", description="Benchmarks and their tables.")
    found.add_argument("--checkpoint", metavar="DIR", help="a run's directory")
    found.add_argument(
        "--benchmark", metavar="NAMES", help="names with commas between; all: every one whose files are there"
    )
    found.add_argument("--data", default=".", metavar="DIR", help="the data folder, or a prepared data set")
    found.add_argument("--images", metavar="DIR", help="the COCO images, if not at a usual place in the data folder")
    found.add_argument("--out", metavar="DIR")
    found.add_argument("--list", action="store_true", help="print the benchmarks and the files they expect")
    found.add_argument("--protocol", choices=PROTOCOLS, default="joined", help="sentences of a referent as one request")
    found.add_argument("--length", choices=("adaptive", "fixed", "both"), default="adaptive")
    found.add_argument("--batch-size", type=int, default=8, help="over all devices")
    found.add_argument("--limit", type=int, default=0, help="only the first samples (0: all)")
    found.add_argument("--max-new-tokens", type=int, default=0, help="longest answer (0: one mask and a sentence)")
    found.add_argument("--grammar", action="store_true", help="allow only well-formed masks")
    found.add_argument(
        "--forced-prefix", action="store_true", help="the answer's start is given, the mask's end ends it"
    )
    found.add_argument("--min-pixels", type=int, default=0, help="fewer predicted pixels count as no mask")
    found.add_argument("--reference", action="store_true",
                       help="the reference's scoring: nearest upsampling, ignored pixels as hits, malformed answers "
                            "decoded from no codes")  # fmt: skip
    found.add_argument("--max-bad-fraction", type=float, default=0.001, help="unreadable samples left out at most")
    found.add_argument("--scenes", type=int, default=256, help="samples of the built-in benchmark")
    found.add_argument("--paper-rows", metavar="FILE", help='JSON {table: [{"row": name, benchmark: value}]} to add')
    found.add_argument("--title", help="name of our rows (default: the checkpoint's folder)")
    found.add_argument("--fsdp", type=int, default=1, help="devices that share the parameters")
    found.add_argument("--tensor", type=int, default=1, help="devices that share heads and vocabulary")
    found.add_argument(
        "--distributed", choices=("none", "env", "auto"), default="none", help="as in alto_jax.main (distributed.py)"
    )
    found.add_argument("--threads", type=int, default=2, help="reading threads")
    return found


def main() -> int:
    """The command; see the module's docstring."""
    options = parser().parse_args()
    if options.list:
        from alto_jax.data.benchmarks import BENCHMARKS

        for found in BENCHMARKS.values():
            print(f"{found.name:28s}{found.expects}")
        return 0
    for name in ("checkpoint", "benchmark", "out"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is required (see --help)")
    from alto_jax.parallel import distributed

    distributed.initialize(options.distributed)
    evaluate(options)
    return 0


if __name__ == "__main__":
    cli.run(main)
