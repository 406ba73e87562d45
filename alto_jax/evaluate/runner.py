"""Runs tasks batch by batch into result files that survive a kill, then writes what is made of them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import os
import pathlib
import time
from typing import Any

import jax

from alto_jax.checkpoint import loading
from alto_jax.cli import Progress
from alto_jax.data import bad_data
from alto_jax.evaluate import outputs, results, timing
from alto_jax.evaluate.device import Answers, Programs, device_name
from alto_jax.evaluate.options import EvaluateOptions
from alto_jax.evaluate.tasks import Task, header_of, make_tasks
from alto_jax.parallel import distributed, sharding


class Runner:
    """Runs tasks (`alto_jax.evaluate.tasks.Task`) batch by batch into result files, and keeps the times."""

    def __init__(
        self,
        out: str | os.PathLike,
        mesh: Any,
        *,
        batch_size: int,
        max_bad_fraction: float,
        threads: int = 2,
        num_singles: int = 0,
    ):
        """ConfigError: a batch size that does not split over the devices."""
        self.out, self.mesh, self.batch_size = pathlib.Path(out), mesh, batch_size
        self._max_bad, self._threads, self._num_singles = max_bad_fraction, threads, num_singles
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._share = sharding.batch_share(mesh)
        self._rows = self._share.rows(batch_size, "--batch-size").tolist()

    def run(self, task: Task, header: dict[str, Any]) -> None:
        """Runs what is left of a task into its result file.

        Raises:
          ConfigError: the out directory holds results of another checkpoint, other data or other options.
          ValueError: more bad samples than `max_bad_fraction` allows.
        """
        total, path = len(task), results.result_path(self.out, task.name)
        header = header | {"version": results.VERSION, "batch_size": self.batch_size} | header_of(task)
        file, done, earlier = self._open(path, header, total)
        times = None if file is None else timing.TimingFile(path, header, device_name(self.mesh), done=done)
        progress = Progress(task.name, total, done)
        bad = bad_data.BadRecords(total, self._max_bad, name=task.name, option="--max-bad-fraction")
        if done:
            print(f"[{task.name}] resumed after {done} of {total} samples")
            _count(bad, earlier)
        shown = 0.0

        def finish(start: int, scored: Sequence[dict | Future], answers: Answers | None) -> None:
            """Writes a batch whose samples are being scored."""
            nonlocal shown
            lines = [line.result() if isinstance(line, Future) else line for line in scored]
            lines = [{"index": start + row, **line} for row, line in zip(self._rows, lines, strict=True)]
            lines = results.merge_lines(distributed.gather(lines), total)
            if file is not None and times is not None:
                file.append(lines)
                if answers is not None:
                    times.add(start, self.batch_size, answers.tokens, answers.seconds)
            _count(bad, lines)
            if start == done:
                progress.restart_clock(start + len(lines))
            if self._process == 0 and (time.monotonic() - shown > 2 or start + len(lines) == total):
                progress.line(start + len(lines), task.headline(lines))
                shown = time.monotonic()

        try:
            with ThreadPoolExecutor(max_workers=self._threads) as pool:
                waiting: tuple | None = None
                for start, examples in self._batches(task, done, total):
                    now = (start, *self._batch(task, examples, pool))
                    # Note: the samples of a batch are scored while the device computes the next one.
                    if waiting is not None:
                        finish(*waiting)
                    waiting = now
                if waiting is not None:
                    finish(*waiting)
        finally:
            if file is not None:
                file.close()
        if len(bad) and self._process == 0:
            print(f"[{task.name}] {len(bad)} of {total} samples left out: {bad.by_kind()}")
        self._time_singles(task, times)

    def _time_singles(self, task: Task, times: timing.TimingFile | None) -> None:
        """Times the first samples one at a time, as far as that is not done yet."""
        for index in range(min(self._num_singles, len(task))):
            example = _example(task, index)
            known = times is not None and times.has_single(index)
            # Note: process 0 alone knows the times, and every process must be able to read the sample.
            if any(distributed.gather(known or "line" in example)):
                continue
            answers = task.answer([example] * len(self._share.parts))
            if times is not None:
                times.add(index, 1, answers.tokens / self._share.num_parts, answers.seconds, single=True)

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

    def _batch(
        self, task: Task, examples: Sequence[dict], pool: ThreadPoolExecutor
    ) -> tuple[list[dict | Future], Answers | None]:
        """Result lines of a batch's examples, which threads work on, and what the device said (None: nothing)."""
        good = next((e for e in examples if "line" not in e), None)
        if good is None and self._processes == 1:
            return [e["line"] for e in examples], None
        filled = [e if "line" not in e else (good or task.blank()) for e in examples]
        answers = task.answer(filled)
        score = lambda row, e: e["line"] if "line" in e else pool.submit(task.line, e, answers, row)
        return [score(row, example) for row, example in enumerate(examples)], answers


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


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Runs the benchmarks and writes metrics, tables, pictures and plots; with `options.rescore` the latter alone.

    Returns:
      What `metrics.json` holds: task name → numbers.
    """
    if options.rescore:
        return outputs.rescore(options)
    distributed.from_first(lambda: outputs.paper_rows(options.paper_rows))  # Note: hours before they are needed.
    mesh = sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=options.fsdp, tensor=options.tensor))
    loaded = loading.load_model(options.checkpoint, mesh, options.step, for_inference=True, quantize=options.quantize)
    system = loaded.meta["data"]["system"]
    programs = Programs(mesh, loaded.cfg.matmul_precision)
    tasks = make_tasks(options, loaded.cfg, loaded.params, loaded.text, system, programs)
    distributed.require_same("benchmarks", {task.name: header_of(task) for task in tasks})
    runner = Runner(options.out, mesh, batch_size=options.batch_size, max_bad_fraction=options.max_bad_fraction,
                    threads=options.threads, num_singles=options.timed_samples)  # fmt: skip
    for task in tasks:
        runner.run(task, {"checkpoint": loaded.identity})
    if jax.process_index() != 0:
        return {}
    title = options.title or pathlib.Path(options.checkpoint).absolute().name
    sources = {task.name: task.source for task in tasks}
    return outputs.write_outputs(options, list(sources), title, lambda name, header: sources[name])
