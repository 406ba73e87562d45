"""Runs tasks batch by batch into result files that survive a kill, then writes metrics, tables and plots."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import json
import os
import pathlib
import time
from typing import Any

import jax

from alto_jax.checkpoint import loading
from alto_jax.cli import Progress
from alto_jax.config import write_whole
from alto_jax.data import bad_data
from alto_jax.evaluate import results, tables
from alto_jax.evaluate.options import EvaluateOptions
from alto_jax.evaluate.tasks import Task, make_tasks
from alto_jax.parallel import distributed, sharding

_NUM_TIMED_FROM = 1  # Note: the first batch of a process compiles and is left out of the times.


class Runner:
    """Runs tasks (`alto_jax.evaluate.tasks.Task`) batch by batch into result files, and keeps the times."""

    def __init__(
        self, out: str | os.PathLike, mesh: Any, *, batch_size: int, max_bad_fraction: float, threads: int = 2
    ):
        """ConfigError: a batch size that does not split over the devices."""
        self.out, self.mesh, self.batch_size = pathlib.Path(out), mesh, batch_size
        self._max_bad, self._threads = max_bad_fraction, threads
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._rows = sharding.batch_share(mesh).rows(batch_size, "--batch-size").tolist()

    def run(self, task: Task, header: dict[str, Any]) -> tuple[list[dict], dict]:
        """Runs what is left of a task.

        Returns:
          The samples of its result file, and its times {"seconds_per_sample", "tokens_per_second", …}.

        Raises:
          ConfigError: the out directory holds results of another checkpoint or other options.
          ValueError: more bad samples than `max_bad_fraction` allows.
        """
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
                lines = [{"index": start + row, **line} for row, line in zip(self._rows, lines, strict=True)]
                lines = results.merge_lines(distributed.gather(lines), total)
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

    def _open(
        self, path: pathlib.Path, header: dict[str, Any], total: int
    ) -> tuple[results.ResultFile | None, int, list[dict]]:
        """The result file (None but in the first process), the samples it holds, and those of them without a result.

        Every process comes to the same numbers, or raises the same ConfigError: only the first one sees the file.
        """
        files: list[results.ResultFile] = []

        def open_file() -> tuple[int, list[dict]]:
            files.append(results.ResultFile(path, header, batch_size=self.batch_size, total=total))
            return files[0].done, [line for line in results.read_results(path)[1] if "error" in line]

        done, earlier = distributed.from_first(open_file)
        return files[0] if files else None, done, earlier

    def _batches(self, task: Any, done: int, total: int) -> Iterator[tuple[int, list]]:
        """(index of the first sample, this process's examples) of each batch, read ahead by threads.

        A last batch that is not full is filled up with its last sample.
        """
        with ThreadPoolExecutor(max_workers=self._threads) as pool:
            submit = lambda start: [pool.submit(_example, task, min(start + row, total - 1)) for row in self._rows]
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
        return {"line": {"error": bad_data.one_line(error), "kind": bad_data.kind_of(error)}}


def _count(bad: Any, lines: Sequence[dict]) -> None:
    """Counts and logs the samples among `lines` that have no result; ValueError above the limit."""
    for line in lines:
        if "error" in line:
            bad.add(line["index"], line["error"], line.get("kind", ""))


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


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Runs the benchmarks and writes metrics, tables and plots.

    Returns:
      What `metrics.json` holds: task name → numbers.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=options.fsdp, tensor=options.tensor))
    loaded = loading.load_model(options.checkpoint, mesh)
    cfg, identity = loaded.cfg, loaded.identity
    system = loaded.meta["data"]["system"]
    tasks = make_tasks(options, cfg, loaded.params, loaded.text, system)
    runner = Runner(options.out, mesh, batch_size=options.batch_size, max_bad_fraction=options.max_bad_fraction,
                    threads=options.threads)  # fmt: skip
    found, timing, samples = {}, {}, {}
    for task in tasks:
        lines, times = runner.run(task, {"checkpoint": identity})
        if jax.process_index() == 0:
            kinds = Counter(line.get("kind", "other") for line in lines if "error" in line)
            found[task.name] = {"family": task.family, "benchmark": task.benchmark, **task.options,
                                **task.summary(lines), "bad_by_kind": dict(sorted(kinds.items()))}  # fmt: skip
            timing[task.name], samples[task.name] = times, lines
    if jax.process_index() == 0:
        out = pathlib.Path(options.out)
        title = options.title or pathlib.Path(options.checkpoint).name
        paper = json.loads(pathlib.Path(options.paper_rows).read_text()) if options.paper_rows else {}
        write_whole(out / "metrics.json", json.dumps({"checkpoint": identity, "tasks": found}, indent=1) + "\n")
        write_whole(out / "tables.md", tables.markdown(found, title, paper))
        write_whole(out / "timing.json", json.dumps(timing, indent=1) + "\n")
        write_whole(out / "timing.md", tables.timing_markdown(found, timing, title))
        tables.plots(found, cfg.tokenizer.num_latent_tokens, out)
        print((out / "tables.md").read_text(), end="")
    return found
