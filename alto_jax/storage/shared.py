"""Whether all processes of a run see one directory, asked before they rely on it."""

import os
import pathlib
import secrets
import socket
import time

from alto_jax.config import ConfigError
from alto_jax.parallel import distributed

PATIENCE = 10.0  # seconds that a network's file system may take to show a new file


def require(folder: str | os.PathLike, field: str) -> None:
    """The first process writes a file into `folder`, and each must see it there; all processes ask together.

    Args:
      folder: of all processes. field: what gave it, such as "--workdir", for the message.

    Raises:
      ConfigError: in every process, naming those that do not see it.
    """
    _, told = unseen(folder)
    if told:
        raise ConfigError(f"{field}: {told}; all processes of a run need one directory")


def unseen(folder: str | os.PathLike) -> tuple[set[int], str]:
    """Which processes do not see what the first one writes into `folder`, and this in words ("": all do); all processes
    ask together."""
    if distributed.count() == 1:
        return set(), ""
    probe = pathlib.Path(folder) / f".probe-{distributed.from_first(lambda: _write(folder))}"
    seen = distributed.gather([socket.gethostname(), _appears(probe)])
    distributed.from_first(lambda: probe.unlink(missing_ok=True))
    blind = {index: f"process {index} (on {host})" for index, (host, sees) in enumerate(seen) if not sees}
    do = "does" if len(blind) == 1 else "do"
    told = f"{', '.join(blind.values())} {do} not see what process 0 (on {seen[0][0]}) writes in {folder}"
    return {*blind}, told if blind else ""


def _write(folder: str | os.PathLike) -> str:
    nonce = secrets.token_hex(8)
    (pathlib.Path(folder) / f".probe-{nonce}").touch()
    return nonce


def _appears(file: pathlib.Path) -> bool:
    end = time.monotonic() + PATIENCE
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
