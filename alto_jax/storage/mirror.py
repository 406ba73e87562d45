"""A run whose directory is in a bucket: a working copy on this machine, and a thread that keeps the bucket like it.

All rooms read and write the working copy, with the tools of this machine's files. The bucket is the truth: a start
makes the copy equal to it, but for what this very copy has done since and nobody else has written there. What is in the
bucket at any moment can be gone on from: see `steps`, and the order in `Mirror.push`.

Where copies lie: ALTO_RUNS, else `runs` in the cache folder. Several processes share one, if all of them see it; else
each that does not has one of its own, equal to the bucket at the start (`of_each`).
"""

from collections.abc import Iterable, Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import socket
import threading
import time
from typing import Any

from alto_jax import cli
from alto_jax.config import ConfigError, cache_folder, write_whole
from alto_jax.parallel import distributed
from alto_jax.storage import shared, steps
from alto_jax.storage.bucket import Bucket, bucket, checked, is_url

# Of the copy: the identity of each step that it began to write to the bucket, which steps are there, and whether files.
_STATE = ".mirror.json"
_WRITER = "writer.json"  # of the bucket: who writes there
_LAST = "result.json"  # says that a run is complete, so it comes after everything else
_APART = (steps.CHECKPOINTS, "broken_checkpoints")  # steps have an order of their own; what is broken stays here
SECONDS = 10.0  # between two looks at what has changed


def copy_of(url: str) -> pathlib.Path:
    """The folder of the working copy of a URL in its one spelling."""
    base = os.environ.get("ALTO_RUNS")
    name = f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    return (pathlib.Path(base) if base else cache_folder() / "runs") / name


def _small(names: Iterable[str]) -> list[str]:
    """Of the objects of a run those that are no steps'."""
    return [name for name in names if name.partition("/")[0] not in _APART and name != _WRITER]


def _is_shared(name: str) -> bool:
    """Whether a file is of what steps share."""
    return name.startswith(f"{steps.FROZEN}/")


