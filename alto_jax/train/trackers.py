"""Metrics to Weights & Biases and MLflow, beside the run's own files (`train.writers`).

Where they go is the packages' own business: WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and
the like. Training never waits for them and never ends with them: each writes in a thread of its own, and one that fails
says so once and gets nothing more. A run that goes on after a stop goes on in the same entry (`trackers.json`).
"""

from collections.abc import Callable
import importlib.util
import json
import os
import pathlib
import queue
import re
import sys
import threading
import time
from typing import Any, Protocol

from alto_jax.config import ConfigError, require, to_dict, write_whole
from alto_jax.data.bad_data import one_line

_FILE = "trackers.json"  # {name: id of the run there}
_PROJECT = "alto_jax"
_PARAMS_AT_ONCE = 100  # MLflow's limit
_PATIENCE = 60.0  # seconds that the end of a run waits for what is still to be sent


class Tracker(Protocol):
    """What a service must do; id: of the run there."""

    id: str

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of an update."""

    def close(self) -> None:
        """Ends the run there."""


class _Wandb:
    """A run of Weights & Biases; its own files lie in the run's directory."""

    def __init__(self, path: pathlib.Path, run_id: str | None, config: dict[str, Any]):
        import wandb  # type: ignore[import-not-found, import-untyped, unused-ignore]  # late: an extra

        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        self._run = wandb.init(project=project, name=path.name, id=run_id, resume="allow", dir=str(path), config=config)
        self.id = str(self._run.id)
        # Note: a run that goes on repeats updates, which W&B's own counter, that only grows, would drop with a warning.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run of MLflow, by its client: its global "active run" would belong to one thread."""

    def __init__(self, path: pathlib.Path, run_id: str | None, config: dict[str, Any]):
        from mlflow import MlflowClient  # type: ignore[import-not-found, import-untyped, unused-ignore]  # late: an extra
        from mlflow.entities import Metric, Param  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self._client, self._metric = MlflowClient(), Metric
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            run_id = self._client.create_run(experiment, run_name=path.name).info.run_id
            params = [Param(name, str(value)[:500]) for name, value in _leaves(config).items()]
            for start in range(0, len(params), _PARAMS_AT_ONCE):
                self._client.log_batch(run_id, params=params[start : start + _PARAMS_AT_ONCE])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.id = str(run_id)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        allowed = lambda name: re.sub(r"[^\w\-. :/]", "_", name)
        self._client.log_batch(self.id, [self._metric(allowed(n), float(v), now, step) for n, v in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self.id)


WRITERS: dict[str, Callable[[pathlib.Path, str | None, dict[str, Any]], Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow}


def names(writers: str) -> list[str]:
    """The names in `train.writers`.

    Args:
      writers: "", or names with commas between them.

    Raises:
      ConfigError: an unknown one.
    """
    found = [name.strip() for name in writers.split(",") if name.strip()]
    known = all(name in WRITERS for name in found)
    require(known, "config.train.writers", writers, f"some of {', '.join(WRITERS)}, with commas between them")
    return list(dict.fromkeys(found))


def check(writers: str) -> None:
    """Raises ConfigError, before a run begins, if the package of one of `train.writers` is not installed."""
    for name in names(writers):
        if not _is_installed(name):
            raise ConfigError(f"config.train.writers: {name} is not installed; pip install 'alto_jax[{name}]'")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # Note: a module without a specification, as those that are made by hand.
        return sys.modules.get(package) is not None


def start(writers: str, directory: str | os.PathLike, config: Any, start_step: int) -> list["Behind"]:
    """Opens the trackers of a run.

    Args:
      writers: see `names`.
      directory: of the run.
      config: of the run, a dataclass, which they show.
      start_step: updates that are done.

    Raises:
      ConfigError: one cannot be opened at the beginning of a run. Of a run that goes on it is left out, with a warning.
    """
    path, opened = pathlib.Path(directory).resolve(), []
    file = path / _FILE
    ids = json.loads(file.read_text()) if file.exists() and start_step else {}
    for name in names(writers):
        try:
            tracker = WRITERS[name](path, ids.get(name), to_dict(config))
        except Exception as error:  # Note: they raise errors of their own kinds, and those of networks.
            if not start_step:
                raise ConfigError(f"config.train.writers: {name} cannot be opened: {one_line(error)}") from error
            _warn(name, error)
            continue
        ids[name] = tracker.id
        opened.append(Behind(name, tracker))
    if opened:
        write_whole(file, json.dumps(ids) + "\n")
    return opened


class Behind:
    """A tracker in a thread of its own, so that nothing waits for it; after its first failure it gets nothing more."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker = name, tracker
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Hands the metrics of an update over."""
        if not self._has_failed:
            self._queue.put((step, dict(metrics)))

    def close(self) -> None:
        """Sends what is left, for a minute at most."""
        self._queue.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            _warn(self._name, TimeoutError(f"not done after {_PATIENCE:.0f} seconds"))

    def _work(self) -> None:
        try:
            while (given := self._queue.get()) is not None:
                self._tracker.write(*given)
            self._tracker.close()
        except Exception as error:  # Note: as in `start`.
            self._has_failed = True
            _warn(self._name, error)


def _warn(name: str, error: Exception) -> None:
    """Once for each tracker; the run's own files have everything."""
    why = one_line(error) or type(error).__name__
    print(
        f"warning: config.train.writers: {name} failed and gets nothing more; training goes on: {why:.300}", flush=True
    )


def _leaves(config: Any, name: str = "") -> dict[str, Any]:
    """{dotted name: value} of nested dicts."""
    if not isinstance(config, dict):
        return {name: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _leaves(value, f"{name}.{key}" if name else str(key))
    return found
