"""Which rows of every batch a process reads: those that its devices hold.

`sharding.batch_share` makes the share of a mesh; data (training) and examples (evaluation) are dealt by it.
"""

import dataclasses

import numpy as np

from alto_jax.config import require


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """The rows of every global batch that one process reads.

    A batch is cut into `num_parts` runs of equally many rows. Processes that hold the same parts (a tensor axis spans
    them) read the same rows.

    Attributes:
      parts: numbers of the parts that lie on the devices of this process, rising.
      num_parts: parts of a batch.
      num_processes: processes that share the batches.
    """

    parts: tuple[int, ...] = (0,)
    num_parts: int = 1
    num_processes: int = 1

    def __post_init__(self) -> None:
        good = list(self.parts) == sorted({*self.parts} & {*range(self.num_parts)}) and bool(self.parts)
        require(good, "parts", self.parts, f"rising numbers in 0..{self.num_parts - 1}")

    @property
    def is_whole(self) -> bool:
        """Whether this process reads every row."""
        return len(self.parts) == self.num_parts

    def rows(self, batch_size: int, field: str = "batch_size") -> np.ndarray:
        """The rows, int[R] in rising order, of a batch of `batch_size` rows over all processes.

        Raises:
          ConfigError: the batch does not divide into the parts; names `field`.
        """
        divides = batch_size >= 1 and batch_size % self.num_parts == 0
        require(divides, field, batch_size, f"a multiple of the {self.num_parts} parts that the devices split it into")
        size = batch_size // self.num_parts
        return np.concatenate([np.arange(part * size, (part + 1) * size) for part in self.parts])

    def batch_size(self, num_rows: int) -> int:
        """Rows of the whole batch of which this process reads `num_rows`."""
        return num_rows // len(self.parts) * self.num_parts


WHOLE = BatchShare()
