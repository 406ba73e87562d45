"""The language model's dense layers, whose kernels may have 8 bits: y = (x · kernel) * kernel_scale.

A kernel of 8 bits (`params.quantized`) has its outputs first and a scale for each of them beside it,
`.../q/kernel_scale` beside `.../q/kernel_t`; a layer sees by that what it is given. A module of our own, since qwix
0.1.8 finds weights by following them from `Module.param` into JAX's functions, and loses those of stacks, whose blocks
are applied to slices.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from alto_jax.layers import Module
from alto_jax.parallel.sharding import constrain

Array = jax.Array
FEW_ROWS = 4
LONG = 4096  # inputs that are added up at once
MANY_ROWS = 256


def quantized_dot(x: Array, kernel: Array, scale: Array, out_dtype: Any = None) -> Array:
    """The product of activations and a kernel of 8 bits, accumulated in float32.

    What bounds a loop of tokens is reading the kernels, so that no converted copy of one may be written to memory. On
    one GPU up to FEW_ROWS rows are multiplied and summed (`multiply_reduce`), anything else is a matrix product whose
    operand is converted (`convert_dot`). `benchmarks/int8_dot.py` times these and others.

    Args:
      x: float[..., I...].
      kernel: int8 or float8[O..., I...].
      scale: float32[O...], what a unit of the kernel stands for.
      out_dtype: of the result; None: x's.

    Returns:
      [..., O...].
    """
    inner = kernel.ndim - scale.ndim
    lead, outer = x.shape[: x.ndim - inner], kernel.shape[: scale.ndim]
    mesh = jax.sharding.get_abstract_mesh()
    # Note: an exported program's number of rows is open.
    few = all(isinstance(n, int) for n in lead) and math.prod(lead) <= FEW_ROWS and (mesh.empty or mesh.size == 1)
    if few:
        # Note: as one dimension of sums; over two of them a GPU takes three times as long.
        x, kernel = x.reshape(*lead, -1), kernel.reshape(math.prod(outer), -1)
        inner = 1
    # Note: tied to what changes in a loop, else XLA converts the kernels before it, and all of them lie there in float;
    # behind the reshapes, which XLA would undo.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    convert = functools.partial(convert_dot, inner=inner)
    if few:
        product = jax.lax.platform_dependent(x, kernel, cuda=multiply_reduce, default=convert)
    else:
        product = convert(x, kernel)
    return (product.reshape(*lead, *outer) * scale).astype(x.dtype if out_dtype is None else out_dtype)


def convert_dot(x: Array, kernel: Array, inner: int) -> Array:
    """x float[..., I...] · kernel [O..., I...], `inner` dimensions I, as one matrix product in x's type → float32."""
    contracted = tuple(range(x.ndim - inner, x.ndim)), tuple(range(kernel.ndim - inner, kernel.ndim))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (contracted, ((), ())), preferred_element_type=jnp.float32)


