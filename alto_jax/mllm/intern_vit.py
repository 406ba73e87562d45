"""InternViT, pixel shuffle and the projector: normalised image [B, V, V, 3] → tokens of the language model.

`InternViT` gives patch features [B, P, D]; `pixel_shuffle` merges squares of patches into one token with
all their channels; `Projector` maps these to the language model's width. Both published forms are built:
300M (layer norm) and 6B (RMS norm, norms of q and k). Source: InternVL 2.5; reference/NUMERICS.md §5.
"""

import dataclasses
import functools
from typing import Any, Literal

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from alto_jax import layers
from alto_jax.attention.seam import EVERYTHING
from alto_jax.config import require
from alto_jax.parallel.sharding import constrain
from alto_jax.tokenizer.resize import resize
from alto_jax.tokenizer.sam_encoder import IMAGENET_MEAN, IMAGENET_STD

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class InternViTConfig:
    """Sizes of the vision transformer; the defaults are InternViT-300M.

    Attributes:
      image_size: V, pixels along a side (other sizes have the position embedding resized).
      norm_type, qkv_bias, qk_norm: "layer_norm", True, False for 300M; "rms_norm", False, True for 6B.
      layer_scale_init: initial value of the learned factors of both branches.
      drop_path_rate: the probability that a sample skips a branch rises linearly to this at the last
        layer; used only when a key is given.
      select_layer: which hidden state is returned: -1 the last, 0 the embedding, n after n layers.
    """

    image_size: int = 448
    patch_size: int = 14
    embed_dim: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale_init: float = 0.1
    norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    select_layer: int = -1
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    attention: Literal["auto", "xla", "flash"] = "auto"

    def __post_init__(self) -> None:
        for name in ("patch_size", "embed_dim", "num_layers", "num_heads", "mlp_dim"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.image_size >= self.patch_size and self.image_size % self.patch_size == 0, "image_size",
                self.image_size, f"a multiple of patch_size {self.patch_size}")  # fmt: skip
        require(
            self.embed_dim % self.num_heads == 0, "embed_dim", self.embed_dim, f"a multiple of {self.num_heads} heads"
        )
        require(self.norm_type in ("layer_norm", "rms_norm"), "norm_type", self.norm_type, "'layer_norm' or 'rms_norm'")
        require(0 <= self.drop_path_rate < 1, "drop_path_rate", self.drop_path_rate, "at least 0 and below 1")
        require(-self.num_layers - 1 <= self.select_layer <= self.num_layers, "select_layer", self.select_layer,
                f"an index of {self.num_layers + 1} hidden states")  # fmt: skip

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


def drop_path_factors(key: Array, rate: float, num_layers: int, batch: int) -> Array:
    """Factors of the residual branches, float32[num_layers, 2, B]: 0 or 1/keep, keep falling to 1 - rate.

    `key`: one random key, or one for each of the B rows, which then does not depend on the others.
    """
    keep = 1.0 - jnp.linspace(0.0, rate, num_layers)[:, None, None]
    if key.ndim == 1:
        one = lambda k: jax.random.bernoulli(k, keep[..., 0], (num_layers, 2))
        return jax.vmap(one, out_axes=2)(key) / keep
    return jax.random.bernoulli(key, keep, (num_layers, 2, batch)) / keep


