"""Packed checkpoints: a folder of model.safetensors (float16), model.json and tokenizer.json, small enough to ship.

    python -m alto_jax.checkpoint pack RUN OUT

A packed folder, or the name of one that comes with the package (`alto-tiny`), may be given wherever a run's directory
is. It is unpacked once, to a run in the cache folder (`config.cache_folder`).
"""

import atexit
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any
import warnings

import numpy as np

from alto_jax.checkpoint import foreign
from alto_jax.checkpoint.foreign import ABOUT, WEIGHTS
from alto_jax.config import cache_folder

_CHECKPOINTS = "checkpoints"  # of a run
TEXT = "tokenizer.json"
ASSETS = pathlib.Path(__file__).parents[1] / "assets"
_KEPT = ("stage", "model", "data", "step")  # what a packed model says of itself
_temporary: dict[pathlib.Path, pathlib.Path] = {}


def shipped() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(folder.name for folder in ASSETS.iterdir() if _is_packed(folder)) if ASSETS.is_dir() else []


def pack(run: str | os.PathLike, out: str | os.PathLike, step: int | None = None) -> pathlib.Path:
    """Writes the parameters of a run (its moving average, if it has one) as a packed folder.

    Args:
      run: a run's directory. out: a new folder. step: of the checkpoints; None: the newest.

    Raises:
      FileNotFoundError: no checkpoint in `run`. ValueError: `run` has adapters alone, or `out` is packed already.
    """
    from safetensors.numpy import save_file  # late: only packing writes

    from alto_jax.checkpoint import rows, runs  # late: names are looked up without JAX

    meta, target = runs.load_meta(run, step), pathlib.Path(out)
    if meta.get("lora"):
        raise ValueError(f"{run}: adapters alone; first: python -m alto_jax.lora merge {run} OUT")
    if (target / WEIGHTS).exists():
        raise ValueError(f"{out}: holds {WEIGHTS} already")
    arrays = {name: np.asarray(value).astype(np.float16) for name, value in rows.open_params(run, step).items()}
    wrong = next((name for name, value in arrays.items() if not np.isfinite(value).all()), None)
    if wrong is not None:
        raise ValueError(f"{run}: parameter {wrong} does not fit into float16")
    target.mkdir(parents=True, exist_ok=True)
    save_file(arrays, target / WEIGHTS)
    about = {name: meta[name] for name in _KEPT if name in meta}
    data = about.get("data", {})
    about["data"] = {"system": data.get("system")} | ({"box_step": data["box_step"]} if "box_step" in data else {})
    (target / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    root, _ = runs.find_run(run)
    if (root / TEXT).exists():
        shutil.copy(root / TEXT, target / TEXT)
    return target


def unpack(directory: str | os.PathLike) -> pathlib.Path | None:
    """The run that a packed folder, or the name of one that comes with the package, is unpacked to; None: it is none.

    Raises:
      ValueError: the folder is damaged.
    """
    folder = pathlib.Path(directory)
    if not folder.exists() and os.fspath(directory) in shipped():
        folder = ASSETS / os.fspath(directory)
    if not _is_packed(folder):
        return None
    digest = hashlib.sha256()
    for name in (WEIGHTS, ABOUT, TEXT):
        digest.update((folder / name).read_bytes() if (folder / name).exists() else b"")
    place = cache_folder() / f"unpacked-{folder.resolve().name}-{digest.hexdigest()[:12]}"
    place = _temporary.get(place, place)
    if (place / _CHECKPOINTS).is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        made = pathlib.Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as error:
        made = pathlib.Path(tempfile.mkdtemp(prefix=f"alto_jax-{place.name}-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        warnings.warn(f"{place.parent} cannot be written ({error.strerror}): unpacked for this run alone", stacklevel=2)
        _temporary[place], place = made, made
    _write_run(folder, made)
    if made != place:
        try:
            made.rename(place)
        except OSError:  # another process was faster
            shutil.rmtree(made, ignore_errors=True)
            if not (place / _CHECKPOINTS).is_dir():
                raise
    return place


def _write_run(folder: pathlib.Path, made: pathlib.Path) -> None:
    from safetensors import SafetensorError, safe_open  # late: only unpacking reads

    from alto_jax.checkpoint import rows  # late: as in `pack`

    try:
        meta = json.loads((folder / ABOUT).read_text())
        with safe_open(folder / WEIGHTS, "numpy") as file:
            arrays = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: a damaged packed checkpoint: {error}") from error

    def fill(sinks: dict[str, Any]) -> None:
        for name, sink in sinks.items():
            sink[...] = arrays[name]

    rows.save_params(made, {name: (a.shape, a.dtype) for name, a in arrays.items()}, fill, meta)
    if (folder / TEXT).exists():
        shutil.copy(folder / TEXT, made / TEXT)


def _is_packed(folder: pathlib.Path) -> bool:
    return (folder / WEIGHTS).is_file() and (folder / ABOUT).is_file()


foreign.unpackers.append(unpack)
