"""The compiled loop of tokens reads each weight where it lies: nothing as large as one is cut out or copied in it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax import layers
from alto_jax.mllm import generate as generation
from alto_jax.mllm.generate import GenerateConfig, generate
from alto_jax.mllm.language_model import for_inference
from alto_jax.plan.hlo import computations_of
from tests.mllm.test_cache import BATCH, MODEL, SPECIAL, setting

_RESULT = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(")
_MOVES = frozenset({"copy", "dynamic-slice", "slice", "transpose", "convert", "gather"})


def lines_in_loops(text: str) -> list[str]:
    """The instructions of loops, and of what these call."""
    computations, _ = computations_of(text)
    called = lambda lines: re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", "\n".join(lines))
    waiting = [name for lines in computations.values() for name in re.findall(r"\bbody=%?([\w.\-]+)", "\n".join(lines))]
    assert waiting, "a program without a loop"
    inside: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            waiting += called(computations[name])
    return [line.strip() for name in inside for line in computations[name]]


def moved_in_loops(text: str, at_least: int, kinds: frozenset = _MOVES) -> list[str]:
    """Instructions of some kinds in loops, by default those that only move, whose result has so many elements."""
    found = []
    for line in lines_in_loops(text):
        result = _RESULT.match(line)
        if result and result[3] in kinds and np.prod([int(d) for d in result[2].split(",") if d]) >= at_least:
            found.append(line)
    return found


def compiled_text(model, params, quantize="") -> str:
    _, ids, mask = setting()
    cfg = GenerateConfig(max_new_tokens=10, grammar=True, quantize=quantize)
    start = jnp.zeros(BATCH, bool), jnp.zeros(BATCH, jnp.int32)
    keys = jax.random.split(jax.random.key(0), BATCH)
    embedded = np.zeros((*ids.shape, model.cfg.embed_dim), np.float32)
    args = params, embedded, mask, start, cfg.controls(), keys
    return generation._generate.lower(model, cfg.static(), SPECIAL, 1, *args).compile().as_text()


@pytest.mark.parametrize("form", ["stacked", "for_inference"])
def test_no_weight_is_moved_in_the_loop(form):
    params = setting()[0]
    params = for_inference(MODEL.cfg, params) if form == "for_inference" else params
    smallest = min(a.size for a in jax.tree.leaves(for_inference(MODEL.cfg, params)["blocks"]) if a.ndim > 1)
    text = compiled_text(MODEL, params)
    assert moved_in_loops(text, smallest) == []
    # What the test can see: the slices of a stack that a scan over it makes.
    scanned = jax.jit(lambda x, w: jax.lax.scan(lambda x, row: (jnp.sin(x @ row), None), x, w)[0])
    lowered = scanned.lower(jnp.ones((2, 128)), jnp.ones((3, 128, 128)))
    assert moved_in_loops(lowered.compile().as_text(), 128 * 128)


def carried(text: str) -> list[tuple[str, int]]:
    """(type, number of elements) of what the loop of tokens, the one that carries most, is given and hands on."""
    loops = re.findall(r"= \((.*?)\) while\(", text)
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", max(loops, key=len))
    return [(kind, int(np.prod([int(d) for d in dims.split(",") if d]))) for kind, dims in shapes]


@pytest.mark.parametrize("given", ["before", "in the call"])
@pytest.mark.parametrize("kind, name", [("int8", "s8"), ("fp8", "f8e4m3fn")])
def test_kernels_of_8_bits_reach_the_loop_as_such(given, kind, name):
    """Nothing converts them before it, where all of them would lie in float at once."""
    params = setting()[0]
    prepared = for_inference(MODEL.cfg, params, kind)
    kernels = [leaf.size for leaf in jax.tree.leaves(prepared) if leaf.dtype.itemsize == 1]
    text = compiled_text(MODEL, prepared if given == "before" else params, "" if given == "before" else kind)
    found = carried(text)
    assert sorted(size for found_kind, size in found if found_kind == name) == sorted(kernels)
    floats = [size for found_kind, size in found if found_kind in ("f32", "bf16")]
    # The table of embeddings (whose rows are looked up) is as large as the head without what fills up its rows, and is
    # there as it always was.
    table = params["embed"]["embedding"].size
    assert [size for size in floats if size >= min(table, *kernels)] == [table]
    assert moved_in_loops(text, min(kernels), _MOVES - {"convert"}) == []
    # What the test can see: the same loop over kernels as they are.
    assert sum(size in kernels for found_kind, size in carried(compiled_text(MODEL, params)) if found_kind == "f32") > 9


def test_for_inference_changes_no_number():
    params, ids, mask = setting()
    embedded = params["embed"]["embedding"][ids]
    prepared = for_inference(MODEL.cfg, params)
    assert len(prepared["blocks"]["layers"]) == MODEL.cfg.num_layers
    assert jax.tree.structure(for_inference(MODEL.cfg, prepared)) == jax.tree.structure(prepared)
    cfg = GenerateConfig(max_new_tokens=10)
    runs = [
        jax.device_get(generate(MODEL, p, embedded, mask, cfg, SPECIAL, jax.random.key(0))) for p in (params, prepared)
    ]
    np.testing.assert_array_equal(runs[0].ids, runs[1].ids)
    np.testing.assert_array_equal(runs[0].per_token_logps, runs[1].per_token_logps)


def test_a_stack_may_be_applied_row_by_row():
    class Block(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, x, shift, scale):
            return x + layers.Mlp(8, name="mlp")(x) * scale + shift, x.mean()

    stack = layers.Stack(Block, 3)
    x, scales = jax.random.normal(jax.random.key(0), (2, 4)), jnp.array([1.0, 2.0, 3.0])
    params = stack.init(jax.random.key(1), x, 0.5, per_layer=(scales,))["params"]
    carry, ys = stack.apply({"params": params}, x, 0.5, per_layer=(scales,))
    rows = {"layers": layers.unstacked(params["layers"], 3)}
    for per_layer in ((scales,), (tuple(scales),)):
        got, parts = stack.apply({"params": rows}, x, 0.5, per_layer=per_layer)
        np.testing.assert_allclose(got, carry, rtol=1e-6)
        np.testing.assert_allclose(jnp.stack(parts), ys, rtol=1e-6)
    part, _ = stack.apply({"params": rows}, x, 0.5, per_layer=(scales[1:],), start=1)
    np.testing.assert_allclose(
        part, stack.apply({"params": params}, x, 0.5, per_layer=(scales[1:],), start=1)[0], rtol=1e-6
    )
