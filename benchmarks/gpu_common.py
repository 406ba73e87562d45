"""What the cases of `benchmarks/gpu.py` share: options, random arrays on the device, clocks, records."""

from collections.abc import Callable, Iterator, Mapping
import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import math
from pathlib import Path
import platform
import statistics
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.config import ConfigError
from alto_jax.experiment import ExperimentConfig, make_experiment
from alto_jax.main import load_config
from alto_jax.mllm import generate as generation
from alto_jax.mllm.language_model import for_inference
from benchmarks import gpu_profile

ROOT = Path(__file__).resolve().parents[1]
PROFILES: list[Any] = []  # of this process's clocks, with `Options.profile`


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure. size: "8b" (the paper's sizes of all stages) or "debug". before: stacked layers in the token loop
    and XLA's attention. quantize: "", "int8" or "fp8". rounds: of each clock; seconds: how long one lasts at least.
    profile: a file for the kernels of each clock's call. changes: of the stages' configurations, {"a.b": value}."""

    size: str = "8b"
    before: bool = False
    quantize: str = ""
    rounds: int = 5
    seconds: float = 0.05
    profile: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_debug(self) -> bool:
        """Sizes for a CPU."""
        return self.size == "debug"

    @property
    def variant(self) -> str:
        """The table's column."""
        return "before" if self.before else self.quantize or "after"


@dataclasses.dataclass(frozen=True)
class Job:
    """A case that is traced, with nothing on the device yet.

    lowered: programs by name. measure: from the compiled programs to the records, {"case", "ms", …} each.
    fills: shapes that `measure` will have random arrays of (their programs are compiled with the others).
    prepare: the host's work before the measurement, such as reading data. place: instead of this module's (a peer).
    """

    lowered: dict[str, Any]
    measure: Callable[[dict[str, Any]], list[dict[str, Any]]]
    fills: Any = ()
    prepare: Callable[[], Any] = lambda: None
    place: Callable[[], dict[str, Any]] | None = None


def compiled(job: Job) -> dict[str, Any]:
    """The programs of a case, compiled at the same time."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = {name: pool.submit(lowered.compile) for name, lowered in job.lowered.items()}
        fills = pool.submit(fillers, job.fills)
        job.prepare()
        fills.result()
        return {name: future.result() for name, future in found.items()}


def place(programs: dict[str, Any]) -> dict[str, Any]:
    """Where was measured, and how much memory it took: "program_gb" of the largest program by the compiler's account,
    "peak_gb" of the process so far (None where the device does not say)."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    largest = max(map(program_bytes, programs.values()), default=0)
    return {
        "program_gb": round(largest / 1e9, 3),
        "peak_gb": None if peak is None else round(peak / 1e9, 3),
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }


def experiment(file: str, options: Options, changes: dict[str, Any]) -> ExperimentConfig:
    """The configuration "stage2.py:2b" (its debug size if the options ask for it) with `changes` ("train.batch_size").

    Batches come from the built-in scenes, without a system prompt.
    """
    name = file.partition(":")[0] + ":debug" if options.is_debug else file
    values = load_config(str(ROOT / "configs" / name)).to_dict()
    for path, value in {
        "data.num_workers": 0,
        "data.system": None,
        "eval.num_samples": 0,
        **changes,
        **options.changes,
    }.items():
        *groups, field = path.split(".")
        tree: Any = values
        for name in groups:
            tree = None if tree is None else tree.setdefault(name, {})
        if tree is not None:  # Note: else of a part that this stage's model does not have.
            tree[field] = value
    config = make_experiment(values)
    return with_attention(config, "xla") if options.before else config


def with_attention(config: Any, value: str) -> Any:
    """A configuration with `attention` set in every group that has such a field."""
    changes = {f.name: with_attention(getattr(config, f.name), value) for f in dataclasses.fields(config)
               if dataclasses.is_dataclass(getattr(config, f.name))}  # fmt: skip
    if any(f.name == "attention" for f in dataclasses.fields(config)):
        changes["attention"] = value
    return dataclasses.replace(config, **changes) if changes else config


def language_params(cfg: Any, shapes: Any, options: Options) -> Any:
    """Shapes of the language model's parameters as its token loop is given them.

    Raises:
      ConfigError: a quantization that this version does not know.
    """
    if options.before:
        return jax.eval_shape(lambda p: jax.tree.map(lambda a: a.astype(cfg.dtype), p), shapes)
    chosen = {}
    if options.quantize:
        if "quantize" not in inspect.signature(for_inference).parameters:
            raise ConfigError(f"--quantize={options.quantize}: this version's for_inference does not quantize")
        chosen = {"quantize": options.quantize}
    return jax.eval_shape(functools.partial(for_inference, cfg, **chosen), shapes)


@contextlib.contextmanager
def token_loop(options: Options) -> Iterator[None]:
    """While a function is traced in this block: with `before`, the loop of tokens takes stacked layers as they are."""
    if not options.before:
        yield
        return
    same = {"for_inference": lambda cfg, params, *_: params, "unstacked": lambda tree, num_layers: tree}
    with mock.patch.multiple(generation, **same):
        yield


def _kind(path: tuple, leaf: Any, quantized: set[tuple]) -> str:
    """What fills a leaf: "normal", "ones" (scales of norms, factors of branches), "whole" (numbers of 8 bits) or
    "steps" (what one of these stands for, in the leaves beside them)."""
    if leaf.dtype.itemsize == 1:
        return "whole"
    if path[:-1] in quantized:
        return "steps"
    name = str(getattr(path[-1], "key", "")) if path else ""
    return "ones" if name in ("scale", "ls1", "ls2") else "normal"


@functools.cache
def _filler(kind: str, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """A program seed → array."""
    size = math.prod(shape)

    def draw(seed: jax.Array) -> jax.Array:
        # Note: a part is drawn and repeated, since the generator's own arrays are larger than what becomes of them.
        key, part = jax.random.key(seed, impl="rbg"), (min(size, 2**24),)
        if kind == "whole":
            block = jax.random.randint(key, part, -127, 128, jnp.int32)
        elif kind == "normal":
            block = 0.02 * jax.random.normal(key, part)
        else:
            block = jax.random.uniform(key, part, minval=0.9, maxval=1.1) * (1.0 if kind == "ones" else 2.5e-4)
        block = block.astype(dtype)
        repeated = jnp.broadcast_to(block, (-(-size // block.size), block.size)).reshape(-1)
        return repeated[:size].reshape(shape)

    if jax.default_backend() == "cpu":  # Note: debug sizes, of which a compilation would take longer.
        return lambda seed: jax.device_put(_drawn_by_host(kind, shape, dtype, seed), sharding)
    shardings = {} if sharding is None else {"out_shardings": sharding}
    return jax.jit(draw, **shardings).lower(jnp.uint32(0)).compile()


def _drawn_by_host(kind: str, shape: tuple[int, ...], dtype: Any, seed: np.uint32) -> np.ndarray:
    """As `_filler`, by numpy."""
    rng = np.random.default_rng(int(seed))
    if kind == "whole":
        return rng.integers(-127, 128, shape).astype(dtype)
    if kind == "normal":
        return (0.02 * rng.standard_normal(shape)).astype(dtype)
    return (rng.uniform(0.9, 1.1, shape) * (1.0 if kind == "ones" else 2.5e-4)).astype(dtype)


def fillers(shapes: Any) -> list[tuple[Any, Any]]:
    """[(compiled program of a random array, its leaf)] of all leaves; equal leaves share a program."""
    flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
    quantized = {path[:-1] for path, leaf in flat if leaf.dtype.itemsize == 1}
    return [(_filler(_kind(path, leaf, quantized), leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)), leaf)
            for path, leaf in flat]  # fmt: skip


def filled(shapes: Any) -> Any:
    """Random arrays of these shapes, made on the device: never zeros, on which matrix products run faster."""
    arrays = [program(np.uint32(seed)) for seed, (program, _) in enumerate(fillers(shapes))]
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def zeros(shapes: Any) -> Any:
    """Arrays of zeros on the device."""

    def make(leaf: Any) -> jax.Array:
        return jnp.zeros(leaf.shape, leaf.dtype, device=getattr(leaf, "sharding", None))

    return jax.tree.map(make, shapes)


def timed(call: Callable[[], Any], options: Options, wait: Callable[[Any], Any] = jax.block_until_ready) -> dict:
    """{"ms", "ms_min", "ms_max"} of one call: median and range of rounds, each of enough calls for `options.seconds`.

    A round's calls are sent to the device one after the other and waited for at its end.
    """
    wait(call())
    began = time.perf_counter()
    wait(call())
    number = min(max(math.ceil(options.seconds / (time.perf_counter() - began)), 1), 100)
    found = []
    for _ in range(options.rounds):
        began = time.perf_counter()
        for _ in range(number):
            result = call()
        wait(result)
        found.append((time.perf_counter() - began) / number * 1e3)
    if options.profile:
        PROFILES.append(gpu_profile.traced(call, wait))
    return {"ms": statistics.median(found), "ms_min": min(found), "ms_max": max(found)}


def program_bytes(compiled: Any) -> int:
    """Device memory of one run of a program: what it is given, returns and needs in between."""
    analysis = compiled.memory_analysis()
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + new + analysis.temp_size_in_bytes
