"""Speed and memory on one GPU: decoding, prefill, whole answers, the encoders, each stage's step; one table.

    python benchmarks/gpu.py --out=FILE.jsonl [--cases=copy,decode1,...] [--before] [--quantize=int8] [--peer=...]
    python benchmarks/gpu.py --table benchmarks/results/gpu_before.jsonl FILE.jsonl... [--write]

Cases: copy (the card's ceilings), decode1, decode12, prefill1, prefill12, answer1, answer12, vit1, vit12, sam1, sam12,
masks1, masks12 (the number: rows at once), stage2_2b_cached, stage2_2b, stage3_8b_lora, stage1_base. `--before`
measures the same tree with XLA's attention and a token loop over stacked layers. `--peer=transformers` measures the
peer's same shapes too (cases peer_...; needs `pip install torch transformers`; peer_decode_compiled, which takes
minutes, by name only). `--size=debug` runs every case on a CPU in a minute: a check of this program, not a result.

Every case runs in a process of its own, since an allocator's peak never resets and a process that failed or holds
memory must not touch the next case. Up to `--parallel` of them trace and compile at the same time, none while another
is measured; they are then measured one by one while the next ones start and trace, on the host. Compilers try kernels
on the card, and several at once may take a slower one: --parallel=1 is for a last check (and for a case that needs
nearly all of the memory). --parallel=0: all in this process, without memory peaks. Records are written as soon as
they are there; a case that fails leaves a record with its error, and the others go on.
"""

import argparse
import ast
import contextlib
import datetime
import gc
import json
import math
import multiprocessing
from multiprocessing import connection
import os
from pathlib import Path
import re
import sys
import time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from alto_jax import cli  # noqa: E402
from alto_jax.config import ConfigError  # noqa: E402
from benchmarks import gpu_table  # noqa: E402

# In this order, so that cases which need most of the memory come when no other process is left.
CASES = (
    "copy", *(f"{name}{rows}" for name in ("decode", "prefill", "answer", "vit", "sam", "masks") for rows in (1, 12)),
    "stage2_2b_cached", "stage3_8b_lora", "stage2_2b", "stage1_base",
)  # fmt: skip
QUANTIZED = re.compile(r"(decode|prefill|answer)\d+|stage3_8b_lora")  # what the type of the weights changes
WITH_PEER = re.compile(r"(decode|prefill|vit|sam|masks)\d+")
PEERS = (*(f"peer_{name}" for name in CASES if WITH_PEER.fullmatch(name)), "peer_decode_compiled")


def make_job(name: str, options: Any) -> Any:
    """The traced case `name`."""
    # late: a process's settings come before JAX
    if name in PEERS:
        from benchmarks import gpu_peers

        return gpu_peers.make(name.removeprefix("peer_"), options)
    if name.startswith("stage"):
        from benchmarks import gpu_training

        makers = {"stage2_2b": gpu_training.stage2, "stage1_base": gpu_training.stage1,
                  "stage3_8b_lora": gpu_training.stage3, "stage2_2b_cached": gpu_training.stage2_cached}  # fmt: skip
        return makers[name](options)
    from benchmarks import gpu_inference

    found = re.fullmatch(r"([a-z]+)(\d*)", name)
    assert found is not None
    return getattr(gpu_inference, found[1])(options, int(found[2] or 1))


class Case:
    """A case on its way: traced when made, then compiled, then measured."""

    def __init__(self, name: str, settings: dict[str, Any]):
        from benchmarks.gpu_common import Options  # late: a process's settings come before JAX

        began = time.perf_counter()
        self._name, self._options = name, Options(**settings)
        self._job = make_job(name, self._options)
        self.seconds = {"lower_s": round(time.perf_counter() - began, 1)}
        self._compiled: dict[str, Any] = {}

    def compile(self) -> None:
        """Compiles all programs, and makes what the host gives to them."""
        from benchmarks import gpu_common  # late: as above

        began = time.perf_counter()
        self._compiled = gpu_common.compiled(self._job)
        self.seconds["compile_s"] = round(time.perf_counter() - began, 1)

    def measure(self, *, alone: bool) -> list[dict[str, Any]]:
        """The records of the case; with the peak of the device's memory if the process is the case's own."""
        from benchmarks import gpu_common  # late: as above

        began = time.perf_counter()
        records = self._job.measure(self._compiled)
        if self._options.profile:
            self._write_profiles(self._options.profile)
        seconds = self.seconds | {"measure_s": round(time.perf_counter() - began, 1)}
        place = self._job.place() if self._job.place else gpu_common.place(self._compiled)
        peak = place.pop("peak_gb")
        place |= {"peak_gb": peak} if alone and peak is not None else {}
        variant = "peer" if self._name in PEERS else self._options.variant
        changes = {"set": self._options.changes} if self._options.changes else {}
        return [{"case": r["case"], "variant": variant, **r, **place, **changes, **seconds} for r in records]

    def _write_profiles(self, file: str) -> None:
        """Appends what the clocks of this case traced."""
        from benchmarks import gpu_common, gpu_profile  # late: as above

        origin = gpu_profile.origins(self._compiled)
        with open(file, "a") as out:
            for number, events in enumerate(gpu_common.PROFILES):
                print(*gpu_profile.report(f"{self._name}, clock {number}", events, origin), "", sep="\n", file=out)
        gpu_common.PROFILES.clear()


