"""Matrix products as an accelerator computes them: float32 operands rounded, unless the program asks for all digits.

`rounded(function, bits)` computes a function of arrays by its jaxpr, with the operands of every float32 product
(dot_general, convolution) whose precision is not HIGHEST rounded to `bits` of mantissa: 10 for TF32, the default of
NVIDIA's GPUs, 7 for bfloat16, that of TPUs. `products(function)` lists the products of a program.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp

TF32, BF16 = 10, 7
PRODUCTS = ("dot_general", "conv_general_dilated")


class Product(NamedTuple):
    """A product of a program: whether it is HIGHEST, the dtypes of its operands, the modules that it belongs to."""

    is_highest: bool
    dtypes: tuple[str, ...]
    modules: str

    @property
    def decides(self) -> bool:
        """Whether it belongs to the quantizer or the length predictor."""
        return "quantizer" in self.modules or "/length" in self.modules


def is_highest(params: dict) -> bool:
    """Whether both operands of a product keep all their digits."""
    precision = params["precision"]
    return precision is not None and all(p == jax.lax.Precision.HIGHEST for p in jax.tree.leaves(precision))


def _inner(params: dict) -> Iterator[Any]:
    """The programs inside an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.ClosedJaxpr, core.Jaxpr)):
                yield item.jaxpr if isinstance(item, core.ClosedJaxpr) else item


def products(jaxpr: Any) -> list[Product]:
    """All products of a jaxpr, those inside loops, branches and derivatives too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            dtypes = tuple(str(operand.aval.dtype) for operand in equation.invars)
            found.append(Product(is_highest(equation.params), dtypes, str(equation.source_info.name_stack)))
        for inner in _inner(equation.params):
            found += products(inner)
    return found


def rounded(function: Callable, bits: int, *, every: bool = False) -> Callable:
    """`function` with rounded operands; `every`: of all products, whatever they ask. Its results are a flat list."""

    def reduce(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, 8, bits) if x.dtype == jnp.float32 else x

    def evaluate(closed: Any, *args: Any) -> list[Any]:
        values = dict(zip(closed.jaxpr.constvars, closed.consts)) | dict(zip(closed.jaxpr.invars, args))
        read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
        for equation in closed.jaxpr.eqns:
            name, params = equation.primitive.name, equation.params
            operands = [read(atom) for atom in equation.invars]
            if name in PRODUCTS and (every or not is_highest(params)):
                operands = [reduce(x) for x in operands]
            if name == "scan":
                outputs = scan(params, operands)
            elif (inner := params.get("jaxpr") or params.get("call_jaxpr")) is not None:
                assert name in ("jit", "pjit", "closed_call", "custom_jvp_call", "remat2", "checkpoint"), name
                inner = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
                outputs = evaluate(inner, *operands)
            else:
                assert not list(_inner(params)) or name in ("argmin", "reduce"), name
                outputs = equation.primitive.bind(*operands, **params)
            values |= zip(equation.outvars, outputs if isinstance(outputs, (list, tuple)) else [outputs])
        return [read(atom) for atom in closed.jaxpr.outvars]

    def scan(params: dict, operands: list[Any]) -> list[Any]:
        consts, num_carry = params["num_consts"], params["num_carry"]
        carry, rows = operands[consts : consts + num_carry], operands[consts + num_carry :]

        def body(carry, row):
            outputs = evaluate(params["jaxpr"], *operands[:consts], *carry, *row)
            return outputs[:num_carry], outputs[num_carry:]

        carry, rows = jax.lax.scan(body, carry, rows, length=params["length"], reverse=params["reverse"])
        return [*carry, *rows]

    return jax.jit(lambda *args: evaluate(jax.make_jaxpr(function)(*args), *jax.tree.leaves(args)))
