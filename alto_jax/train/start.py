"""The state at the start of a run: its shapes and shardings, then fresh parameters or those of a checkpoint."""

import dataclasses
import pathlib
import re
from typing import Any

from flax import traverse_util
import jax

from alto_jax.checkpoint import loading, runs
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


def initial_state(
    config: ExperimentConfig, stage: Stage, optimizer: Any, abstract: TrainState, mesh: Any
) -> TrainState:
    """The state at step 0: parameters of the start checkpoint where the stage inherits them, fresh ones elsewhere.

    Raises:
      FileNotFoundError: the start checkpoint is missing; the message says which command makes it.
      ValueError: it lacks parameters that the stage needs (with adapters: any).
    """
    key = jax.random.key(config.seed)
    fresh_shapes = jax.eval_shape(stage.init, key)
    flat_shapes = traverse_util.flatten_dict(fresh_shapes, sep="/")
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
            wanted = {
                p: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=_sharding(p, v, mesh))
                for p, v in flat_shapes.items()
                if p.split("/")[0] in stage.inherits and not (stage.reset and re.search(stage.reset, p))
            }
            places = [(config.init_from, wanted)]
            if config.tokenizer_from:
                tokenizer = {p: v for p, v in wanted.items() if p.startswith("tokenizer/")}
                others = {p: v for p, v in wanted.items() if p not in tokenizer}
                places = [(config.init_from, others), (config.tokenizer_from, tokenizer)]
            for place, chosen in places:
                loaded = runs.load_params(place, traverse_util.unflatten_dict(chosen, sep="/"))
                inherited |= traverse_util.flatten_dict(loaded, sep="/")
            needed = stage.inherits if config.lora.rank else stage.requires
            missing = [p for p in wanted if p not in inherited and p.split("/")[0] in needed]
            if missing:
                expected = "a complete base for its adapters" if config.lora.rank else f"a run of: {stage.previous}"
                raise ValueError(
                    f"config.init_from: {config.init_from} lacks {len(missing)} parameters that {config.stage} needs,"
                    f" such as {missing[0]}; expected {expected}"
                )

    def fresh(key: jax.Array) -> dict[str, jax.Array]:
        flat = traverse_util.flatten_dict(stage.init(key), sep="/")
        return {p: v for p, v in flat.items() if p not in inherited}

    shardings = {p: _sharding(p, v, mesh) for p, v in flat_shapes.items() if p not in inherited}
    created = jax.jit(fresh, out_shardings=shardings)(key)
    params = traverse_util.unflatten_dict({**created, **inherited}, sep="/")
    finish = jax.jit(
        lambda params, key: _complete(config, stage, optimizer, params, key),
        out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
    )
    return finish(params, key)


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

    Raises:
      ValueError: no checkpoint can be read, or the base of a run of adapters is not the one that it began with.
    """
    if not config.lora.rank:
        return checkpointer.restore(abstract, iterator)
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
    file.write_text(text + "\n")
