"""Pixel decoder: features of the mask's patches [B, g, g, Z] → pixels [B, s*g, s*g, 3], s = `upscale`.

The convolutional decoder of MaskGIT's VQGAN, without its codebook: residual blocks at every resolution,
nearest-neighbour upsampling between them. Source: ALTo, section 3.3 (layers from TiTok);
reference/NUMERICS.md §3.6.
"""

import dataclasses
from typing import Any, Literal

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from alto_jax import layers
from alto_jax.config import require
from alto_jax.parallel.sharding import constrain

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
    """Sizes of the pixel decoder; the defaults are the paper's.

    Attributes:
      z_channels: Z, channels of the input.
      hidden_channels: channels at the highest resolution, times channel_mult[0].
      channel_mult: channel factor of each level; level 0 has the highest resolution, so there are
        len(channel_mult) - 1 doublings.
      num_res_blocks: residual blocks of the middle and of each level.
      num_groups: groups of the group norms (fewer where there are fewer channels).
      out_channels: channels of the output image.
      out_patch: r, side of the square of pixels that the last convolution gives at each position; 1 in
        the paper. Small models reach the mask's size with fewer convolutions at high resolution.
      legacy_shortcut: Compat: a block that changes the number of channels adds a 1x1 convolution of its
        *own output* and drops its input, as published weights expect; False: of its input.
    """

    z_channels: int = 1024
    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    num_groups: int = 32
    out_channels: int = 3
    out_patch: int = 1
    legacy_shortcut: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("z_channels", "hidden_channels", "num_res_blocks", "num_groups", "out_channels", "out_patch"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(len(self.channel_mult) >= 1 and min(self.channel_mult) >= 1, "channel_mult", self.channel_mult,
                "one or more factors of at least 1")  # fmt: skip
        for mult in self.channel_mult:
            channels = mult * self.hidden_channels
            require(channels % min(self.num_groups, channels) == 0, "num_groups", self.num_groups,
                    f"a divisor of the {channels} channels of a level")  # fmt: skip

    @property
    def upscale(self) -> int:
        """s: pixels of the output along a side for each input position."""
        return 2 ** (len(self.channel_mult) - 1) * self.out_patch


class Conv(layers.Module, nn.Conv):
    """Linen's, as a `layers.Module`."""


class GroupNorm(layers.Module, nn.GroupNorm):
    """Linen's, as a `layers.Module`."""


def _types(cfg: PixelDecoderConfig) -> dict[str, Any]:
    return {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}


def _group_norm(cfg: PixelDecoderConfig, channels: int, name: str) -> nn.Module:
    # Note: the fast variance E[x^2] - E[x]^2 loses digits that the golden tests see.
    groups = min(cfg.num_groups, channels)
    return GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, name=name, **_types(cfg))


def upsample_nearest(x: Array) -> Array:
    """[B, H, W, D] → [B, 2H, 2W, D], every position repeated in a 2x2 square."""
    return einops.repeat(x, "b y x d -> b (y dy) (x dx) d", dy=2, dx=2)


def depth_to_space(x: Array, patch: int) -> Array:
    """[B, H, W, r*r*D] → [B, r*H, r*W, D]; the channels are ordered (dy, dx, D), r = patch."""
    return einops.rearrange(x, "b y x (dy dx d) -> b (y dy) (x dx) d", dy=patch, dx=patch)


class ResBlock(nn.Module):
    """conv(silu(norm(.))) twice with a shortcut: [B, H, W, in] → [B, H, W, channels]."""

    cfg: PixelDecoderConfig
    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kwargs = {"use_bias": False, **_types(self.cfg)}
        h = nn.silu(_group_norm(self.cfg, x.shape[-1], "norm1")(x))
        h = Conv(self.channels, (3, 3), name="conv1", **kwargs)(h)
        h = constrain(h, "batch", ...)
        h = nn.silu(_group_norm(self.cfg, self.channels, "norm2")(h))
        h = constrain(Conv(self.channels, (3, 3), name="conv2", **kwargs)(h), "batch", ...)
        if x.shape[-1] == self.channels:
            return x + h
        # Compat: the reference feeds the shortcut with h, so x reaches the output only through h.
        shortcut = Conv(self.channels, (1, 1), name="nin_shortcut", **kwargs)
        return h + shortcut(h if self.cfg.legacy_shortcut else x)


class UpLevel(nn.Module):
    """The residual blocks of one resolution and, if `upsample`, a doubling of the resolution after them."""

    cfg: PixelDecoderConfig
    channels: int
    upsample: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.cfg.num_res_blocks):
            x = ResBlock(self.cfg, self.channels, name=f"block_{i}")(x)
        if self.upsample:
            x = Conv(self.channels, (3, 3), name="upsample_conv", **_types(self.cfg))(upsample_nearest(x))
            x = constrain(x, "batch", ...)
        return x


class PixelDecoder(nn.Module):
    """See the module's docstring. Parameters: conv_in, mid_{i}, up_{level}/block_{i}, norm_out, conv_out."""

    cfg: PixelDecoderConfig

    @layers.exact_in_float32
    @nn.compact
    def __call__(self, x: Array, return_hidden: bool = False) -> Array | tuple[Array, list[Array]]:
        """Decodes.

        Args:
          x: float[B, g, g, Z].
          return_hidden: also return what conv_in, each mid block, each level (lowest resolution first)
            and norm_out give.

        Returns:
          float[B, s*g, s*g, out_channels] in cfg.dtype, not clipped to 0..1; with the list if asked for.
        """
        cfg = self.cfg
        x = Conv(cfg.hidden_channels * cfg.channel_mult[-1], (3, 3), name="conv_in", **_types(cfg))(x)
        x = constrain(x, "batch", ...)
        hidden = [x]
        for i in range(cfg.num_res_blocks):
            x = ResBlock(cfg, x.shape[-1], name=f"mid_{i}")(x)
            hidden.append(x)
        for level in reversed(range(len(cfg.channel_mult))):
            x = UpLevel(cfg, cfg.hidden_channels * cfg.channel_mult[level], upsample=level > 0, name=f"up_{level}")(x)
            hidden.append(x)
        x = _group_norm(cfg, x.shape[-1], "norm_out")(x)
        hidden.append(x)
        # Note: a new model starts at 0.5 (mask logit 0) everywhere, up to a little noise that lets gradients through.
        conv_out = Conv(
            cfg.out_channels * cfg.out_patch**2, (3, 3), kernel_init=nn.initializers.normal(1e-3),
            bias_init=nn.initializers.constant(0.5), name="conv_out", **_types(cfg),
        )  # fmt: skip
        x = depth_to_space(constrain(conv_out(nn.silu(x)), "batch", ...), cfg.out_patch)
        return (x, hidden) if return_hidden else x
