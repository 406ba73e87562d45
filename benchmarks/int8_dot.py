"""Products of few rows with kernels of 8 bits against bfloat16 ones, as a loop of tokens makes them.

    python benchmarks/int8_dot.py [--size=debug] [--rows 1,12] [--forms bf16,convert,…] [--peak 3000]

Each of the shapes (a decoder layer's `up` and `down` at 8B: 4096 x 14336 and back) has as many kernels of its own as
the model has layers, more than any cache holds. One program goes through all of them in a `while` loop, as the loop of
tokens does, in which every product takes the rows of the one before. Prints, for each form: milliseconds a pass over
all kernels, microseconds a product, GB/s of kernels as they are stored (with --peak also its share of what the card
copies), and the largest difference from the exact product of the same kernels. Within a minute: most of the time is
compilation, and what --seconds does not reach is named. The size debug is for CPUs.

    bf16          kernels of bfloat16, [in, out] as all others are where nothing else is said
    model         int8, [out, in], what `dense.quantized_dot` chooses
    convert       int8, [out, in], converted as the product's operand (`dense.convert_dot`)
    reduce        int8, [out, in], products summed, a sum for each row (`dense.multiply_reduce`)
    in_out        as reduce, with sums over the dimension that does not lie together
    in_out_convert   as convert
    mixed         int8, [out, in], given to the product as it is, bfloat16 rows beside it
    fp8, fp8_reduce   float8, [out, in]: convert and reduce
    w8a8          int8, [out, in], int8 rows too, with a scale a row, summed in int32
    w8a16         as w8a8, with rows as the sum of two of int8: 15 bits of a row's largest number
"""

import argparse
from collections.abc import Callable
import functools
import itertools
from pathlib import Path
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from alto_jax.mllm import dense
from alto_jax.params import to_8_bits

SIZES = {"8b": (4096, 14336), "debug": (128, 256)}
Kernel = tuple[jax.Array, jax.Array]  # [in, out] (transposed: [out, in]), float32[out]


def convert(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return dense.convert_dot(x, kernel, 1)


def convert_in_out(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return dot(x, kernel.astype(x.dtype), 0)


def reduce_in_out(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(row[:, None].astype(jnp.float32) * kernel.astype(jnp.float32), axis=0) for row in x])


def dot(x: jax.Array, kernel: jax.Array, contracted: int = 1, dtype: Any = jnp.float32) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((1,), (contracted,)), ((), ())), preferred_element_type=dtype)


def w8a8(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, scale = to_8_bits(x, 1)
    return dot(rows, kernel, dtype=jnp.int32).astype(jnp.float32) * scale[:, None]


def w8a16(x: jax.Array, kernel: jax.Array) -> jax.Array:
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1, keepdims=True) / (127 * 256)
    whole = jnp.rint(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int32)
    high = (whole + 128) >> 8
    sums = dot(jnp.concatenate([high, whole - 256 * high]).astype(jnp.int8), kernel, dtype=jnp.int32)
    return (sums[: len(x)] * 256.0 + sums[len(x) :]) * scale


# Name → (type of the kernels, whether they are stored as [out, in], the product [rows, in] → float32[rows, out] before
# scales; None: `quantized_dot`).
FORMS: dict[str, tuple[str, bool, Callable | None]] = {
    "bf16": ("", False, convert_in_out),
    "model": ("int8", True, None),
    "convert": ("int8", True, convert),
    "reduce": ("int8", True, dense.multiply_reduce),
    "mixed": ("int8", True, dot),
    "w8a8": ("int8", True, w8a8),
    "w8a16": ("int8", True, w8a16),
    "in_out": ("int8", False, reduce_in_out),
    "in_out_convert": ("int8", False, convert_in_out),
    "fp8": ("fp8", True, convert),
    "fp8_reduce": ("fp8", True, dense.multiply_reduce),
}


def make_kernels(kind: str, turned: bool, shape: tuple[int, int], count: int) -> list[Kernel]:
    """`count` kernels of a shape, the same numbers for every form, such that rows keep their size."""

    @jax.jit
    def make(key: jax.Array) -> Kernel:
        kernel = (jax.random.normal(key, shape) * shape[0] ** -0.5).astype(jnp.bfloat16)
        values, scale = to_8_bits(kernel, 0, kind) if kind else (kernel, jnp.ones(shape[1]))
        return values.T if turned else values, scale

    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def apply(form: str, x: jax.Array, kernel: Kernel) -> jax.Array:
    """A form's product in bfloat16."""
    values, scale = kernel
    product = FORMS[form][2]
    if product is None:
        return dense.quantized_dot(x, values, scale)
    x, values = jax.lax.optimization_barrier((x, values))  # Note: as `quantized_dot` does.
    return (product(x, values) * scale).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=0)
