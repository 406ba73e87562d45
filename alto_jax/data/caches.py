"""SAM features and mask tokens, computed once by `alto_jax.data.prepare` instead of at every step.

A cache belongs to the parameters that it was computed with. They are frozen where it is used, so that a checkpoint of
any later stage has them still: its identity is a hash of exactly these parameters, not of the checkpoint. The settings
that it depends on beside are kept with it. Both are compared with the run's before training.

Features are stored in bfloat16, as `features` uint16[h, w, F] (the bits); mask tokens as `codes` int32[M, L] and
`code_lengths` int32[M].
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from typing import Any

import numpy as np

from alto_jax.config import ConfigError

# What is cached → the parameters it depends on.
PARAMETERS = {
    "features": r"^tokenizer/sam_encoder/",
    "tokens": r"^tokenizer/(latent_tokens$|encoder/|quantizer/|length/)",
}


def _parameters(directory: str | os.PathLike, what: str) -> dict[str, Any]:
    """The parameters of a checkpoint that a cache depends on, by path, not yet read.

    Raises:
      FileNotFoundError: no complete checkpoint there.
      ValueError: it has no such parameters.
    """
    from alto_jax.checkpoint import rows  # late: keeps the start fast

    found = {p: a for p, a in sorted(rows.open_params(directory).items()) if re.search(PARAMETERS[what], p)}
    if not found:
        raise ValueError(f"{directory}: the checkpoint has no parameters {PARAMETERS[what]!r} to make {what} with")
    return found


def identity(directory: str | os.PathLike, what: str) -> str:
    """Hash of the parameters that a cache depends on: sha256 of their paths, shapes and float32 values.

    Args:
      directory: a run, or a converted checkpoint.
      what: a key of PARAMETERS.

    Raises:
      FileNotFoundError, ValueError: no such checkpoint, or one without these parameters.
    """
    digest = hashlib.sha256()
    for path, array in _parameters(directory, what).items():
        digest.update(f"{path} {array.shape}".encode())
        rows = (array[row] for row in range(array.shape[0])) if len(array.shape) > 2 else (np.asarray(array),)
        for row in rows:
            digest.update(np.ascontiguousarray(row, np.float32).tobytes())
    return digest.hexdigest()[:16]


def settings(model: Any, what: str, kind: str) -> dict[str, Any]:
    """What else a cache depends on, of a ModelConfig and a kind of prepared data set ("masks", "chat")."""
    cfg = model.tokenizer
    if what == "features":
        return {"pixel_input": model.pixel_input if kind == "chat" else "native", "image_size": cfg.image_size}
    names = ("mask_size", "num_latent_tokens", "codebook_size", "legacy_reshape", "length_logit_scale", "length_gate",
             "length_rule")  # fmt: skip
    return {name: getattr(cfg, name) for name in names}


def check(caches: dict[str, Any], config: Any, kind: str, directory: str | os.PathLike | None) -> None:
    """Makes sure that the caches of a data set are what the run would compute.

    Args:
      caches: of `Prepared` or `Mixture`; {} is right for every run.
      config: the run's configuration.
      kind: of the data set.
      directory: the run, if it has a checkpoint; None: what the run begins with.

    Raises:
      ConfigError: other parameters or settings, or parameters that this run trains; names both sides.
    """
    advice = "prepare the data set with this checkpoint, or give --config.data.use_caches=False"
    for what, cache in caches.items():
        if config.data.source == "mixture":
            where = f"config.data.meta: cached {what} in {config.data.meta}"
        else:
            where = f"config.data.root: cached {what} in {config.data.root}"
        for name, wanted in settings(config.model, what, kind).items():
            if cache["settings"][name] != wanted:
                raise ConfigError(
                    f"{where}: made with {name} {cache['settings'][name]!r}, this run has {wanted!r}; {advice}"
                )
        start = directory or config.tokenizer_from or config.init_from
        if not start:
            raise ConfigError(f"{where}: made with {cache['checkpoint']}, but config.init_from is empty; {advice}")
        trained = next((p for p in _parameters(start, what) if re.search(config.optim.trainable, p)), None)
        if trained is not None:
            raise ConfigError(f"{where}: made with {trained}, which config.optim.trainable trains here; {advice}")
        found = identity(start, what)
        if found != cache["identity"]:
            raise ConfigError(
                f"{where}: made with {cache['checkpoint']}, tokenizer parameters {cache['identity']}; those of {start}"
                f" are {found}; {advice}"
            )


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
    """The mask tokenizer of a checkpoint alone."""

    model: Any
    params: Any
    name: str


def _load(directory: str, pixel_input: str | None) -> _Tokenizer:
    """Reads the tokenizer, and nothing else, of a checkpoint of any stage."""
    import jax  # late: keeps the start fast

    from alto_jax.checkpoint import runs
    from alto_jax.config import build
    from alto_jax.mllm.alto_llm import ModelConfig, init_params
    from alto_jax.parallel import sharding

    root, step = runs.find_run(directory)
    meta = runs.load_meta(root)
    model = build(ModelConfig, meta["model"], f"{root}: model")
    model = dataclasses.replace(model, vision=None, language_model=None, pixel_input=pixel_input or model.pixel_input)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)), shapes
    )
    params = runs.load_params(root, abstract)
    runs.require_complete(params, abstract, directory)
    return _Tokenizer(model, params, f"{meta['stage']} step {step} in {root.name}")


class CacheMaker:
    """Computes what is cached, one image at a time: the same values however the work is cut up.

    Attributes:
      manifest: {what: {"identity", "settings", "checkpoint"}}, as `check` wants it.
    """

    def __init__(
        self, kind: str, sizes: dict[str, int], features: str = "", tokens: str = "", pixel_input: str | None = None
    ):
        """Loads the tokenizers.

        Args:
          kind: of the prepared data set.
          sizes: of the prepared images and masks.
          features, tokens: the checkpoints to compute them with; "" does not.
          pixel_input: of the later training ("mllm" or "native"); None takes the checkpoint's.

        Raises:
          ConfigError: a kind that has no use for them, or sizes other than the model's.
        """
        chosen = {"features": features, "tokens": tokens}
        self.manifest, self._loaded = {}, {}
        for what, directory in chosen.items():
            if not directory:
                continue
            flag = f"--cache-{what}"
            if kind not in {"features": ("masks", "chat"), "tokens": ("chat",)}[what]:
                raise ConfigError(f"{flag}: a data set of kind {kind!r} has no use for them")
            loaded = _load(directory, pixel_input)
            cfg = loaded.model.tokenizer
            if what == "features" and cfg.sam is None:
                raise ConfigError(f"{flag}: the tokenizer of {directory} has no image encoder")
            for name, wanted in (("image_size", cfg.image_size), ("mask_size", cfg.mask_size)):
                if sizes[name] != wanted:
                    raise ConfigError(
                        f"{flag}: --{name.replace('_', '-')} is {sizes[name]}, {directory} wants {wanted}"
                    )
            self._loaded[what] = loaded
            self.manifest[what] = {
                "identity": identity(directory, what),
                "settings": settings(loaded.model, what, kind),
                "checkpoint": loaded.name,
            }
        self._kind = kind

    @functools.cached_property
    def _features(self) -> Any:
        import jax  # late: keeps the start fast
        import jax.numpy as jnp

        from alto_jax.layers import apply_module, told_precision
        from alto_jax.mllm.alto_llm import sam_input
        from alto_jax.tokenizer.alto import ALTo

        model = self._loaded["features"].model
        is_chat = self._kind == "chat"

        @jax.jit
        def compute(params: Any, image: jax.Array, pixel_image: jax.Array) -> jax.Array:
            pixels = sam_input(model, image, pixel_image) if is_chat else pixel_image
            with told_precision(model.matmul_precision):
                features = apply_module(ALTo(model.tokenizer), params["tokenizer"], pixels, method="image_features")
            return features.astype(jnp.bfloat16)

        return compute

    @functools.cached_property
    def _tokens(self) -> Any:
        import jax  # late: keeps the start fast

        from alto_jax.layers import apply_module, told_precision
        from alto_jax.tokenizer.alto import ALTo

        model = self._loaded["tokens"].model

        @jax.jit
        def compute(params: Any, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
            with told_precision(model.matmul_precision):
                return apply_module(ALTo(model.tokenizer), params["tokenizer"], mask, method="tokenize")

        return compute

    def __call__(self, image: np.ndarray, pixel_image: np.ndarray, masks: list[np.ndarray]) -> dict[str, np.ndarray]:
        """The cached fields of one record.

        Args:
          image, pixel_image: uint8[V, V, 3] and uint8[S, S, 3] as stored (kind "masks": the same one twice).
          masks: uint8[H, H] each, as stored.

        Returns:
          features, codes and code_lengths (see the module's docstring), those that were asked for.
        """
        found: dict[str, np.ndarray] = {}
        if "features" in self._loaded:
            features = self._features(self._loaded["features"].params, image[None], pixel_image[None])
            found["features"] = np.asarray(features)[0].view(np.uint16)
        if "tokens" in self._loaded:
            loaded = self._loaded["tokens"]
            rows = [self._tokens(loaded.params, mask[None].astype(np.float32) / np.float32(255)) for mask in masks]
            num_latent_tokens = loaded.model.tokenizer.num_latent_tokens
            found["codes"] = np.array([r[0][0] for r in rows], np.int32).reshape(-1, num_latent_tokens)
            found["code_lengths"] = np.array([r[1][0] for r in rows], np.int32)
        return found


def same(caches: dict[str, dict]) -> dict[str, Any]:
    """The caches that all data sets of a mixture have alike.

    Args:
      caches: name of the data set → its caches.

    Raises:
      ValueError: they differ; batches need the same fields in every row.
    """
    essence = {
        name: json.dumps({what: [c["identity"], c["settings"]] for what, c in found.items()}, sort_keys=True)
        for name, found in caches.items()
    }
    first = next(iter(caches))
    other = next((name for name in caches if essence[name] != essence[first]), None)
    if other is not None:
        raise ValueError(
            f"{first} and {other} have different caches ({essence[first]}, {essence[other]});"
            " give --config.data.use_caches=False"
        )
    return caches[first]