def multiply_reduce(x: Array, kernel: Array) -> Array:
    """As `convert_dot` of x float[..., I] and kernel [O, I], as sums over products, which the compiler fuses with the
    conversion.

    Note: a sum for each row, so that these are siblings, fused into one pass over the kernel; as a broadcast product of
    all rows the kernel would be read once a row. Long rows of the kernel in parts, of which a GPU reads more at once:
    an H100 takes 28 microseconds for 14336 x 4096 as a whole, and 22 for 4096 x 14336.
    """
    outputs, inputs = kernel.shape
    parts = next((n for n in range(1, 17) if inputs % (16 * n) == 0 and inputs // n <= LONG), 1)
    rows = x.reshape(-1, parts, inputs // parts).astype(jnp.float32)
    wide = kernel.reshape(outputs, parts, inputs // parts).astype(jnp.float32)
    summed = jnp.stack([jnp.sum(row * wide, axis=2) for row in rows])
    # Note: else XLA would make one sum of both.
    summed = jax.lax.optimization_barrier(summed) if parts > 1 else summed
    return jnp.sum(summed, axis=2).reshape(*x.shape[:-1], outputs)


def wide_dot(x: Array, kernel: Array, contracted: tuple[Sequence[int], Sequence[int]], out_dtype: Any) -> Array:
    """The product of two arrays of one type over `contracted` (dimensions of x, of kernel), its sums as `out_dtype`.

    Gradients are rounded to the type of the arrays before they are multiplied with them, as those of a product whose
    result is cast to `out_dtype` would be; a product of wider ones would take a GPU twice the time.
    """
    numbers = contracted, ((), ())
    if out_dtype is None or jnp.dtype(out_dtype) == x.dtype:
        return jax.lax.dot_general(x, kernel, numbers)

    @jax.custom_vjp
    def dot(x: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(x, kernel, numbers, preferred_element_type=out_dtype)

    def backward(given: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        narrow = lambda x, kernel: jax.lax.dot_general(x, kernel, numbers)
        return jax.vjp(narrow, *given)[1](cotangent.astype(given[0].dtype))

    dot.defvjp(lambda x, kernel: (dot(x, kernel), (x, kernel)), backward)
    return dot(x, kernel)


class Dense(Module):
    """A dense layer [..., I...] → [..., O...] from the last `num_inputs` dimensions to those of `features`.

    `out_dtype`: of the result (None: `dtype`, that of the computation), to which sums of products are not rounded
    before.
    """

    features: int | Sequence[int]
    num_inputs: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.normal(0.02)
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, columns: slice | None = None) -> Array:
        """Applies the layer to x; `columns`: only these of the (last dimension's) outputs."""
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        inner = x.shape[x.ndim - self.num_inputs :]
        flat = math.prod(inner), math.prod(features)  # Note: initialisers read the fan-in off a matrix.
        init = lambda key, shape, dtype: self.kernel_init(key, flat, dtype).reshape(shape)
        part: Callable[[Array], Array] = lambda a: a if columns is None else a[..., columns]
        x = x.astype(self.dtype)
        if self.has_variable("params", "kernel_t"):
            kernel_t: Array = self.get_variable("params", "kernel_t")
            scale = part(self.get_variable("params", "kernel_scale"))
            if columns is not None:
                kernel_t = kernel_t[(*(slice(None),) * (len(features) - 1), columns)]
            out = quantized_dot(x, kernel_t, scale, self.out_dtype)
        else:
            kernel = part(self.param("kernel", init, (*inner, *features), self.param_dtype))
            contracted = tuple(range(x.ndim - self.num_inputs, x.ndim)), tuple(range(self.num_inputs))
            kernel, rows = kernel.astype(self.dtype), x.shape[: x.ndim - self.num_inputs]
            # Note: the fast products of 16 bits want rows of 16 bytes; a copy of the kernel pays for many rows alone.
            more = -kernel.shape[-1] % 8 if x.dtype.itemsize == 2 and self.out_dtype is not None else 0
            if more and all(isinstance(n, int) for n in rows) and math.prod(rows) >= MANY_ROWS:
                kernel = jnp.pad(kernel, (*((0, 0),) * (kernel.ndim - 1), (0, more)))
                out = wide_dot(x, kernel, contracted, self.out_dtype)[..., :-more]
            else:
                out = wide_dot(x, kernel, contracted, self.out_dtype)
        if self.use_bias:
            out += part(self.param("bias", nn.initializers.zeros_init(), features, self.param_dtype)).astype(out.dtype)
        return out


class GatedMlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), without biases."""

    mlp_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init)
        gate = constrain(dense(self.mlp_dim, name="gate")(x), "batch", ..., "mlp")
        up = constrain(dense(self.mlp_dim, name="up")(x), "batch", ..., "mlp")
        return dense(x.shape[-1], name="down")(jax.nn.silu(gate) * up)
