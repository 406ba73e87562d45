"""Trains the fake stage in a bucket, in processes that share no file system; killed, then gone on with.

    python tests/parallel/apart.py URL FOLDER

FOLDER/machine_N is the disk of process N, which is empty when the run goes on. See test_apart.py.
"""

import os
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

STEPS, KILLED = 6, 5


class Killed(BaseException):
    """The process is gone: nothing more is written."""


def stage():
    """The fake stage, whose data come from the pipeline, so that each process reads its rows."""
    import numpy as np

    from alto_jax.data import pipeline
    from tests import fake_stage

    rng = np.random.default_rng(0)
    rows = [{"x": rng.normal(size=4).astype(np.float32), "weight": np.float32(1 + i % 3)} for i in range(40)]
    stack = lambda some: {name: np.stack([row[name] for row in some]) for name in rows[0]}
    data = lambda share: iter(pipeline.batches(rows, stack, batch_size=fake_stage.ROWS, seed=1, share=share))
    return fake_stage.replace(fake_stage.stage(), data=data)


def config(processes: int):
    from tests import fake_stage

    return fake_stage.config(
        train={"steps": STEPS}, mesh={"data": 1, "fsdp": processes, "tensor": 1}, eval={"num_samples": 0}
    )


def main(url: str, folder: pathlib.Path) -> None:
    from alto_jax.parallel import distributed

    distributed.initialize("env")
    import jax

    from alto_jax.storage import mirror, shared
    from alto_jax.train import loop

    disk, beat, close = folder / f"machine_{jax.process_index()}", loop.goodput.Account.beat, mirror.Mirror.close
    os.environ["ALTO_RUNS"] = str(disk)
    shared._appears = lambda file: jax.process_index() == 0
    loop.make_stage = lambda config, mesh, directory=None: stage()

    def die(self, step):
        beat(self, step)
        if step == KILLED:
            raise Killed

    loop.goodput.Account.beat = die
    mirror.Mirror.close = lambda self, is_error=False: self._stop.set()
    try:
        loop.train(config(2), url)
    except Killed:
        shutil.rmtree(disk)
    loop.goodput.Account.beat, mirror.Mirror.close = beat, close
    loop.train(config(2), url)
    loop.train(config(2), url)  # which finds it complete


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
