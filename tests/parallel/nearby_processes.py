"""What one process of a run restores of local tiers that it has lost, or of a checkpoint that another one reads.

    python tests/parallel/nearby_processes.py FOLDER

Two processes of two devices each, on machines (folders FOLDER/local_0 and 1) of their own. Process 0 prints a JSON line
with the step that each found after each loss, and what was read. See tests/checkpoint/test_nearby.py.
"""

import json
import os
import pathlib
import shutil
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


def main(folder: pathlib.Path) -> None:
    from alto_jax.parallel import distributed

    distributed.initialize("env")
    import jax
    import numpy as np

    from alto_jax.checkpoint import arrays, runs
    from alto_jax.experiment import OptimConfig
    from alto_jax.parallel import sharding
    from alto_jax.train.state import create_state, make_optimizer
    from tests.checkpoint.test_runs import make_iterator

    process = jax.process_index()
    machines = [folder / f"local_{index}" for index in range(2)]

    def make_state(mesh: Any, step: int) -> Any:
        draw = lambda i, *shape, of=step: jax.random.normal(jax.random.fold_in(jax.random.key(of), i), shape)
        params = {"head": {"kernel": draw(0, 8, 16).at[0, 0].set(-0.0).at[0, 1].set(np.nan)},
                  "norm": {"scale": draw(1, 5).astype("bfloat16")},
                  "embed": {"embedding": draw(2, 16, 8, of=0)}}  # fmt: skip
        build = lambda: create_state(params, "^(head|norm)", make_optimizer(OptimConfig(), 10), {"on": draw(3, 4) > 0})
        state = jax.jit(build, out_shardings=sharding.tree_shardings(jax.eval_shape(build), mesh))()
        return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))

    def is_same(a: Any, b: Any) -> bool:
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            for p, q in zip(x.addressable_shards, y.addressable_shards, strict=True):
                if np.asarray(p.data).tobytes() != np.asarray(q.data).tobytes():
                    return False
        return True

    def saved(name: str, mesh: Any) -> tuple[pathlib.Path, dict[int, Any]]:
        """A run with step 1 in its directory and steps 2 and 3 on both machines."""
        run, iterator = folder / name, make_iterator()
        states = {step: make_state(mesh, step) for step in (1, 2, 3)}
        checkpointer = runs.Checkpointer(run, has_local=True)
        for step, state in states.items():
            next(iterator)
            meta = {"stage": "stage1", "step": step, "unlogged": [{"loss": float(step)}]}
            (checkpointer.save if step == 1 else checkpointer.save_local)(step, state, iterator, meta)
            checkpointer.wait()
        checkpointer.close()
        return run, states

    def restored(name: str, run: pathlib.Path, states: dict[int, Any], **options: bool) -> None:
        """Restores onto the mesh of the states, which are those saved."""
        reads: list[str] = []
        inner, arrays.restore_arrays = (
            arrays.restore_arrays,
            lambda at, wanted: reads.append(at.name) or inner(at, wanted),
        )
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), states[1])
        checkpointer, iterator = runs.Checkpointer(run, **options), make_iterator()
        state = checkpointer.restore(abstract, iterator)
        step = int(jax.device_get(state.step.addressable_shards[0].data))
        whole, data = is_same(state, states[step]), make_iterator()
        for _ in range(step):
            next(data)
        place = next(iterator).tolist() == next(data).tolist()
        told = distributed.gather([step, whole, place, checkpointer.unlogged == [{"loss": float(step)}], reads])
        checkpointer.close()
        arrays.restore_arrays = inner
        if process == 0:
            print(json.dumps({name: told}), flush=True)

    def lose(*places: str) -> None:
        distributed.from_first(lambda: [shutil.rmtree(at) for place in places for at in folder.glob(place)] and None)

    def spoil(place: str) -> None:
        def flip() -> None:
            [file] = folder.glob(place)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)

        distributed.from_first(flip)

    os.environ["ALTO_LOCAL"] = str(machines[process])
    twins = sharding.make_mesh(sharding.MeshConfig(2, 2, 1))
    run, states = saved("twins", twins)
    restored("both have it", run, states, has_local=True)
    split = sharding.make_mesh(sharding.MeshConfig(1, 4, 1))
    restored("another mesh", run, {step: make_state(split, step) for step in states}, has_local=True)
    spoil("local_1/*/*/3/arrays.npz")
    restored("one is damaged", run, states, has_local=True)
    lose("local_1/*")
    restored("one is lost", run, states, has_local=True)
    spoil("local_0/*/*/3/arrays.npz")
    restored("the newest of the other is damaged", run, states, has_local=True)
    lose("local_0/*")
    restored("both are lost", run, states, has_local=True)
    restored("one reads", run, states, one_reader=True)
    run, states = saved("split", split)
    restored("each has its own", run, states, has_local=True)
    restored("each reads its own", run, states, one_reader=True)
    lose("local_1/*")
    restored("a part is lost", run, states, has_local=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