def passes(form: str, x: jax.Array, kernels: list[Kernel], count: jax.Array) -> jax.Array:
    """`count` passes over all kernels; the rows of a product are those of the one before."""

    def one_pass(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, x = state
        for kernel in kernels:
            out = apply(form, x, kernel)
            # Note: some of the result goes into the next rows, which may have another width.
            fits = out.shape[1] >= x.shape[1]
            x = (0.5 * x + 0.5 * (out[:, : x.shape[1]] if fits else jnp.mean(out))).astype(x.dtype)
        return i + 1, x

    return jax.lax.while_loop(lambda state: state[0] < count, one_pass, (jnp.int32(0), x))[1]


def seconds_a_pass(form: str, x: jax.Array, kernels: list[Kernel]) -> float:
    """Median of five calls, of enough passes for 0.05 s each."""
    run = lambda count: passes(form, x, kernels, jnp.int32(count)).block_until_ready()
    run(1)
    began = time.perf_counter()
    run(1)
    count = int(np.clip(0.05 / (time.perf_counter() - began), 1, 100))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run(count)
        times.append((time.perf_counter() - began) / count)
    return statistics.median(times)


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", default="1,12", help="with commas between")
    parser.add_argument("--forms", default=",".join(FORMS), help="with commas between")
    parser.add_argument("--peak", type=float, default=0, metavar="GB/s", help="what the device copies")
    parser.add_argument("--seconds", type=float, default=50, help="after which nothing more is begun")
    options = parser.parse_args()
    forms, (narrow, wide) = options.forms.split(","), SIZES[options.size]
    if unknown := [form for form in forms if form not in FORMS]:
        parser.error(f"--forms: unknown {unknown[0]!r}; expected some of {', '.join(FORMS)}")
    began, made_for, made, left = time.monotonic(), None, {}, []
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.layers} kernels of each shape")
    print("rows  in      out     form         ms a pass  us a product  GB/s    of peak  error")
    cases = itertools.product(forms, ((narrow, wide), (wide, narrow)), map(int, options.rows.split(",")))
    for form, shape, rows in cases:
        title = f"{rows:<6}{shape[0]:<8}{shape[1]:<8}{form:13}"
        if time.monotonic() - began > options.seconds:
            left.append(form)
            continue
        if made_for != FORMS[form][:2]:
            made_for, made = FORMS[form][:2], {}
        if shape not in made:
            made[shape] = make_kernels(*FORMS[form][:2], shape, options.layers)
        x = jax.random.normal(jax.random.key(1), (rows, shape[0]), jnp.bfloat16)
        try:
            seconds, error = seconds_a_pass(form, x, made[shape]), difference(form, x, made[shape][0])
        except Exception as problem:  # noqa: BLE001 - a form that this device's compiler refuses is a result
            print(f"{title}{str(problem).splitlines()[0][:80]}", flush=True)
            continue
        speed = sum(values.nbytes for values, _ in made[shape]) / seconds / 1e9
        share = f"{speed / options.peak:.2f}" if options.peak else ""
        numbers = f"{seconds * 1e3:<11.3f}{seconds / options.layers * 1e6:<14.1f}{speed:<8.0f}{share:<9}{error:.4f}"
        print(title + numbers, flush=True)
    if left:
        print(f"not all of these were reached in {options.seconds:.0f} s: {', '.join(dict.fromkeys(left))}")


def difference(form: str, x: jax.Array, kernel: Kernel) -> float:
    """Largest difference from the product of the kernel's numbers in float32, by the largest of these."""
    values = np.asarray(kernel[0].astype(jnp.float32))
    values = values.T if FORMS[form][1] else values
    want = np.asarray(x.astype(jnp.float32)) @ (values * np.asarray(kernel[1]))
    got = np.asarray(jax.jit(functools.partial(apply, form))(x, kernel).astype(jnp.float32))
    return float(np.abs(got - want).max() / np.abs(want).max())


if __name__ == "__main__":
    main()
