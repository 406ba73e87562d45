"""Reads PyTorch pickles (.pth, .pt, .bin, .ckpt) with `weights_only=True` alone; the only reader that needs torch."""

from collections.abc import Mapping
from pathlib import Path
import pickle
import re
from typing import Any

import ml_dtypes
import numpy as np

from .files import Entry, SourceError, check_weights, short

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
# Names under which training code puts the weights, the likeliest first.
_WRAPPERS = ("model", "state_dict", "module", "model_state_dict")
_DEEPSPEED = re.compile(r"^(?:bf16_)?(?:zero_pp_rank_|mp_rank_|layer_\d+-model).*states\.pt$|^layer_\d+-model.*\.pt$")
DEEPSPEED_HELP = (
    "DeepSpeed's own form, parts of it per process; make one checkpoint of it first:"
    " python zero_to_fp32.py FOLDER OUT, with the script that lies beside the file `latest`"
)


def is_deepspeed(name: str) -> bool:
    """Whether a file of this name is a part of a DeepSpeed checkpoint."""
    return _DEEPSPEED.match(name) is not None


def pickle_entries(file: Path, entry: str | None = None) -> tuple[dict[str, Entry], dict[str, str]]:
    """(key → Entry, what is not used → why) of a pickle.

    Args:
      file: the pickle.
      entry: dotted name of the state dict in it; None: found by the names that training code uses.

    Raises:
      ImportError: no torch. SourceError: not a file of tensors, or one that would run code.
    """
    check_weights(file, is_safetensors=False)
    state, dropped = _unwrapped(_load(file), file, entry)
    entries = {}
    import torch

    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            dropped[str(key)] = f"not a tensor but {type(value).__name__}"
            continue
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise SourceError(f"{file}: {key} is a sparse, quantised or empty (meta) tensor; save it as a plain one")
        entries[str(key)] = Entry(tuple(value.shape), _dtype(value, file, key), file, lambda t=value: to_numpy(t))
    return entries, dropped


def _load(file: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{file}: a PyTorch pickle; reading it needs torch: pip install 'alto_jax[convert]' (safetensors need none)"
        ) from error
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if is_deepspeed(file.name) or "deepspeed" in str(error):
            raise SourceError(f"{file}: {DEEPSPEED_HELP}") from error
        reason = re.search(r"Unsupported (?:global|operand)[^\n]*|GLOBAL [^\n]*", str(error))
        raise SourceError(
            f"{file}: refused: it is not made of tensors alone and would run code when loaded"
            f" ({reason.group(0).strip() if reason else str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        # Note: damaged pickles surface as almost anything (RuntimeError, EOFError, KeyError, struct.error, …).
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{file}: cut short, or not a PyTorch file: {reason[:200]}") from error
    if not isinstance(state, Mapping):
        raise SourceError(f"{file}: expected a state dict, got {type(state).__name__}")
    return state


def _unwrapped(state: Mapping, file: Path, entry: str | None) -> tuple[Mapping, dict[str, str]]:
    """The state dict inside of what training code saved around it, and what that is."""
    dropped: dict[str, str] = {}
    if entry is not None:
        for part in entry.split("."):
            if not isinstance(state, Mapping) or part not in state:
                names = list(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
                raise SourceError(f"{file}: --entry {entry}: no {part!r} in it; it holds {short(names, 200)}")
            dropped |= {str(key): f"beside `{part}`" for key in state if key != part}
            state = state[part]
        if not isinstance(state, Mapping) or not _holds_tensors(state):
            raise SourceError(f"{file}: --entry {entry}: holds no tensors")
        return state, dropped
    while True:
        groups = [key for key, value in state.items() if isinstance(value, Mapping) and _holds_tensors(value)]
        name = next((name for name in _WRAPPERS if name in groups), None)
        if name is None and groups and not _has_tensors(state):
            if len(groups) > 1:
                raise SourceError(
                    f"{file}: several groups of tensors, {short(groups, 200)}; name one with --entry NAME"
                )
            name = groups[0]
        if name is None:
            break
        dropped |= {str(key): f"beside the state dict in `{name}`" for key in state if key != name}
        state = state[name]
    if not _has_tensors(state):
        if is_deepspeed(file.name) or any(str(key).startswith("ds_") for key in state):
            raise SourceError(f"{file}: {DEEPSPEED_HELP}")
        raise SourceError(f"{file}: holds no tensors, only {short(list(map(str, state)), 200)}")
    return state, dropped


def _has_tensors(state: Mapping) -> bool:
    import torch

    return any(isinstance(value, torch.Tensor) for value in state.values())


def _holds_tensors(state: Mapping, depth: int = 4) -> bool:
    """Whether there are tensors in a mapping, or in those inside of it."""
    inner = (value for value in state.values() if isinstance(value, Mapping))
    return _has_tensors(state) or (depth > 0 and any(_holds_tensors(value, depth - 1) for value in inner))


def _dtype(tensor: Any, file: Path, key: str) -> np.dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, None) or name)
    except TypeError as error:
        raise SourceError(f"{file}: {key} has dtype {name}, which is not known here") from error


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as a numpy array, bfloat16 included."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