class InternViT(layers.Module):
    """See the module's docstring."""

    cfg: InternViTConfig

    @layers.exact_in_float32
    @nn.compact
    def __call__(
        self, image: Array, drop_path_key: Array | None = None, return_hidden: bool = False
    ) -> Array | tuple[Array, list[Array]]:
        """Encodes images.

        Args:
          image: float32[B, V, V', 3], ImageNet-normalised, sides multiples of the patch size.
          drop_path_key: random key of the stochastic depth (training), one or one per image, or None.
          return_hidden: also return the hidden states with the class token: the embedding and the result
            of each layer up to select_layer (compiles each layer alone).

        Returns:
          float[B, P, D] in cfg.dtype, patches in row-major order, class token dropped; with the list
          of [B, 1 + P, D] if asked for.
        """
        cfg = self.cfg
        types: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
        if image.ndim != 4 or image.shape[1] % cfg.patch_size or image.shape[2] % cfg.patch_size:
            raise ValueError(f"image: expected [B, V, V, 3] with V a multiple of {cfg.patch_size}, got {image.shape}")
        x = layers.PatchEmbed(cfg.embed_dim, cfg.patch_size, name="patch_embed", **types)(image)
        batch, height, width, dim = x.shape

        normal = nn.initializers.normal(0.02)
        cls = self.param("class_embedding", normal, (dim,), types["param_dtype"])
        position = self.param("position_embedding", normal, (cfg.grid**2 + 1, dim), types["param_dtype"])
        x = x.reshape(batch, height * width, dim)
        x = jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, dim)), x], axis=1)
        x = constrain(x + self._resized(position, height, width).astype(x.dtype), "batch", ...)

        block = functools.partial(
            layers.ViTBlock, num_heads=cfg.num_heads, mlp_dim=cfg.mlp_dim, norm_eps=cfg.norm_eps,
            rms_norm=cfg.norm_type == "rms_norm", qkv_bias=cfg.qkv_bias, qk_norm=cfg.qk_norm,
            layer_scale=cfg.layer_scale_init, attention=cfg.attention, **types,
        )  # fmt: skip
        blocks = layers.Stack(block, cfg.num_layers, remat=cfg.remat, name="blocks")
        stop = cfg.select_layer % (cfg.num_layers + 1)
        factors = None
        if drop_path_key is not None and cfg.drop_path_rate > 0:
            factors = drop_path_factors(drop_path_key, cfg.drop_path_rate, cfg.num_layers, batch)

        hidden = [x]
        for start, end in [(i, i + 1) for i in range(stop)] if return_hidden else [(0, stop)]:
            per_layer = () if factors is None else (factors[start:end],)
            x, _ = blocks(x, EVERYTHING, per_layer=per_layer, start=start, stop=end)
            hidden.append(x)
        return (x[:, 1:], hidden) if return_hidden else x[:, 1:]

    def _resized(self, position: Array, height: int, width: int) -> Array:
        """The position embedding [1 + P, D] for a grid of height x width patches."""
        grid = self.cfg.grid
        if (height, width) == (grid, grid):
            return position
        patches = resize(position[1:].reshape(grid, grid, -1), height, width, "bicubic")
        return jnp.concatenate([position[:1].astype(jnp.float32), patches.reshape(height * width, -1)])


def pixel_shuffle(x: Array, scale: float = 0.5, version: Literal["v1", "v2"] = "v2") -> Array:
    """Merges r x r squares of patches into one with all their channels, r = 1 / scale.

    Args:
      x: [B, H, W, D], H and W multiples of r.
      scale: 1 / r.
      version: "v2"; Compat: "v1" gives the result with rows and columns swapped (early InternVL models).

    Returns:
      [B, H/r, W/r, r*r*D], channels ordered (dy, dx, D); [B, W/r, H/r, ...] for "v1".
    """
    r = round(1 / scale)
    height, width = x.shape[1:3]
    if abs(r * scale - 1) > 1e-6 or height % r or width % r:
        raise ValueError(f"scale: expected 1/r with r a divisor of {height} and {width}, got {scale!r}")
    if version not in ("v1", "v2"):
        raise ValueError(f"version: expected 'v1' or 'v2', got {version!r}")
    rows_and_columns = "y x" if version == "v2" else "x y"
    return einops.rearrange(x, f"b (y dy) (x dx) d -> b {rows_and_columns} (dy dx d)", dy=r, dx=r)


class Projector(nn.Module):
    """From merged patches [B, T, 4D] to the language model's width [B, T, out_dim]: norm, fc1, GELU, fc2."""

    out_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @layers.exact_in_float32
    @nn.compact
    def __call__(self, x: Array) -> Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Compat: this norm has PyTorch's default epsilon, not the vision transformer's.
        x = layers.layer_norm(1e-5, name="norm", **types)(x)
        x = layers.gelu(constrain(layers.Dense(self.out_dim, name="fc1", **types)(x), "batch", ...))
        return constrain(layers.Dense(self.out_dim, name="fc2", **types)(x), "batch", ...)


def imagenet_normalise(image: Array) -> Array:
    """uint8[..., 3], RGB in 0..255 → float32[..., 3], what `InternViT` takes."""
    scaled = image.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
