"""What is only read: a run, a packed checkpoint or prepared data in a bucket, brought to the cache folder once.

A fetched folder is named by what it holds, so that it never goes stale. Folders of `fetched` in the cache folder may be
deleted when no command uses them.
"""

from collections.abc import Callable, Collection
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
from typing import Any

from alto_jax import cli
from alto_jax.config import ConfigError, cache_folder
from alto_jax.storage import steps
from alto_jax.storage.bucket import Bucket, bucket, checked


def _kept(found: Bucket, content: str, bring: Callable[[pathlib.Path], Any]) -> pathlib.Path:
    """The folder of `content` (a hash) below a URL; `bring` fills a new one, in one process of this machine alone."""
    name = f"{found.url.rpartition('/')[2]}-{hashlib.sha256(f'{found.url} {content}'.encode()).hexdigest()[:16]}"
    place = cache_folder() / "fetched" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.is_dir():
            # Note: the lock may be this machine's alone.
            partial = place.with_name(f".{name}.{socket.gethostname()}.part")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            bring(partial)
            try:
                partial.rename(place)
            except OSError:  # another machine was faster
                shutil.rmtree(partial)
                if not place.is_dir():
                    raise
    return place


def _bring(found: Bucket, names: Collection[str], folder: pathlib.Path) -> None:
    steps.at_once(lambda name: found.download(name, folder / name), names)


def run(url: str, field: str, step: int | None = None, packed: Collection[str] = ()) -> pathlib.Path:
    """A run of a bucket on this machine: its small files and one step.

    Args:
      url: of the run's directory.
      field: what gave it, for messages.
      step: which one; None: the newest that is sound.
      packed: names of files that are a packed checkpoint together, which is brought instead.

    Raises:
      ConfigError: the URL cannot be used, or there is no such step. FileNotFoundError: no checkpoint there.
      OSError: the bucket cannot be read, or all its steps are damaged.
    """
    found = bucket(str(checked(url, field)).removesuffix(f"/{steps.CHECKPOINTS}"), field)
    sizes = found.sizes()
    if packed and all(name in sizes for name in packed):
        # Note: read to know what they are; they are small.
        content = {name: found.read(name) for name in sorted(sizes) if "/" not in name}
        digest = hashlib.sha256(b"".join(content.values())).hexdigest()
        return _kept(found, digest, lambda folder: [(folder / name).write_bytes(content[name]) for name in content])
    complete = steps.remote_steps(found, sizes)
    if not complete:
        raise FileNotFoundError(f"{url}: no complete checkpoint there (expected {steps.CHECKPOINTS}/STEP)")
    if step is not None and step not in complete:
        raise ConfigError(f"--step={step}: {url} has the steps {', '.join(map(str, complete))}")
    wanted = sorted(complete, reverse=True) if step is None else [step]
    # Note: logs of runs grow, and nothing that reads a checkpoint wants them.
    small = [name for name in sizes if "/" not in name and name.endswith(".json")]
    small += [name for name in sizes if name.startswith(f"{steps.FROZEN}/")]
    damaged: list[OSError] = []
    for number in wanted:

        def bring(folder: pathlib.Path, number: int = number) -> None:
            _bring(found, small, folder)
            steps.fetch(found, complete[number], folder)

        try:
            return _kept(found, complete[number].identity, bring)
        except steps.Damaged as error:
            damaged.append(error)
            cli.tell(f"warning: {error}; step {number} is left out")
    raise damaged[0]


def newest(url: str | os.PathLike, field: str) -> tuple[int, bytes]:
    """(the newest complete step of a run in a bucket, its mark of completeness); brings nothing to this machine.

    Raises:
      FileNotFoundError: no checkpoint there.
    """
    found = bucket(url, field)
    complete = steps.remote_steps(found, found.sizes(steps.CHECKPOINTS))
    if not complete:
        raise FileNotFoundError(f"{url}: no complete checkpoint there (expected {steps.CHECKPOINTS}/STEP)")
    number = max(complete)
    return number, found.read(f"{steps.CHECKPOINTS}/{number}/{steps.DONE}")


def data(url: str, field: str, manifest: str, expected: str) -> pathlib.Path:
    """A data set of a bucket on this machine, whole.

    Args:
      url: of its folder. field: what gave it, for messages.
      manifest: name of the file that is written last, and says what the others are.
      expected: what a folder with such a manifest is, in words.

    Raises:
      FileNotFoundError: no such manifest there.
    """
    found = bucket(url, field)
    sizes = found.sizes()
    if manifest not in sizes:
        raise FileNotFoundError(f"{field}: {url}: expected {expected} ({manifest}) there; mount the bucket for others")
    digest = hashlib.sha256(found.read(manifest) + json.dumps(sorted(sizes.items())).encode())
    return _kept(found, digest.hexdigest(), lambda folder: _bring(found, sizes, folder))
