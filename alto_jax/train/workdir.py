"""A run's directory belongs to one configuration: who may take it, and which fields may change in it."""

import contextlib
import json
import os
import pathlib

from alto_jax.checkpoint import runs
from alto_jax.config import ConfigError, differences, to_dict, write_whole
from alto_jax.experiment import ExperimentConfig, make_experiment
from alto_jax.storage import bucket
from alto_jax.train import goodput, trackers

STARTS = "starts.json"  # {field: identity} of the checkpoints that the run began with
_STARTS = ("init_from", "tokenizer_from")
# Fields that may change between two runs of the same command line: they do not change what is learned.
_FREE_FIELDS = (
    "train.log_every",
    "train.checkpoint_",
    "train.max_restarts",
    "train.keep_",
    "train.best_",
    "train.accumulate",
    "train.max_bad_steps",
    "train.spike_sigmas",
    "train.profile_steps",
    "train.patience",
    "train.writers",
    "eval.",
    "grpo.log_samples",
    "sft.max_supervised",
    "mesh.",
    "data.num_threads",
    "data.num_workers",
    "data.memory_gb",
    "data.allow_changed",
    # Note: where the data lie; which they are is compared with the position in them, see data/stream.py.
    "data.root",
    "data.meta",
    "data.max_bad_fraction",
    "data.length_buckets",
)


def claim_workdir(workdir: str | os.PathLike, config: ExperimentConfig, *, is_training: bool = True) -> pathlib.Path:
    """Makes the run's directory, or checks that it belongs to this configuration.

    A run may be given another number of updates (`train.steps`), as long as it has not done more already: it goes on
    from its newest checkpoint, with the learning rate that the schedule of the new length has there.

    Args:
      workdir: the run's directory, on this machine.
      config: the configuration.
      is_training: False: only reads there, so that `train.steps` may differ and nothing is written.

    Raises:
      ConfigError: the directory holds a run of another configuration, names the fields that differ; or one that has
        done more updates than `train.steps`; or a package of `train.writers` is not installed.
    """
    path = pathlib.Path(workdir)
    if is_training:
        trackers.check(config.train.writers)
    if is_training:
        path.mkdir(parents=True, exist_ok=True)
    file, plain = path / "config.json", to_dict(config)
    # Note: a run that failed before its first checkpoint leaves nothing to protect.
    done = max((int(p.name) for p in path.glob("checkpoints/*") if p.name.isdigit()), default=None)
    if file.exists() and (done is not None or (path / "result.json").exists()):
        try:
            old = _completed(json.loads(file.read_text()))
        except ValueError as error:
            raise ConfigError(f"{file}: not readable as JSON: {error}") from error
        found = [
            f"{name}: {before!r} there, {now!r} here"
            for name, before, now in differences(old, json.loads(json.dumps(plain)))
            if not name.startswith((*_FREE_FIELDS, "train.steps"))
            and not (name in _STARTS and _is_same_start(path, config, name, before, now))
        ]
        if found:
            raise ConfigError(
                f"--workdir={workdir} holds a run of another configuration ({'; '.join(found[:3])});"
                " choose another directory or the same configuration"
            )
        if is_training and old["train"].get("steps") != config.train.steps:
            if config.train.steps < (done or 0):
                raise ConfigError(
                    f"config.train.steps: expected at least the {done} updates that {workdir} has done, got"
                    f" {config.train.steps}"
                )
            # Note: in this order, so that a run which is stopped in between is not taken for complete.
            (path / "result.json").unlink(missing_ok=True)
            old["train"]["steps"] = config.train.steps
            write_whole(file, json.dumps(old, indent=2) + "\n")
        return path
    if not is_training:
        return path
    text = json.dumps(plain, indent=2) + "\n"
    if not file.exists() or file.read_bytes() != text.encode():
        (path / goodput.FILE).unlink(missing_ok=True)  # Note: of another run.
    # Note: every process of a run writes the same.
    write_whole(file, text)
    starts = {name: _identity(place) for name in _STARTS if (place := getattr(config, name))}
    write_whole(path / STARTS, json.dumps(starts) + "\n")
    return path


def _identity(place: str) -> str:
    """What checkpoint a run begins with; "": none is there."""
    try:
        return runs.identity(place)
    except FileNotFoundError:
        return ""


def _is_same_start(path: pathlib.Path, config: ExperimentConfig, name: str, before: str, now: str) -> bool:
    """Whether `init_from` or `tokenizer_from` is another spelling, or another place, of what the run began with."""
    if not before or not now:
        return False
    if bucket.place(before) == bucket.place(now):
        return True
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads((path / STARTS).read_text())[name]
        return bool(known) and known == _identity(now)
    if not config.lora.rank or name != "init_from":
        return False
    # Note: of an earlier version. By hand, since process 0 alone is here, and `load_meta` has all processes agree.
    for step in reversed(runs.complete_steps(path)):
        with contextlib.suppress(OSError, ValueError):
            return runs.read_meta(path / runs.CHECKPOINTS / str(step)).get("base_identity") == _identity(now)
    return False


def _completed(plain: dict) -> dict:
    """A saved configuration with the defaults of fields that its version did not have; as it is, if it has others."""
    try:
        return json.loads(json.dumps(to_dict(make_experiment(plain))))
    except ConfigError:
        return plain
