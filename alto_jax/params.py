"""Parameters as nested dicts of arrays, addressed by paths "a/b/c": joined, split and cast."""

import re

from flax import traverse_util


def split_params(params: dict, trainable: str) -> tuple[dict, dict]:
    """Splits a nested dict by a regex on "a/b/c" paths into (trainable, frozen).

    Raises:
      ValueError: the regex matches no parameter.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = {path for path in flat if re.search(trainable, path)}
    if not chosen:
        raise ValueError(f"config.optim.trainable: {trainable!r} matches no parameter; top level: {sorted(params)}")

    def pick(keep: bool) -> dict:
        return traverse_util.unflatten_dict({p: v for p, v in flat.items() if (p in chosen) == keep}, sep="/")

    return pick(True), pick(False)


def merge_params(*trees: dict) -> dict:
    """Joins nested dicts with disjoint leaves."""
    flat: dict = {}
    for tree in trees:
        flat.update(traverse_util.flatten_dict(tree, sep="/"))
    return traverse_util.unflatten_dict(flat, sep="/")


def cast(params: dict, dtype: str, *, keep: str = "^$") -> dict:
    """The parameters in `dtype` ("": as they are), but for paths that match the regex `keep`."""
    if not dtype:
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict(
        {p: v if re.search(keep, p) else v.astype(dtype) for p, v in flat.items()}, sep="/"
    )
