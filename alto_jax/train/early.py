"""The note of a start, made before its processes have joined, by which one that dies before its account is known.

Process 0, by what the launcher tells it, appends a line; the account of the next start takes over the lines that others
left (`train.goodput`). A start that ends by itself before its account takes its line back: bad input is no run's time.
"""

from collections.abc import Mapping
import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import time

from alto_jax.config import write_whole
from alto_jax.storage import mirror
from alto_jax.storage.bucket import is_url
from alto_jax.train.goodput import Start, process_age, since_boot

FILE = ".early.jsonl"  # hidden, so that a bucket does not get it
_RANKS = {"env": ("ALTO_PROCESS_ID",), "auto": ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX",
                                                "TPU_WORKER_ID")}  # fmt: skip


def is_first(mode: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process will be process 0, as far as it can be told before joining; mode: of `--distributed`."""
    if mode == "none":
        return True
    rank = next((environ[name] for name in _RANKS[mode] if environ.get(name)), "")
    return rank == "0" and environ.get("MEGASCALE_SLICE_ID", "0") in ("", "0")


class Note:
    """The line of this start, and what starts before it have left."""

    def __init__(self, workdir: str, command: object):
        """Writes the line; what cannot be written is left out.

        Args:
          workdir: the run's directory, made if missing, or URL of a bucket.
          command: JSON that says what is started; lines of other commands are of other runs.
        """
        copy = mirror.copy_of(workdir) if is_url(workdir) else None
        # Note: beside the working copy, which a start makes equal to the bucket.
        self._file = copy.with_name(f"{copy.name}{FILE}") if copy else pathlib.Path(workdir) / FILE
        self._id, self._command = secrets.token_hex(8), hashlib.sha256(json.dumps(command).encode()).hexdigest()[:16]
        (boot, uptime), age = since_boot(), process_age()
        record = {"id": self._id, "command": self._command, "began": time.time() - age}
        record |= {"boot": boot, "uptime": round(uptime - age, 3)} if boot else {}
        folder = self._file.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab", buffering=0) as file:
                file.write(f"\n{json.dumps(record)}\n".encode())

    def _others(self) -> list[dict]:
        found = []
        with contextlib.suppress(OSError):
            for line in self._file.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    if record["id"] != self._id and record["command"] == self._command:
                        found.append(record)
        return found

    def take(self) -> list[Start]:
        """The starts of this command that died before their account, in order."""
        found = []
        for record in self._others():
            with contextlib.suppress(KeyError, TypeError, ValueError):
                boot, uptime = str(record.get("boot", "")), float(record.get("uptime", 0.0))
                found.append(Start(float(record["began"]), 0, "", boot=boot, uptime=uptime))
        return found

    def drop(self) -> None:
        """All of it is in the account now."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def take_back(self) -> None:
        """This start is none of a run; with the folders that it made, if nothing else is in them."""
        with contextlib.suppress(OSError):
            others = self._others()
            if others:
                text = "".join(f"\n{json.dumps(record)}\n" for record in others)
                write_whole(self._file, text)
                return
            self._file.unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()
