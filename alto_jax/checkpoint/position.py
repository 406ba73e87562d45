"""Where in the data a step was saved."""

import json
import pathlib
from typing import Any

import jax


def plain(meta: dict, position: Any) -> list:
    """What all processes must have read alike, beside the arrays."""
    return [position, meta.get("frozen", ""), meta.get("unlogged", [])]


def read(folder: pathlib.Path) -> Any:
    """Position of this process's iterator; that of any other if the number of processes has changed.

    Raises:
      ValueError: the positions of the processes differ, so that they mean nothing to another number of processes.
    """
    apart = folder / "metadata"
    if apart.exists():  # written by one process for all
        states = json.loads(apart.read_text())["positions"]
        if len(states) == jax.process_count():
            return states[jax.process_index()]
    own = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    if own.exists():
        return json.loads(own.read_text())
    if not apart.exists():
        states = [json.loads(file.read_text()) for file in sorted(folder.glob("process_*-of-*.json"))]
    if not states:
        raise FileNotFoundError(f"{folder}: no position in the data")
    if any(state != states[0] for state in states):
        raise ValueError(f"{folder}: positions in the data of {len(states)} processes, which differ; start as many")
    return states[0]
