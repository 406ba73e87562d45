"""Transformer parts shared by the mask tokenizer, the SAM encoder, InternViT and the language model.

Everything works on `[B, T, D]` activations, computes in `dtype` and keeps parameters in `param_dtype`;
norms and softmax are computed in float32. Dimension letters: see `alto_jax.batch`.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import math
from typing import Any

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.attention.seam import EVERYTHING, Mask, attention
from alto_jax.parallel.sharding import constrain

Array = jax.Array
REMAT_POLICIES = ("none", "full", "dots")
PRECISIONS = ("", "default", "high", "highest")
HIGHEST = jax.lax.Precision.HIGHEST


def told_precision(precision: str) -> contextlib.AbstractContextManager:
    """While a function is traced in this `with` block, matrix products have the precision told, whatever their type.

    Args:
      precision: `model.matmul_precision`; "" tells nothing, so that each part of the model goes by its own type.

    Raises:
      ValueError: another word than those of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"matmul_precision: expected one of {PRECISIONS}, got {precision!r}")
    return jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()


def exact_in_float32(method: Callable) -> Callable:
    """A module's method whose matrix products are float32 throughout if the module computes in float32.

    GPUs and TPUs by default round the operands of float32 products to 10 or 7 bits. `told_precision` (and JAX's own
    setting, jax_default_matmul_precision) has the last word. The type is the module's `dtype`, or its `cfg.dtype`.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = self.cfg.dtype if hasattr(self, "cfg") else self.dtype
        told = jax.config.jax_default_matmul_precision is not None  # type: ignore[attr-defined]
        with told_precision("highest" if jnp.dtype(dtype) == jnp.float32 and not told else ""):
            return method(self, *args, **kwargs)

    return wrapped


class Module(nn.Module):
    """A module that reads a parameter of the shape asked for as it is.

    Note: Linen traces the initialiser again for every parameter of every call, to see that the shapes agree: a tenth
    of what a program takes to trace. It still does where they differ, and so says what is wrong.
    """

    @nn.nowrap
    def param(self, name: str, init_fn: Callable, *init_args: Any, **kwargs: Any) -> Any:
        if init_args and self.has_variable("params", name):
            value: Any = self.get_variable("params", name)
            if np.shape(value) == init_args[0]:
                return value
        return super().param(name, init_fn, *init_args, **kwargs)


class Dense(Module, nn.Dense):
    """Linen's, as a `Module`."""


class DenseGeneral(Module, nn.DenseGeneral):
    """Linen's, as a `Module`."""


class LayerNorm(Module, nn.LayerNorm):
    """Linen's, as a `Module`."""


class RMSNorm(Module):
    """Root-mean-square norm over the last axis, computed in float32, scaled after the cast back."""

    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return x32.astype(self.dtype) * scale.astype(self.dtype)


def layer_norm(eps: float, dtype: Any, param_dtype: Any, name: str | None = None, **kwargs: Any) -> nn.Module:
    """Layer norm over the last axis with the biased variance that PyTorch uses.

    Note: Linen's default "fast" variance E[x^2] - E[x]^2 loses digits that the golden tests see.
    """
    return LayerNorm(epsilon=eps, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, name=name, **kwargs)


def apply_module(module: nn.Module, params: Any, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
    """What a method of a module (None: `__call__`) gives with `params`.

    Note: `Module.apply` by its types may also give changed collections; nothing here asks it for any.
    """
    return module.apply({"params": params}, *args, method=method, **kwargs)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU, computed in float32.

    Note: `jax.nn.gelu` takes erfc, which costs three times as much, and rounds between its steps in 16 bits.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)


