"""Benchmarks → tables and figures."""

from collections.abc import Sequence
import os
from typing import Any

__all__ = ["evaluate"]


def evaluate(
    checkpoint: str | os.PathLike,
    benchmarks: Sequence[str],
    data: str | os.PathLike,
    out: str | os.PathLike,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a checkpoint on benchmarks; the command `python -m alto_jax.evaluate` as a call.

    Args:
      checkpoint: a run's directory.
      benchmarks: names, as `--list` has them.
      data: the data folder, or a prepared data set.
      out: the directory for results, tables and plots; an evaluation that was stopped goes on there.
      **options: more fields of `EvaluateOptions`.

    Returns:
      What `metrics.json` holds: task name → numbers.

    Raises:
      ValueError: a wrong option, files that are missing, more bad samples than allowed.
    """
    # late: --help needs no JAX
    from alto_jax.evaluate.options import EvaluateOptions
    from alto_jax.evaluate.runner import evaluate as run

    return run(EvaluateOptions(checkpoint=checkpoint, benchmarks=benchmarks, data=data, out=out, **options))
