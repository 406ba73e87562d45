"""The state at the start of a run: its shapes and shardings, then fresh parameters or those of a checkpoint."""

from collections.abc import Collection
import dataclasses
import os
import pathlib
import re
from typing import Any
import warnings

from flax import traverse_util
import jax
import jax.numpy as jnp

from alto_jax import cli
from alto_jax.checkpoint import loading, runs
from alto_jax.config import ConfigError, write_whole
from alto_jax.experiment import ExperimentConfig
from alto_jax.lora import adapters
from alto_jax.parallel import sharding
from alto_jax.params import merge_params
from alto_jax.stages.stage import Stage
from alto_jax.train.state import TrainState, create_state


def _complete(config: ExperimentConfig, stage: Stage, optimizer: Any, params: dict, key: jax.Array) -> TrainState:
    """The state of given parameters: what the stage adds, adapters, optimizer state."""
    if stage.finish_init is not None:
        params = stage.finish_init(params)
    if config.lora.rank:
        params = merge_params(params, adapters.make_adapters(params, config.lora, jax.random.fold_in(key, 3)))
    return create_state(params, config.trainable, optimizer, stage.init_stats(), config.optim)


def abstract_state(config: ExperimentConfig, stage: Stage, optimizer: Any, mesh: Any) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing."""
    shapes = jax.eval_shape(
        lambda key: _complete(config, stage, optimizer, stage.init(key), key), jax.random.key(config.seed)
    )
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


@dataclasses.dataclass(frozen=True)
class Beginning:
    """How the state at step 0 is made without ever being there twice: from parameters in the types that the state has
    them in, whose memory becomes the state's.

    Attributes:
      wanted: {"a/b/c": ShapeDtypeStruct} of the parameters as they are first made or read, with their shardings.
      fresh: jitted `(key) -> {"a/b/c": array}` of those that are not inherited.
      complete: jitted `(params, key) -> TrainState`, of all of them as nested dicts; the arrays are donated.
    """

    wanted: dict[str, Any]
    fresh: Any
    complete: Any


def beginning(
    config: ExperimentConfig, stage: Stage, optimizer: Any, abstract: TrainState, mesh: Any, inherited: Collection[str]
) -> Beginning:
    """The programs of the state at step 0; inherited: paths of the parameters that a checkpoint gives."""
    shapes = traverse_util.flatten_dict(jax.eval_shape(stage.init, jax.random.key(config.seed)), sep="/")
    final = traverse_util.flatten_dict(abstract.all_params(), sep="/")
    # Note: what the stage makes of the parameters (the reference of GRPO) may have a wider type than they have.
    made = [leaf.dtype for path, leaf in final.items() if path not in shapes and "/lora_" not in path]
    wanted = {
        path: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.result_type(final[path].dtype, *made) if path in final else leaf.dtype,
            sharding=_sharding(path, leaf, mesh),
        )
        for path, leaf in shapes.items()
    }

    def fresh(key: jax.Array) -> dict[str, jax.Array]:
        flat = traverse_util.flatten_dict(stage.init(key), sep="/")
        return {p: v.astype(wanted[p].dtype) for p, v in flat.items() if p not in inherited}

    quickly = _quick_compilation(mesh)
    return Beginning(
        wanted,
        jax.jit(
            fresh,
            out_shardings={p: leaf.sharding for p, leaf in wanted.items() if p not in inherited},
            compiler_options=quickly,
        ),
        jax.jit(
            lambda params, key: _complete(config, stage, optimizer, params, key),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
            donate_argnums=0,
            compiler_options=quickly,
        ),
    )


def _quick_compilation(mesh: Any) -> dict[str, Any] | None:
    """Compiler options for programs that run once: on a CPU, optimizing what draws each parameter takes far longer than
    it saves, and changes no bit. What XLA_FLAGS says of it holds."""
    name = "xla_backend_optimization_level"
    if mesh.devices.flat[0].platform != "cpu" or name in os.environ.get("XLA_FLAGS", ""):
        return None
    return {name: 1}


def inherited_paths(stage: Stage, paths: Collection[str]) -> set[str]:
    """Those of the parameters that the stage takes from its start checkpoint, where that has them."""
    return {p for p in paths if p.split("/")[0] in stage.inherits and not (stage.reset and re.search(stage.reset, p))}


def initial_state(
    config: ExperimentConfig, stage: Stage, optimizer: Any, abstract: TrainState, mesh: Any
) -> TrainState:
    """The state at step 0: parameters of the start checkpoint where the stage inherits them, fresh ones elsewhere.

    Raises:
      FileNotFoundError: the start checkpoint is missing; the message says which command makes it.
      ValueError: it lacks parameters that the stage needs (with adapters: any).
    """
    key = jax.random.key(config.seed)
    inherited: dict = {}
    if config.lora.rank and not config.init_from:
        raise FileNotFoundError(
            "config.init_from: adapters (config.lora.rank > 0) need a base; give the run's directory"
        )
    if stage.inherits:
        if not config.init_from and stage.requires:
            raise FileNotFoundError(
                f"config.init_from: {config.stage} starts from an earlier stage's run; give --config.init_from=DIR,"
                f" made by: {stage.previous}"
            )
        if config.init_from:
            runs.find_run(config.init_from, made_by=stage.previous)
            if config.tokenizer_from:
                runs.find_run(config.tokenizer_from, made_by=stage.previous)
            all_wanted = beginning(config, stage, optimizer, abstract, mesh, ()).wanted
            paths = inherited_paths(stage, all_wanted)
            wanted = {p: leaf for p, leaf in all_wanted.items() if p in paths}
            places = [(config.init_from, wanted)]
            if config.tokenizer_from:
                tokenizer = {p: v for p, v in wanted.items() if p.startswith("tokenizer/")}
                others = {p: v for p, v in wanted.items() if p not in tokenizer}
                places = [(config.init_from, others), (config.tokenizer_from, tokenizer)]
            for place, chosen in places:
                loaded = loading.load_in_parts(place, traverse_util.unflatten_dict(chosen, sep="/"))
                inherited |= traverse_util.flatten_dict(loaded, sep="/")
            needed = stage.inherits if config.lora.rank else stage.requires
            missing = [p for p in wanted if p not in inherited and p.split("/")[0] in needed]
            if missing:
                expected = "a complete base for its adapters" if config.lora.rank else f"a run of: {stage.previous}"
                raise ValueError(
                    f"config.init_from: {config.init_from} lacks {len(missing)} parameters that {config.stage} needs,"
                    f" such as {missing[0]}; expected {expected}"
                )

    begin = beginning(config, stage, optimizer, abstract, mesh, inherited)
    created = begin.fresh(key)
    params = traverse_util.unflatten_dict({**created, **inherited}, sep="/")
    del created, inherited  # so that nothing but the state holds them
    with warnings.catch_warnings():
        # Note: where types differ, an array cannot become one of the state, and is given up all the same.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return begin.complete(params, key)


def _sharding(path: str, leaf: Any, mesh: Any) -> Any:
    return jax.sharding.NamedSharding(mesh, sharding.param_spec(path, leaf.shape, mesh))


def restored_state(
    config: ExperimentConfig,
    stage: Stage,
    optimizer: Any,
    abstract: TrainState,
    mesh: Any,
    checkpointer: runs.Checkpointer,
    iterator: Any,
) -> TrainState:
    """The state of the newest readable checkpoint; the iterator moves to its place in the data.

    Frozen parameters that cannot be read any more are made again as the run began with them.

    Raises:
      ValueError: no checkpoint can be read, or the frozen parameters, or the base of a run of adapters, are damaged and
        not those that it began with.
    """
    if not config.lora.rank:
        try:
            return checkpointer.restore(abstract, iterator)
        except runs.FrozenDamaged as error:
            damaged = error
        if jax.process_index() == 0:
            cli.tell(f"warning: {damaged}; making them again, as at the run's start")
        try:
            frozen = initial_state(config, stage, optimizer, abstract, mesh).frozen
            return checkpointer.restore(abstract, iterator, frozen=frozen)
        except (OSError, ValueError) as error:
            why = error.why if isinstance(error, runs.FrozenDamaged) else error
            raise ConfigError(f"{damaged}, nor made again from config.init_from: {why}") from error
    meta = runs.load_meta(checkpointer.directory)
    now = loading.adapter_meta(config)
    if now["base_identity"] != meta.get("base_identity"):
        raise ValueError(
            f"config.init_from: the base of these adapters was {meta.get('base')} at {meta.get('base_identity')},"
            f" now it is {now['base']} at {now['base_identity']}"
        )
    base = initial_state(config, stage, optimizer, abstract, mesh)
    saved = checkpointer.restore(dataclasses.replace(abstract, frozen={}), iterator)
    return dataclasses.replace(saved, frozen=base.frozen)


def write_overview(file: pathlib.Path, state: TrainState) -> None:
    """Writes the table of parameters (name, shape, size) and which part is trained."""
    from clu import parameter_overview  # late: slow to start, and only process 0 needs it

    parts = [("trainable", state.params), ("frozen", state.frozen)]
    text = "\n\n".join(
        f"{name}: {parameter_overview.count_parameters(tree):,} parameters\n"
        + parameter_overview.get_parameter_overview(tree, include_stats=False)
        for name, tree in parts
        if tree
    )
    write_whole(file, text + "\n")
