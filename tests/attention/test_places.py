"""The kernels of windows and squares with relative positions: the same outputs as the plain form, and its gradients."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.attention import places
from alto_jax.tokenizer import sam_encoder

ON_GPU = jax.default_backend() == "gpu"
DTYPE = jnp.bfloat16 if ON_GPU else jnp.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-5


def arguments(side, window, heads=2, width=32):
    rng = np.random.default_rng(side + window)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), DTYPE)
    relative = 2 * (2 * window - 1) if window else side
    return (normal(2, side, side, 3, heads, width), normal(3, heads, width),
            *(normal(2, side, side, heads, relative) for _ in range(1 if window else 2)))  # fmt: skip


def plain_form(window):
    plain = functools.partial(sam_encoder._within_windows, window, sam_encoder._whole_scores)
    return functools.partial(sam_encoder._from_products, window, plain) if window else plain


@pytest.mark.parametrize("side, window", [(16, 0), (20, 14), (9, 4), (16, 16)])
def test_kernels_give_what_the_whole_scores_give(side, window):
    given = arguments(side, window)
    plain = plain_form(window)

    def fused(qkv, bias, *relative):
        return places.attention(qkv, bias, relative, window=window, scale=32**-0.5, plain=plain, interpret=not ON_GPU)

    want, got = jax.jit(plain)(*given), jax.jit(fused)(*given)
    assert got.dtype == want.dtype and got.shape == (2, side, side, 2, 32)
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=TOLERANCE)

    if side == 9:
        total = lambda form: jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(form(*a))), argnums=(0, 1, 2)))(*given)
        for one, two in zip(total(fused), total(plain)):
            np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    "capability, dtype, side, window, width, reason",
    [("9.0", "bfloat16", 64, 0, 64, ""), ("8.0", "float16", 64, 14, 64, ""), ("9.0", "bfloat16", 65, 14, 64, ""),
     ("7.5", "float16", 64, 14, 64, "7.5"), ("gfx90a", "bfloat16", 64, 14, 64, "NVIDIA"),
     ("9.0", "float32", 64, 14, 64, "float32"), ("9.0", "bfloat16", 48, 0, 64, "got 48"),
     ("9.0", "bfloat16", 64, 17, 64, "at most 16"), ("9.0", "bfloat16", 64, 14, 80, "got 80")],
)  # fmt: skip
def test_what_the_kernels_can(capability, dtype, side, window, width, reason, monkeypatch):
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(places, "traced_device", lambda: device)
    said = places.why_not(dtype, side, window, width)
    assert reason in said and bool(said) == bool(reason)


def test_the_kernels_want_a_gpu():
    if not ON_GPU:
        assert "'cpu'" in places.why_not("bfloat16", 64, 14, 64)


@pytest.mark.parametrize("side, window", [(64, 0), (64, 14)])
def test_the_kernels_lower_for_a_gpu(side, window):
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in (
            (1, side, side, 3, 4, 64),
            (3, 4, 64),
            *([(1, side, side, 4, 64)] if window else [(1, side, side, 4, side)] * 2),
        )
    ]
    # fmt: skip
    run = functools.partial(places._forward, window=window, scale=0.125, interpret=False)
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("attention_of_windows" if window else "attention_of_squares") >= 1


@pytest.mark.parametrize("window", [3, 14, 16])
def test_products_looked_up_are_those_with_the_positions_of_each_query(window):
    rng = np.random.default_rng(window)
    side = 20
    q = rng.normal(size=(1, side, side, 2, 8)).astype(np.float32)
    tables = [rng.normal(size=(2 * window - 1, 8)).astype(np.float32) for _ in range(2)]
    products = jnp.einsum("byxnd,cd->byxnc", q, jnp.concatenate(tables), precision="highest")
    by_row, by_column = places.looked_up(products, window)
    rows, columns = (sam_encoder._rows_of_windows(jnp.asarray(table), side, window) for table in tables)
    want = jnp.einsum("byxnd,yid->byxni", q, rows, precision="highest")
    np.testing.assert_allclose(by_row, want, atol=1e-5)
    want = jnp.einsum("byxnd,xjd->byxnj", q, columns, precision="highest")
    np.testing.assert_allclose(by_column, want, atol=1e-5)
