"""Checkpoints in a bucket: a step counts once its list of files is there, which is written last and deleted first.

A process that ends in the middle of writing or deleting a step leaves no such list, so that half a checkpoint is never
read. Each file is compared with the size and hash that the list has of it. A run that was copied there by other means
has no lists; of its steps those count that hold Orbax's mark of completeness, and sizes alone are compared.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import shutil
from typing import Any

from alto_jax.storage.bucket import Bucket

CHECKPOINTS = "checkpoints"  # of a run; as Orbax and `alto_jax.checkpoint` have it
FROZEN = "frozen"  # of a run: folders of what all its steps share, as `alto_jax.checkpoint` has it
DONE = "_CHECKPOINT_METADATA"  # Orbax's mark of a step that is complete
LIST = "alto_files.json"  # {"files": {name: [bytes, hash]}}, beside the files of a step
PARTIAL = "orbax-checkpoint-tmp"  # in the name of a folder that is not complete, as Orbax has it
_THREADS = 8
_STEP = re.compile(rf"{CHECKPOINTS}/(\d+)/(.+)")


class Damaged(OSError):
    """A step in a bucket is not what was written there."""


def hash_of(file: pathlib.Path) -> str:
    """A hash of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, functools.partial(hashlib.blake2b, digest_size=16)).hexdigest()


@dataclasses.dataclass(frozen=True)
class Step:
    """A complete step in a bucket.

    Attributes:
      number: updates done.
      files: {name within the step: (bytes, hash; "" where no list says it)}.
      identity: changes with the content.
    """

    number: int
    files: Mapping[str, tuple[int, str]]
    identity: str


def local_steps(folder: pathlib.Path) -> list[int]:
    """The complete steps of a run's directory on this machine, in rising order."""
    found = folder / CHECKPOINTS
    steps = [int(p.name) for p in found.iterdir() if p.name.isdigit()] if found.is_dir() else []
    return sorted(step for step in steps if (found / str(step) / DONE).exists())


def grouped(sizes: Mapping[str, int]) -> dict[int, dict[str, int]]:
    """{step: {name within it: bytes}} of the objects below a run's URL, complete or not."""
    steps: dict[int, dict[str, int]] = {}
    for name, size in sizes.items():
        if found := _STEP.fullmatch(name):
            steps.setdefault(int(found[1]), {})[found[2]] = size
    return steps


def remote_steps(bucket: Bucket, sizes: Mapping[str, int]) -> dict[int, Step]:
    """The complete steps below a run's URL, whose objects are `sizes`, in rising order."""
    found = {}
    for number, names in sorted(grouped(sizes).items()):
        files: dict[str, tuple[int, str]] = {}
        if LIST in names:
            try:
                content = bucket.read(f"{CHECKPOINTS}/{number}/{LIST}")
                files = {name: (int(size), str(known)) for name, (size, known) in json.loads(content)["files"].items()}
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                continue  # Note: it is being deleted, or is no list.
        elif DONE in names:
            content = bucket.read(f"{CHECKPOINTS}/{number}/{DONE}") + json.dumps(sorted(names.items())).encode()
            files = {name: (size, "") for name, size in names.items()}
        else:
            continue
        found[number] = Step(number, files, hashlib.sha256(content).hexdigest()[:16])
    return found


def listed(folder: pathlib.Path) -> bytes:
    """The list of a step's folder on this machine, as it is written to a bucket."""
    files = {
        str(file.relative_to(folder)): [file.stat().st_size, hash_of(file)]
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    return json.dumps({"files": files}).encode()


def write(bucket: Bucket, folder: pathlib.Path, number: int, content: bytes) -> None:
    """Writes a step to a bucket.

    Args:
      folder: of the step on this machine; must stay until this returns.
      content: `listed(folder)`.
    """
    base, names = f"{CHECKPOINTS}/{number}", json.loads(content)["files"]
    bucket.delete(f"{base}/{name}" for name in (LIST, DONE))
    at_once(lambda name: bucket.upload(folder / name, f"{base}/{name}"), (name for name in names if name != DONE))
    if DONE in names:
        bucket.upload(folder / DONE, f"{base}/{DONE}")
    bucket.write(f"{base}/{LIST}", content)
    bucket.delete(name for name in bucket.sizes(base) if name.removeprefix(f"{base}/") not in (LIST, *names))


def remove(bucket: Bucket, number: int) -> None:
    """Removes a step from a bucket."""
    base = f"{CHECKPOINTS}/{number}"
    bucket.delete(f"{base}/{name}" for name in (LIST, DONE))
    bucket.delete(bucket.sizes(base))


def is_same(folder: pathlib.Path, step: Step) -> bool:
    """Whether a step's folder on this machine holds what the bucket's list says."""
    for name, (size, known) in step.files.items():
        file = folder / name
        if not known or not file.is_file() or file.stat().st_size != size or hash_of(file) != known:
            return False
    return True


def fetch(bucket: Bucket, step: Step, run: pathlib.Path) -> None:
    """Brings a step to a run's directory on this machine; its folder has its name when it is complete.

    Raises:
      Damaged: a file is missing in the bucket, or is not what was written.
    """
    target = run / CHECKPOINTS / str(step.number)
    if is_same(target, step):
        return
    partial = target.with_name(f"{step.number}.{PARTIAL}-fetch")
    for old in (target, partial):
        shutil.rmtree(old, ignore_errors=True)

    def bring(name: str) -> None:
        size, known = step.files[name]
        where = f"{bucket.url}: {CHECKPOINTS}/{step.number}/{name}"
        if ".." in pathlib.PurePosixPath(name).parts or name.startswith("/"):
            raise Damaged(f"{where}: no name of a file")
        try:
            bucket.download(f"{CHECKPOINTS}/{step.number}/{name}", partial / name)
        except FileNotFoundError as error:
            raise Damaged(f"{where}: it is missing") from error
        found = (partial / name).stat().st_size
        if found != size or (known and hash_of(partial / name) != known):
            raise Damaged(f"{where}: it is not what was written ({found} bytes, {size} written)")

    at_once(bring, (name for name in step.files if name != LIST))
    partial.rename(target)


def at_once(action: Callable[[str], None], names: Iterable[str]) -> None:
    """`action` of each name, some at a time, since most of it is waiting; raises what the first that fails raises."""
    pool = futures.ThreadPoolExecutor(_THREADS)
    try:
        for done in [pool.submit(action, name) for name in names]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def fetch_newest(bucket: Bucket, found: Mapping[int, Step], run: pathlib.Path, tell: Any) -> None:
    """Brings all of the steps, the newest first; one that is damaged is left out, with a line.

    Raises:
      Damaged: there are steps, and all are damaged.
    """
    damaged: list[OSError] = []
    for number in sorted(found, reverse=True):
        try:
            fetch(bucket, found[number], run)
        except Damaged as error:
            damaged.append(error)
            tell(f"warning: {error}; step {number} is left out")
    if damaged and len(damaged) == len(found):
        raise Damaged(f"{damaged[0]}; no other step is there")
