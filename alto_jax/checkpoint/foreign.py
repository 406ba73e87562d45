"""What a path is that is no run's directory: a URL to fetch, a packed checkpoint to unpack, or, in words, PyTorch
weights to import first, or one step's folder."""

from collections.abc import Callable
import os
import pathlib

from alto_jax.storage import bucket, fetched

WEIGHTS, ABOUT = "model.safetensors", "model.json"  # of a packed checkpoint, see packed.py
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

# Directory → the run that it is unpacked to, None: it is not of this form. Filled by what stands above, see packed.py.
unpackers: list[Callable[[str | os.PathLike], pathlib.Path | None]] = []


def run_of(directory: str | os.PathLike, step: int | None = None) -> pathlib.Path:
    """The run that a path stands for, on this machine: of a URL what it is fetched to (with a step, None: the newest);
    the one that a packed checkpoint is unpacked to; else the path itself."""
    if bucket.is_url(directory):
        directory = fetched.run(os.fspath(directory), "checkpoint", step, (WEIGHTS, ABOUT))
    return next((run for unpack in unpackers if (run := unpack(directory))), pathlib.Path(directory))


def explain(path: pathlib.Path) -> str | None:
    """One line that says what to do with a path which holds no checkpoint of ours, None if nothing is known of it."""
    if path.name == "checkpoints" or (path / "checkpoints").is_dir():
        return None
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return (
            f"{path}: one step of a run; give the run's directory and the step: {path.parent.parent} --step {path.name}"
        )
    is_file = path.is_file() and path.suffix in _WEIGHTS
    inside = [file.name for file in path.iterdir()] if path.is_dir() else []
    has_weights = any(name.endswith((*_WEIGHTS, ".index.json")) for name in inside)
    if is_file or has_weights or "adapter_config.json" in inside:
        return (
            f"{path}: PyTorch weights, no checkpoint of alto_jax; import it first:"
            f" python -m tools.convert_torch_weights import {path} OUT"
            " (alto-convert, outside of a checkout)"
        )
    return None
