"""Products of few rows with kernels of 8 bits against bfloat16 ones, as a loop of tokens makes them.

    python benchmarks/int8_dot.py [--size=debug] [--rows 1,12] [--forms bf16,convert,…] [--peak 3000]

Each of the shapes (a decoder layer's `up` and `down` at 8B: 4096 x 14336 and back) has as many kernels of its own as
the model has layers, more than any cache holds. One program goes through all of them in a `while` loop, as the loop of
tokens does, in which every product takes the rows of the one before. Prints, for each form: milliseconds a pass over
all kernels, microseconds a product, GB/s of kernels as they are stored (with --peak also its share of what the card
copies), and the largest difference from the exact product of the same kernels. Within a minute: most of the time is
compilation, and what --seconds does not reach is named. The size debug is for CPUs.

    bf16          kernels of bfloat16
    convert       int8 kernels, converted as the product's operand (`dense.convert_dot`)
    mixed         int8 kernels given to the product as they are, bfloat16 rows beside them
    reduce        int8 kernels, products summed, a sum for each row (`dense.multiply_reduce`)
    rows          as reduce, but one broadcast product of all rows
    transposed    as reduce, with the kernel stored as [out, in]: sums over the dimension that lies together
    model         int8, what `dense.quantized_dot` chooses
    fp8, fp8_reduce   float8 kernels: convert and reduce
    w8a8          int8 rows too, with a scale a row, summed in int32
    pallas        a kernel of Pallas (Triton): tiles of int8, converted in registers; interpreted on CPUs
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
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from alto_jax.mllm import dense
from alto_jax.params import to_8_bits

SIZES = {"8b": (4096, 14336), "debug": (128, 256)}
Kernel = tuple[jax.Array, jax.Array]  # [in, out] (transposed: [out, in]), float32[out]


def convert(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return dense.convert_dot(x, kernel, 1)


def reduce(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return dense.multiply_reduce(x, kernel)


def mixed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def broadcast_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.sum(x[:, :, None].astype(jnp.float32) * kernel.astype(jnp.float32), axis=1)


def transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    one = lambda row: jnp.sum(row.astype(jnp.float32) * kernel.astype(jnp.float32), axis=1)
    return jnp.stack([one(row) for row in x])


def w8a8(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, scale = to_8_bits(x, 1)
    sums = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * scale[:, None]


def pallas(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Tiles of 64 outputs; the rows, filled up to the 16 that a matrix unit takes, go through 128 inputs at once."""
    rows, (inner, outer), block, step = max(16, len(x)), kernel.shape, 64, 128
    rows = 1 << (rows - 1).bit_length()
    padded = jnp.pad(x, ((0, rows - len(x)), (0, 0)))

    def body(x_ref: Any, kernel_ref: Any, out_ref: Any) -> None:
        def add(i: Any, total: jax.Array) -> jax.Array:
            at = pl.ds(i * step, step)
            return total + jnp.dot(x_ref[:, at], kernel_ref[at, :].astype(x.dtype), preferred_element_type=jnp.float32)

        out_ref[...] = jax.lax.fori_loop(0, inner // step, add, jnp.zeros((rows, block), jnp.float32))

    out = pl.pallas_call(
        body,
        grid=(outer // block,),
        in_specs=[pl.BlockSpec((rows, inner), lambda i: (0, 0)), pl.BlockSpec((inner, block), lambda i: (0, i))],
        out_specs=pl.BlockSpec((rows, block), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((rows, outer), jnp.float32),
        interpret=jax.default_backend() == "cpu",
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
    )(padded, kernel)
    return out[: len(x)]


def split(x: jax.Array, kernel: jax.Array, *, sums: bool = False, block: int = 128, step: int = 64, warps: int = 4,
          programs: int = 528) -> jax.Array:  # fmt: skip
    """Tiles of `block` outputs and a part of the inputs, about as many as the card runs at once; parts are added last.

    sums: products are multiplied and summed instead of the matrix unit's.
    """
    inner, outer = kernel.shape
    rows, blocks = 1 if sums else max(16, 1 << (len(x) - 1).bit_length()), outer // block
    parts = max(
        d for d in range(1, inner // step + 1) if inner // step % d == 0 and d * blocks <= max(programs, blocks)
    )
    chunk = inner // parts
    padded = jnp.pad(x, ((0, max(rows - len(x), 0)), (0, 0)))

    def body(x_ref: Any, kernel_ref: Any, out_ref: Any) -> None:
        first, row = pl.program_id(1) * chunk, pl.program_id(2)

        def add(i: Any, total: jax.Array) -> jax.Array:
            at = pl.ds(first + i * step, step)
            tile = kernel_ref[at, :]
            if not sums:
                return total + jnp.dot(x_ref[:, at], tile.astype(x.dtype), preferred_element_type=jnp.float32)
            return total + tile.astype(jnp.float32) * x_ref[row, at].astype(jnp.float32)[:, None]

        begun = jnp.zeros((step if sums else rows, block), jnp.float32)
        total = jax.lax.fori_loop(0, chunk // step, add, begun)
        out_ref[...] = jnp.sum(total, axis=0, keepdims=True) if sums else total

    count = len(x) if sums else 1
    out = pl.pallas_call(
        body,
        grid=(blocks, parts, count),
        in_specs=[
            pl.BlockSpec(padded.shape, lambda i, j, k: (0, 0)),
            pl.BlockSpec((inner, block), lambda i, j, k: (0, i)),
        ],
        out_specs=pl.BlockSpec((None, rows, block), lambda i, j, k: (j, k, i)),
        out_shape=jax.ShapeDtypeStruct((parts, rows * count, outer), jnp.float32),
        interpret=jax.default_backend() == "cpu",
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=4),
    )(padded, kernel)
    return jnp.sum(out, axis=0)[: len(x)]


# Name → (type of the kernels, whether they are stored as [out, in], the product [rows, in] → float32[rows, out] before
# scales; None: `quantized_dot`).
FORMS: dict[str, tuple[str, bool, Callable | None]] = {
    "bf16": ("", False, convert),
    "model": ("int8", False, None),
    "convert": ("int8", False, convert),
    "reduce": ("int8", False, reduce),
    "pallas": ("int8", False, pallas),
    "split": ("int8", False, split),
    "split_wide": ("int8", False, functools.partial(split, block=256, step=32)),
    "split_deep": ("int8", False, functools.partial(split, step=128)),
    "split_many": ("int8", False, functools.partial(split, programs=1056)),
    "split_sums": ("int8", False, functools.partial(split, sums=True)),
    "split_sums_deep": ("int8", False, functools.partial(split, sums=True, step=32, block=256, programs=1056)),
    "w8a8": ("int8", False, w8a8),
    "mixed": ("int8", False, mixed),
    "rows": ("int8", False, broadcast_rows),
    "transposed": ("int8", True, transposed),
    "fp8": ("fp8", False, convert),
    "fp8_reduce": ("fp8", False, reduce),
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