class Mirror:
    """Keeps a bucket like a working copy; for one process of a run.

    Attributes:
      bucket: the run's. folder: the copy.
    """

    def __init__(self, bucket: Bucket, folder: pathlib.Path):
        self.bucket, self.folder = bucket, folder
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._names: dict[str, Any] = {}  # in the bucket, with the time and size that the file had here
        self._written: dict[int, str] = {}
        self._remote: set[int] = set()  # steps in the bucket
        self._same: dict[int, Any] = {}  # steps that are the same on both sides, with the stamp of the one here
        self._nonce, self._is_failing, self._has_news = secrets.token_hex(8), False, False

    def pull(self) -> None:
        """Takes the bucket for this process, and makes the copy equal to it or leaves it, where it is further on.

        Raises:
          OSError: the bucket cannot be read or written, or all of its checkpoints are damaged.
        """
        self.bucket.write(_WRITER, json.dumps({"nonce": self._nonce, "host": socket.gethostname()}).encode())
        sizes = self.bucket.sizes()
        remote = steps.remote_steps(self.bucket, sizes)
        self._remote = set(remote)
        small = _small(sizes)
        self._names = dict.fromkeys(small)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._is_further(remote, is_begun=bool(small)):
            self._rebuild(remote, small)
        self._written |= {number: step.identity for number, step in remote.items()}
        self._same = {n: self._stamp(n) for n in steps.local_steps(self.folder) if n in remote}
        self._remember()

    def follow(self) -> None:
        """Makes the copy equal to the bucket, which another process has taken.

        Raises:
          OSError: as `pull`.
        """
        sizes = self.bucket.sizes()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rebuild(steps.remote_steps(self.bucket, sizes), _small(sizes))

    def _is_further(self, remote: dict[int, steps.Step], *, is_begun: bool) -> bool:
        """Whether the copy has all that is in the bucket: each step there is one that it has written.

        is_begun: there are small files in the bucket, which come before the first step.
        """
        try:
            state = json.loads((self.folder / _STATE).read_text())
            written = {int(number): str(known) for number, known in state["written"].items()}
            is_first, had_files = not state["there"], bool(state["has_files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        here = steps.local_steps(self.folder)
        if not remote:  # Note: its first step was on the way, or somebody has emptied the bucket.
            return is_first and bool(here) and (is_begun or not had_files)
        is_own = all(written.get(number) == step.identity for number, step in remote.items())
        return is_own and bool(here) and max(here) >= max(remote)

    def _rebuild(self, remote: dict[int, steps.Step], small: list[str]) -> None:
        for path in self.folder.iterdir():
            if path.name != steps.CHECKPOINTS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in (self.folder / steps.CHECKPOINTS).glob("*"):
            if not path.name.isdigit() or int(path.name) not in remote:
                shutil.rmtree(path)
        steps.at_once(lambda name: self.bucket.download(name, self.folder / name), small)
        steps.fetch_newest(self.bucket, remote, self.folder, cli.tell)

    def _remember(self) -> None:
        state = {"written": self._written, "there": sorted(self._remote), "has_files": bool(self._names)}
        write_whole(self.folder / _STATE, json.dumps(state) + "\n")

    def _require_own(self) -> None:
        """Raises ConfigError if another run has taken the bucket since: two would mix their files."""
        try:
            writer = json.loads(self.bucket.read(_WRITER))
        except FileNotFoundError:
            writer = {}
        except ValueError:
            return
        if writer.get("nonce") != self._nonce:
            raise ConfigError(
                f"{self.bucket.url}: another start of the run (on {writer.get('host', 'no host')}) writes there now;"
                " this one ends"
            )

    def push(self) -> None:
        """Brings what has changed to the bucket, in an order that leaves it whole after each object.

        What is gone here goes first (as the result of a run that is given more updates), then what steps share, small
        files, steps with the newest first, and the result; at last steps that are no longer kept.

        Raises:
          OSError: it cannot be written. ConfigError: another start of the run writes there.
        """
        with self._lock:
            self._require_own()
            # Note: before the logs, which are then of no earlier time.
            here = steps.local_steps(self.folder)
            stamps = self._stamps()
            self._forget(name for name in [*self._names] if name not in stamps and not _is_shared(name))
            last = {name: stamp for name, stamp in stamps.items() if name == _LAST}
            is_begun = bool(self._names)
            self._push_small({name: stamp for name, stamp in stamps.items() if name not in last})
            if self._names and not is_begun:
                self._remember()
            for number in reversed(here):
                self._push_step(number)
            self._push_small(last)
            if self._has_news:
                for number in sorted(self._remote - set(here)):
                    steps.remove(self.bucket, number)
                    self._remote.discard(number)
                    self._same.pop(number, None)
                self._has_news = False
            gone = [name for name in self._names if name not in stamps]
            self._forget(sorted(gone, key=lambda name: not name.endswith(steps.DONE)))

    def _forget(self, names: Iterable[str]) -> None:
        """Deletes files that are no steps'."""
        for name in names:
            self.bucket.delete([name])
            del self._names[name]

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """(time, size) of every file that is to be in the bucket, but for checkpoints."""
        found = {}
        for top, folders, names in os.walk(self.folder):
            if top == str(self.folder):
                folders[:] = [name for name in folders if name not in _APART]
            folders[:] = [name for name in folders if steps.PARTIAL not in name]
            for name in names:
                path = pathlib.Path(top, name)
                if not name.startswith(".") and not path.is_symlink():
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        found[str(path.relative_to(self.folder))] = (stat.st_mtime_ns, stat.st_size)
        return found

    def _push_small(self, stamps: dict[str, tuple[int, int]]) -> None:
        """Brings files to the bucket, first what steps share; the mark that it is complete comes after it."""
        new = [name for name, stamp in stamps.items() if self._names.get(name) != stamp]
        shared = [name for name in new if _is_shared(name)]
        push = lambda name: self._push_file(name, stamps[name])
        steps.at_once(push, (name for name in shared if not name.endswith(steps.DONE)))
        for name in [name for name in shared if name.endswith(steps.DONE)] + [n for n in new if not _is_shared(n)]:
            push(name)

    def _push_file(self, name: str, stamp: tuple[int, int]) -> None:
        with contextlib.suppress(FileNotFoundError):
            if _is_shared(name):
                self.bucket.upload(self.folder / name, name)
            else:  # Note: by content, since a log may grow meanwhile.
                self.bucket.write(name, (self.folder / name).read_bytes())
            self._names[name] = stamp

    def _stamp(self, number: int) -> tuple[int, int] | None:
        """Changes when a step is saved anew; None: it is not there."""
        try:
            stat = (self.folder / steps.CHECKPOINTS / str(number) / steps.DONE).stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _push_step(self, number: int) -> None:
        folder, stamp = self.folder / steps.CHECKPOINTS / str(number), self._stamp(number)
        if stamp is None or self._same.get(number) == stamp:
            return
        try:
            content = steps.listed(folder)
            # Note: before it is there, so that a process that is killed in between knows its own.
            self._written[number] = hashlib.sha256(content).hexdigest()[:16]
            self._remember()
            steps.write(self.bucket, folder, number, content)
        except FileNotFoundError:
            if folder.is_dir():
                raise
            return  # Note: no longer kept.
        self._same[number] = stamp
        self._remote.add(number)
        self._remember()
        self._has_news = True

    def start(self) -> None:
        """From now on a thread pushes; what fails is said once and tried again."""
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        pause = SECONDS
        while not self._stop.wait(pause):
            began = time.monotonic()
            with contextlib.suppress(ConfigError):  # Note: `settle` and `close` say so.
                self._try()
            pause = max(SECONDS, 10 * (time.monotonic() - began))

    def _try(self) -> None:
        try:
            self.push()
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                cli.tell(f"warning: {error}; tried again, the run goes on in {self.folder}")
            self._is_failing = True

    def settle(self) -> None:
        """Before a save: brings the checkpoints of before to the bucket, so that it does not fall behind.

        Raises:
          ConfigError: another start of the run writes there.
        """
        self._try()

    def close(self, *, is_error: bool = False) -> None:
        """Ends the thread and brings the rest to the bucket.

        Args:
          is_error: the run ends with an error, which a failure here must not hide.

        Raises:
          OSError: the bucket cannot be written. ConfigError: another start of the run writes there.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.push()
        except OSError as error:
            text = f"{error}; everything is in {self.folder}, and the same command here brings it there"
            if not is_error:
                raise OSError(text) from error
            cli.tell(f"warning: {text}")
        except ConfigError:
            if not is_error:
                raise


@contextlib.contextmanager
def working_copy(place: str | os.PathLike, field: str) -> Iterator[tuple[pathlib.Path, Mirror | None]]:
    """`_working_copy`, which all processes of a run leave together where it ends well: what process 0 has still to
    write or to bring to the bucket may take longer than the 300 seconds that JAX waits for the last process."""
    try:
        with _working_copy(place, field) as found:
            yield found
    except cli.Stopped:
        distributed.meet()
        raise
    distributed.meet()


@contextlib.contextmanager
def _working_copy(place: str | os.PathLike, field: str) -> Iterator[tuple[pathlib.Path, Mirror | None]]:
    """The folder on this machine to work in, for all processes of a run: `place` itself, or the copy of a URL.

    Args:
      place: a directory or URL.
      field: what gave it, such as "--workdir", for messages.

    Yields:
      (folder, the mirror; None in all processes but the first, and for a directory of this machine).

    Raises:
      ConfigError: the URL cannot be used. OSError: the bucket cannot be read or written.
    """
    if not is_url(place):
        yield pathlib.Path(place), None
        return
    made: list[Mirror] = []

    def pull() -> str:
        url = str(checked(place, field))
        made.append(Mirror(bucket(url, field), copy_of(url)))
        made[0].pull()
        return str(made[0].folder.absolute())

    folder = pathlib.Path(distributed.from_first(pull))
    mirror = made[0] if made else None
    if mirror is None:
        yield folder, None
        return
    cli.tell(f"{mirror.bucket.url}: working copy in {folder}")
    mirror.start()
    try:
        yield folder, mirror
    except BaseException:
        mirror.close(is_error=True)
        raise
    mirror.close()


def of_each(place: str | os.PathLike, folder: pathlib.Path, mirror: Mirror | None) -> tuple[pathlib.Path, bool]:
    """Where each process of a run works, once the first one has begun in `folder`; all processes ask together.

    Args:
      place, folder, mirror: the run's directory or URL, and what `working_copy` has made of it.

    Returns:
      (the folder of this process, whether there are several). With several, all are equal to the bucket, and process 0
      alone may write what is to be kept.

    Raises:
      ConfigError: not all processes see a directory that is in no bucket, or one cannot bring the bucket to itself.
    """
    if not is_url(place):
        shared.require(folder, "--workdir")
        return folder, False
    blind, told = shared.unseen(folder)
    if not blind:
        return folder, False
    import jax  # late: keeps the start fast

    url, index = str(checked(place, "--workdir")), jax.process_index()
    distributed.from_first(lambda: mirror.push() if mirror is not None else None)
    if mirror is not None:
        cli.tell(f"{url}: {told}: each works in a copy of its own, and process 0 alone writes checkpoints")
    with distributed.opening():
        if index in blind:
            copy = copy_of(url)
            folder = copy.with_name(f"{copy.name}-process_{index}")
            Mirror(bucket(url, "--workdir"), folder).follow()
    return folder, True