class PatchEmbed(Module):
    """Each square of `patch` x `patch` positions through one dense layer: [B, H, W, C] → [B, H/p, W/p, features].

    A convolution whose stride is its width, with its parameters (kernel [patch, patch, C, features], bias), as the
    matrix product that it is. Rows and columns that fill no square are left out.
    """

    features: int
    patch: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.patch, self.patch, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
        rows, columns = (side // self.patch for side in x.shape[1:3])
        x = x[:, : rows * self.patch, : columns * self.patch].astype(self.dtype)
        x = einops.rearrange(x, "b (y p) (x q) c -> b y x (p q c)", p=self.patch, q=self.patch)
        return x @ kernel.astype(self.dtype).reshape(-1, self.features) + bias.astype(self.dtype)


class BiasApart(Module):
    """A dense layer [..., D] → [..., features...] that leaves its bias to the caller: `bias()`, once it was called.

    Its parameters are those of `nn.DenseGeneral`.
    """

    features: Sequence[int]
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = nn.initializers.lecun_normal()
        flat = x.shape[-1], math.prod(self.features)  # Note: initialisers read the fan-in off a matrix.
        init = lambda key, shape, dtype: dense(key, flat, dtype).reshape(shape)
        kernel = self.param("kernel", init, (flat[0], *self.features), self.param_dtype)
        self.param("bias", nn.initializers.zeros_init(), tuple(self.features), self.param_dtype)
        return jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), 1)

    def bias(self) -> Array:
        """[features...], in the type of the computation."""
        return self.get_variable("params", "bias").astype(self.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention of the vision transformers, with one packed q/k/v projection.

    `qk_norm_eps`: if set, RMSNorm over the full width of q and of k before the heads are split
    (InternViT-6B). `attention`: one of `attention.seam.IMPLEMENTATIONS`.
    """

    num_heads: int
    qkv_bias: bool = True
    qk_norm_eps: float | None = None
    attention: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, mask: Mask = EVERYTHING) -> Array:
        width = x.shape[-1]
        head_dim = width // self.num_heads
        qkv = DenseGeneral(
            (3, self.num_heads, head_dim), use_bias=self.qkv_bias, dtype=self.dtype,
            param_dtype=self.param_dtype, kernel_init=self.kernel_init, name="qkv",
        )(x)  # fmt: skip
        qkv = constrain(qkv, "batch", ..., "heads", None)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        eps = self.qk_norm_eps
        if eps is not None:

            def normalise(y: Array, name: str) -> Array:
                flat = y.reshape(*y.shape[:-2], width)
                return RMSNorm(eps, self.dtype, self.param_dtype, name=name)(flat).reshape(y.shape)

            q, k = normalise(q, "q_norm"), normalise(k, "k_norm")
        out = attention(q, k, v, mask=mask, implementation=self.attention)
        return DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name="out",
        )(out)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    mlp_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kwargs: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init)
        hidden = constrain(Dense(self.mlp_dim, name="fc1", **kwargs)(x), "batch", ..., "mlp")
        return Dense(x.shape[-1], name="fc2", **kwargs)(gelu(hidden))


class ViTBlock(Module):
    """Pre-norm transformer block: `x += ls1 * attn(norm1(x)); x += ls2 * mlp(norm2(x))`.

    `layer_scale`: initial value of the learned ls1, ls2 (None leaves them out). `rms_norm` chooses
    RMSNorm instead of LayerNorm. `attention`: see `SelfAttention`. Called with x [B, T, D], a `Mask` and
    `drop_path` float[2, B] (or None): factors of the two branches, 0 or 1/keep. Returns (x, None), as
    `Stack` wants it.
    """

    num_heads: int
    mlp_dim: int
    norm_eps: float
    rms_norm: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    attention: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, mask: Mask = EVERYTHING, drop_path: Array | None = None) -> tuple[Array, None]:
        types: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def norm(name: str) -> nn.Module:
            if self.rms_norm:
                return RMSNorm(self.norm_eps, name=name, **types)
            return layer_norm(self.norm_eps, self.dtype, self.param_dtype, name=name)

        def residual(x: Array, branch: Array, index: int) -> Array:
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                branch = branch * self.param(f"ls{index + 1}", init, (x.shape[-1],), self.param_dtype).astype(x.dtype)
            if drop_path is not None:
                branch = branch * drop_path[index, :, None, None].astype(x.dtype)
            return constrain(x + branch, "batch", ...)

        attn = SelfAttention(
            self.num_heads, self.qkv_bias, self.norm_eps if self.qk_norm else None, self.attention,
            kernel_init=self.kernel_init, name="attn", **types,
        )  # fmt: skip
        x = residual(x, attn(norm("norm1")(x), mask), 0)
        x = residual(x, Mlp(self.mlp_dim, kernel_init=self.kernel_init, name="mlp", **types)(norm("norm2")(x)), 1)
        return x, None


class Stack(nn.Module):
    """`num_layers` equal blocks with parameters stacked on a leading axis, applied by `lax.scan`.

    Compile time does not grow with depth, and a slice of the stack can be applied alone. Parameters that `unstacked`
    made are applied one after the other without a loop: for a program that applies the whole stack in a loop of its
    own, where a slice of a stacked array would be copied in every iteration.

    Attributes:
      make_block: called as `make_block(parent=None)`; the block's `__call__(carry, *shared, *per_layer)`
        returns `(carry, y)`. The carry is the activation or any tree that starts with it.
      num_layers: length of the stack.
      remat: "none" keeps all activations for the backward pass, "full" none but the carries, "dots" the
        results of matrix products and of cuDNN's attention.
      unroll: blocks per iteration of the scan (num_layers: no loop at all).
    """

    make_block: Callable[..., nn.Module]
    num_layers: int
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self, carry: Any, *shared: Any, per_layer: tuple = (), start: int = 0, stop: int | None = None
    ) -> tuple[Any, Any]:
        """Applies blocks start..stop-1.

        Args:
          carry: what goes through the blocks.
          *shared: arguments that every block receives.
          per_layer: trees whose leaves have a leading axis of `stop - start`; block i receives row i. Each may be
            a tuple of rows instead if the parameters are.

        Returns:
          (carry, ys): ys stacks what the blocks returned beside the carry; a tuple if the parameters are one.
        """
        block = self.make_block(parent=None)
        stop = self.num_layers if stop is None else stop

        def init(key: Array) -> Any:
            row = jax.tree.map(lambda a: a[0], per_layer)
            return jax.vmap(lambda k: block.init(k, carry, *shared, *row)["params"])(
                jax.random.split(key, self.num_layers)
            )

        # Note: `self.param` would trace `init` again at every call only to check shapes.
        params = (
            self.get_variable("params", "layers")
            if self.has_variable("params", "layers")
            else self.param("layers", init)
        )

        if stop <= start:
            return carry, None
        if isinstance(params, tuple):
            return self._loop(carry, params[start:stop], *shared, per_layer=per_layer)
        return self.scan(carry, jax.tree.map(lambda a: a[start:stop], params), *shared, per_layer=per_layer)

    def _loop(self, carry: Any, params: tuple, *shared: Any, per_layer: tuple = ()) -> tuple[Any, tuple]:
        """Applies the blocks of a tuple of parameters; the rest as in `__call__`."""
        block, ys = self.make_block(parent=None), []
        extras = [tree if isinstance(tree, tuple) else unstacked(tree, len(params)) for tree in per_layer]
        for layer, *extra in zip(params, *extras, strict=True):
            carry, y = block.apply({"params": layer}, carry, *shared, *extra)
            ys.append(y)
        return carry, tuple(ys)

    def scan(self, carry: Any, params: Any, *shared: Any, per_layer: tuple = ()) -> tuple[Any, Any]:
        """Applies as many blocks as `params` has rows; the rest as in `__call__`."""
        block = self.make_block(parent=None)

        def body(carry: Any, row: tuple[Any, Any]) -> Any:
            layer, extra = row
            return block.apply({"params": layer}, carry, *shared, *extra)

        if self.remat == "full":
            body = jax.checkpoint(body, prevent_cse=False)
        elif self.remat == "dots":
            body = jax.checkpoint(body, prevent_cse=False, policy=_is_product)
        elif self.remat != "none":
            raise ValueError(f"remat: expected one of {REMAT_POLICIES}, got {self.remat!r}")
        num_layers = jax.tree.leaves(params)[0].shape[0]
        return jax.lax.scan(body, carry, (params, per_layer), unroll=min(self.unroll, num_layers))


def _is_product(primitive: Any, *args: Any, **params: Any) -> bool:
    """Whether `remat="dots"` keeps what a primitive gives."""
    # Note: cuDNN's gradients take the result and its sums; with these kept the forward pass is not run again.
    is_attention = primitive.name.startswith("dot_product_attention_fwd")
    return is_attention or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


def unstacked(tree: Any, num_layers: int) -> tuple[Any, ...]:
    """The rows of a tree whose leaves have a leading axis of `num_layers`, as trees of their own."""
    row = lambda i: jax.tree.map(lambda a: a[i], tree)
    return tuple(row(i) for i in range(num_layers))


def alternate(x: Array, stacks: Sequence[Stack], counts: Sequence[int]) -> Array:
    """Applies counts[0] blocks of the first stack, counts[1] of the second and so on, again and again to their ends.

    One loop around one loop a stack: each kind of block is compiled once, however often they take turns. Not for
    initialisation, since the stacks must have their parameters.

    Args:
      x: the activation.
      stacks: of blocks that take nothing else; each has the same number of times its count in layers.
    """
    split = lambda count: lambda a: a.reshape(-1, count, *a.shape[1:])
    rows = [jax.tree.map(split(n), stack.get_variable("params", "layers")) for stack, n in zip(stacks, counts)]

    def body(x: Array, rows: list[Any]) -> tuple[Array, None]:
        for stack, row in zip(stacks, rows):
            x, _ = stack.scan(x, row)
        return x, None

    return jax.lax.scan(body, x, rows)[0]


@contextlib.contextmanager
def adapted(scale: float) -> Iterator[None]:
    """While a function is traced in this `with` block, dense layers that have `lora_a` and `lora_b` beside their kernel
    (whatever that is: of 8 bits, too) give scale * (x A) B more; see `alto_jax.lora`."""

    def intercept(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        out, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or not module.has_variable("params", "lora_a"):
            return out
        x, dtype = args[0], module.dtype or args[0].dtype
        factor: Callable[[str], Array] = lambda name: module.get_variable("params", name).astype(dtype)
        a, b, precision = factor("lora_a"), factor("lora_b"), getattr(module, "precision", None)
        low = jnp.tensordot(x.astype(dtype), a, a.ndim - 1, precision=precision)
        return out + scale * jnp.tensordot(low, b, 1, precision=precision).astype(out.dtype)

    with nn.intercept_methods(intercept):
        yield


def rope_frequencies(head_dim: int, theta: float | Array) -> Array:
    """Inverse frequencies theta^(-2i/Hd), float32[Hd / 2]."""
    return 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))


def apply_rope(x: Array, positions: Array, inv_freq: Array) -> Array:
    """Rotary position embedding in the "rotate half" form.

    Args:
      x: [B, T, N, Hd]; positions: int32[B, T]; inv_freq: float32[Hd / 2].

    Returns:
      [B, T, N, Hd] in x's dtype; the angles are computed in float32.
    """
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def sincos_position_embedding(grid: int, width: int) -> Array:
    """Two-dimensional sine-cosine embedding of a grid, float32[grid * grid, width], in -1..1.

    Source: ViT without class tokens (MoCo v3 form): a quarter of the width each for sin/cos of y and x.
    """
    y, x = jnp.meshgrid(jnp.arange(grid, dtype=jnp.float32), jnp.arange(grid, dtype=jnp.float32), indexing="ij")
    omega = 1.0 / (10000.0 ** (jnp.arange(width // 4, dtype=jnp.float32) / max(width // 4, 1)))
    parts = [f(p.reshape(-1, 1) * omega) for p in (y, x) for f in (jnp.sin, jnp.cos)]
    table = jnp.concatenate(parts, axis=-1)
    return jnp.pad(table, ((0, 0), (0, width - table.shape[-1])))
