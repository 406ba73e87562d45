"""A program that one process of a run compiles slower than the others: prints when each compiled it and ran it.

    python tests/parallel/slow_compilation.py SECONDS

See test_several_processes.py.
"""

import json
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


class Program:
    """What `jax.jit` gives, as far as `distributed.meeting` knows it, with a compilation that takes a while."""

    def __init__(self, seconds: float):
        self.seconds, self.told = seconds, []

    def lower(self, *args: Any) -> "Program":
        return self

    def compile(self) -> None:
        time.sleep(self.seconds)
        self.told.append(("compiled", time.time()))

    def __call__(self, *args: Any) -> None:
        self.told.append(("ran", time.time()))


def main(seconds: float) -> None:
    from alto_jax.parallel import distributed

    distributed.initialize("env")
    import jax
    import numpy as np

    program = Program(seconds * jax.process_index())
    met = distributed.meeting(program)
    for width in (2, 2, 3):
        met({"x": np.zeros(width)}, 1)
    print(json.dumps(distributed.gather(program.told)))


if __name__ == "__main__":
    main(float(sys.argv[1]))
