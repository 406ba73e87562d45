"""What must not change what is learned: mesh, micro-batches, packed rows, attention, the cache of a rollout.

    python tests/invariants/trajectories.py [--full] [--stages stage1,stage2] [--steps 3]

Every stage at its smallest size (float32, eight virtual CPU devices in one process) takes updates from one state on one
stream of data: plainly (one device, rows of their own, XLA's attention), then on a mesh, and with everything changed at
once, or, with --full, in every combination. The vocabulary is odd, as the published ones are. Compared are every loss,
and Adam's weighted sum of all gradients after the last step, relative to their norm. Prints a Markdown table; exits
with 1 if a figure exceeds the tolerance.
"""

import argparse
from collections.abc import Iterator
import dataclasses
import itertools
import os
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests import compiler_flags  # noqa: E402

DEVICES = 8
# Note: fixed, whatever the tests were started with, since the compiler's choices of collectives are recorded.
os.environ["XLA_FLAGS"] = " ".join([f"--xla_force_host_platform_device_count={DEVICES}", *compiler_flags.taken()])
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from alto_jax.attention import seam, splash  # noqa: E402
from alto_jax.experiment import ExperimentConfig  # noqa: E402
from alto_jax.parallel import sharding  # noqa: E402
from alto_jax.stages.table import make_stage  # noqa: E402
from alto_jax.train import loop  # noqa: E402
from alto_jax.train.state import TrainState, create_state, make_optimizer  # noqa: E402
from tests.parallel.stages_on_processes import STAGES, config_of  # noqa: E402

ROWS = 16
TOLERANCE = 1e-5
LOSS_SCALE = {"stage3": 1.0}  # Of the terms that a loss sums, where they cancel.


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to compute the same: mesh, micro-batches, conversations in a row (stage 2), attention, and what a rollout
    does (stage 3): type of the cache, and whether a group's prompt is computed once."""

    mesh: tuple[int, int, int] = (1, 1, 1)
    accumulate: int = 1
    pack: int = 1
    attention: str = "xla"
    cache_dtype: str = "model"
    share_prompt: bool = True

    def __str__(self) -> str:
        changed = [f"{f.name} {getattr(self, f.name)}" for f in dataclasses.fields(self)
                   if getattr(self, f.name) != f.default]  # fmt: skip
        return ", ".join(changed) or "plain"


def everything(stage: str) -> Case:
    """All that a stage has, changed at once."""
    case = Case((2, 2, 2), accumulate=2)
    if stage == "stage2":
        return dataclasses.replace(case, pack=2)
    if stage == "stage3":
        return dataclasses.replace(case, accumulate=1, cache_dtype="float32", share_prompt=False)
    return case


def short_cases(stage: str) -> list[Case]:
    """A mesh alone, and all that a stage has."""
    return [Case((2, 2, 2)), everything(stage)]


def all_cases(stage: str) -> Iterator[Case]:
    """Every combination that a stage has."""
    meshes = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 1))
    packs = (1, 2) if stage == "stage2" else (1,)
    caches = ("model", "float32") if stage == "stage3" else ("model",)
    shared = (True, False) if stage == "stage3" else (True,)
    accumulate = (1, 2) if stage != "stage3" else (1,)
    attention = ("xla", "flash") if stage in ("stage2", "stage3") else ("xla",)
    for values in itertools.product(meshes, accumulate, packs, attention, caches, shared):
        case = Case(*values)
        divides = ROWS // case.pack % (case.accumulate * case.mesh[0] * case.mesh[1]) == 0
        # Note: the kernel in the interpreter takes minutes on eight devices.
        if case != Case() and divides and (case.attention == "xla" or case.mesh == (1, 1, 1)):
            yield case