def one_line(error: BaseException) -> str:
    """An error's type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _child(pipe: Any, name: str, settings: dict[str, Any], lower_only: bool) -> None:
    """The life of a case's own process."""
    try:
        case = Case(name, settings)
        pipe.send(("lowered", case.seconds))
        if lower_only:
            return
        pipe.recv()
        case.compile()
        pipe.send(("compiled", case.seconds))
        pipe.recv()
        pipe.send(("measured", case.measure(alone=True)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this case's result
        pipe.send(("error", one_line(error)))


class Runner:
    """Runs cases in processes of their own, see the module's docstring."""

    def __init__(self, settings: dict[str, Any], parallel: int, deadline: float, write: Any, lower_only: bool = False):
        self._settings, self._parallel, self._deadline = settings, parallel, deadline
        self._write, self._lower_only = write, lower_only
        self._processes: dict[Any, tuple[str, Any]] = {}

    def run(self, names: list[str]) -> None:
        """All cases, in waves of `parallel`."""
        waves = [names[i : i + self._parallel] for i in range(0, len(names), self._parallel)]
        try:
            begun: dict[int, list[Any]] = {}
            for index, wave in enumerate(waves):
                pipes = self._expect(begun[index] if index in begun else self._start(wave), "lowered")
                if self._lower_only:
                    continue
                pipes = self._expect(self._tell(pipes), "compiled")
                if self._parallel > 1 and index + 1 < len(waves):
                    begun[index + 1] = self._start(waves[index + 1])
                for pipe in pipes:
                    self._expect(self._tell([pipe]), "measured")
        finally:
            for _, process in self._processes.values():
                process.kill()

    def _start(self, names: list[str]) -> list[Any]:
        context, pipes = multiprocessing.get_context("spawn"), []
        for name in names:
            if time.monotonic() > self._deadline:
                self._write({"case": name, "error": "not begun within --budget_s"})
                continue
            ours, theirs = context.Pipe()
            arguments = theirs, name, self._settings, self._lower_only
            process = context.Process(target=_child, args=arguments)
            process.start()
            theirs.close()
            self._processes[ours] = name, process
            pipes.append(ours)
        return pipes

    def _tell(self, pipes: list[Any]) -> list[Any]:
        for pipe in pipes:
            with contextlib.suppress(OSError):  # Note: of one that has died, which `_expect` then finds.
                pipe.send("go on")
        return pipes

    def _expect(self, pipes: list[Any], what: str) -> list[Any]:
        """The pipes of those that got so far, when all have or have failed; what they measured is written."""
        waiting, good = list(pipes), []
        while waiting:
            left = max(self._deadline - time.monotonic(), 0)
            ready = connection.wait(waiting, None if left == math.inf else left)
            for pipe in ready or list(waiting):
                waiting.remove(pipe)
                name, process = self._processes[pipe]
                try:
                    said, value = pipe.recv() if ready else ("error", "not finished within --budget_s")
                except (EOFError, OSError):
                    process.join()
                    said, value = "error", f"the process ended with {process.exitcode}"
                if said == "error":
                    self._write({"case": name, "error": value})
                    process.kill()
                elif said == "measured":
                    for record in value:
                        self._write(record)
                elif self._lower_only:
                    self._write({"case": name, "lowered": True, **value})
                if said == what:
                    good.append(pipe)
                if said != what or what == "measured" or self._lower_only:
                    process.join()
                    del self._processes[pipe]
        return good


def run_here(names: list[str], settings: dict[str, Any], deadline: float, write: Any, lower_only: bool) -> None:
    """All cases in this process, one after the other."""
    for name in names:
        if time.monotonic() > deadline:
            write({"case": name, "error": "not begun within --budget_s"})
            continue
        try:
            case = Case(name, settings)
            if lower_only:
                write({"case": name, "lowered": True, **case.seconds})
                continue
            case.compile()
            for record in case.measure(alone=False):
                write(record)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next cases go on
            write({"case": name, "error": one_line(error)})
        finally:
            case = None  # Note: its arrays and programs are gone before the next one's are made.
            gc.collect()


def chosen_cases(text: str, quantize: str, peer: str) -> list[str]:
    """The cases of --cases and --peer, those of the peer last.

    Raises:
      ConfigError: an unknown case, or one that --quantize does not change.
    """
    names = text.split(",")
    if text == "all":
        names = [name for name in CASES if not quantize or QUANTIZED.fullmatch(name)]
    unknown = [name for name in names if name not in CASES + PEERS]
    if unknown:
        raise ConfigError(f"--cases={text}: unknown case {unknown[0]!r}; known: {', '.join(CASES + PEERS)}")
    same = [name for name in names if quantize and not QUANTIZED.fullmatch(name)]
    if same:
        raise ConfigError(f"--cases={text}: {same[0]} is the same with --quantize={quantize}")
    if peer:
        names += [f"peer_{name}" for name in names if WITH_PEER.fullmatch(name)]
    return [name for name in dict.fromkeys(names) if name in CASES] + [
        name for name in dict.fromkeys(names) if name in PEERS
    ]


def changed_fields(texts: list[str]) -> dict[str, Any]:
    """{"a.b": value} of texts "a.b=VALUE", VALUE a Python literal or a word.

    Raises:
      ConfigError: a text without "=".
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected a.b=VALUE")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="all", help="with commas (default: all but the peer's)")
    parser.add_argument("--out", metavar="FILE.jsonl", help="records are appended to it")
    parser.add_argument("--before", action="store_true", help="XLA's attention, a token loop over stacked layers")
    parser.add_argument("--quantize", choices=("int8", "fp8"), default="", help="the language model's weights")
    parser.add_argument("--peer", choices=("transformers",), default="", help="measure the peer's same shapes as well")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="a.b=VALUE", help="fields of the stages' configurations"
    )
    parser.add_argument("--size", choices=("8b", "debug"), default="8b")
    parser.add_argument("--budget_s", type=float, default=math.inf, metavar="N", help="what is not done then fails")
    parser.add_argument("--parallel", type=int, metavar="N", help="processes that compile at once (9; debug: 0)")
    parser.add_argument("--rounds", type=int, default=5, help="of each clock; the median counts")
    parser.add_argument(
        "--profile", metavar="FILE.txt", default="", help="append each case's kernels and their times to it"
    )
    parser.add_argument("--lower_only", action="store_true", help="only trace every case: needs no GPU and no memory")
    parser.add_argument("--table", nargs="+", metavar="FILE.jsonl", help="print the table of these records instead")
    parser.add_argument("--write", action="store_true", help="with --table: also as benchmarks/results/gpu.md")
    options = parser.parse_args(arguments)
    if options.table:
        text = gpu_table.table(gpu_table.read(options.table))
        print(text)
        if options.write:
            gpu_table.write(ROOT / "benchmarks" / "results" / "gpu.md", text)
        return 0
    if not options.out:
        raise ConfigError("--out is required: the file that records are appended to")
    if options.rounds < 1:
        raise ConfigError(f"--rounds={options.rounds}: expected at least 1")
    if options.before and options.quantize:
        raise ConfigError(f"--quantize={options.quantize}: not with --before")
    names = chosen_cases(options.cases, options.quantize, options.peer)
    cli.check_outputs({"--out": (options.out, (".jsonl",))})
    deadline = time.monotonic() + options.budget_s
    is_debug = options.size == "debug"
    parallel = options.parallel if options.parallel is not None else 0 if is_debug else 9
    command = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    common = {"size": options.size, "date": datetime.date.today().isoformat(), "command": command}
    failed = []

    with open(options.out, "a") as file:

        def write(record: dict[str, Any]) -> None:
            variant = "peer" if record["case"] in PEERS else "before" if options.before else options.quantize or "after"
            file.write(json.dumps({"case": record["case"], "variant": variant, **record, **common}) + "\n")
            file.flush()
            failed.append("error" in record)
            print(gpu_table.line({"variant": variant, **record}), flush=True)

        settings = {"size": options.size, "before": options.before, "quantize": options.quantize,
                    "rounds": options.rounds, "seconds": 0.0 if is_debug else 0.05,
                    "profile": options.profile, "changes": changed_fields(options.set)}  # fmt: skip
        if options.profile:  # Note: kernels launched together as a graph do not say where they come from.
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
        if parallel == 0:
            run_here(names, settings, deadline, write, options.lower_only)
        else:
            # Note: several processes share the card, unless each is alone; then one may have nearly all of it.
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true" if parallel == 1 else "false")
            if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
                os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
            Runner(settings, parallel, deadline, write, options.lower_only).run(names)
    return int(any(failed))


if __name__ == "__main__":
    cli.run(main)