def configured(stage: str, case: Case) -> ExperimentConfig:
    """The configuration of a case; its batch has ROWS rows, or as many conversations packed."""
    config = config_of(stage, case.mesh, "", case.accumulate, case.pack, ROWS)
    model = config.model
    if model.language_model is not None:
        language = dataclasses.replace(model.language_model, attention=case.attention)
        model = dataclasses.replace(model, language_model=language)
    generate = dataclasses.replace(config.grpo.generate, cache_dtype=case.cache_dtype, share_prompt=case.share_prompt)
    return dataclasses.replace(config, model=model, grpo=dataclasses.replace(config.grpo, generate=generate))


def with_odd_vocabulary(config: ExperimentConfig) -> ExperimentConfig:
    """No axis divides the embedding's and the head's rows."""
    language = config.model.language_model
    if language is None:
        return config
    language = dataclasses.replace(language, vocab_size=language.vocab_size // 2 * 2 + 1)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, language_model=language))


def first_state(config: ExperimentConfig) -> TrainState:
    """The state at step 0, made on one device and kept on the host."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
    stage, optimizer = make_stage(config, mesh), make_optimizer(config.optim, config.train.steps)

    def start(key: jax.Array) -> TrainState:
        params = stage.init(key)
        params = params if stage.finish_init is None else stage.finish_init(params)
        return create_state(params, config.trainable, optimizer, stage.init_stats(), config.optim)

    return jax.device_get(jax.jit(start)(jax.random.key(config.seed)))


def run(config: ExperimentConfig, first: TrainState, steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Every loss, and Adam's first moments after the last step by path, of a run from `first`."""
    sizes = config.mesh
    mesh = sharding.make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])
    stage, optimizer = make_stage(config, mesh), make_optimizer(config.optim, config.train.steps)
    shardings = sharding.tree_shardings(first, mesh)
    state = jax.device_put(first, shardings)
    step = loop.make_step(config, stage, optimizer, shardings)
    rollout = loop.make_rollout(config, stage) if stage.rollout is not None else None
    iterator, losses = stage.data(sharding.batch_share(mesh)), []
    for _ in range(steps):
        batch = sharding.put_batch(next(iterator), mesh, config.train.batch_size)
        batch = batch if rollout is None else rollout(state, batch)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    named = {sharding.param_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    return losses, {path: np.asarray(leaf, np.float64) for path, leaf in named.items() if "/mu/" in path}


def differences(stage: str, cases: list[Case], steps: int) -> Iterator[tuple[Case, float, float]]:
    """(case, largest difference of a loss, that of the gradients) of each case from the plain one, all relative."""
    plain = with_odd_vocabulary(configured(stage, Case()))
    first = first_state(plain)
    losses, moments = run(plain, first, steps)
    norm = lambda arrays: float(np.sqrt(sum(np.sum(np.square(array)) for array in arrays)))
    assert norm(moments.values()) > 0
    for case in cases:
        found, gradients = run(with_odd_vocabulary(configured(stage, case)), first, steps)
        scale = [max(abs(loss), LOSS_SCALE.get(stage, 1e-12)) for loss in losses]
        loss = max(abs(a - b) / s for a, b, s in zip(found, losses, scale, strict=True))
        yield case, loss, norm([gradients[path] - moments[path] for path in moments]) / norm(moments.values())


def interpreted(q: Any, k: Any, mask: Any) -> tuple[Any, str]:
    """In the place of `seam._kernel`: the TPU's kernel in Pallas's interpreter."""
    why_not = splash.why_not(q, k, mask)
    kernel = lambda *arguments: splash.attention(*arguments, interpret=True)
    return (None, why_not) if why_not else (kernel, "")


def main() -> int:
    """Parses the command line, compares, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every combination, instead of two")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    seam._kernel = interpreted
    worst = 0.0
    print("| stage | what is changed | every loss | sum of all gradients |\n|---|---|---|---|", flush=True)
    for stage in options.stages.split(","):
        cases = list(all_cases(stage)) if options.full else short_cases(stage)
        for case, loss, gradients in differences(stage, cases, options.steps):
            worst = max(worst, loss, gradients)
            print(f"| {stage} | {case} | {loss:.1e} | {gradients:.1e} |", flush=True)
    print(f"worst {worst:.1e}, tolerance {TOLERANCE:.0e}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
