"""The cases of `benchmarks/gpu.py` without training: the card's ceilings, parts of an answer, whole answers.

A prompt is 256 image and 64 text tokens, and ends with `<ALTo_Start>` (a forced answer prefix); an answer is 18 codes
and `<ALTo_End>`. Weights are random and bfloat16, but float32 where they decide codes and pixels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.batch import PromptBatch
from alto_jax.experiment import OptimConfig
from alto_jax.layers import apply_module, told_precision
from alto_jax.mllm.alto_llm import ALToLLM, ModelConfig, init_params, segment
from alto_jax.mllm.generate import Controls, GenerateConfig, generate
from alto_jax.mllm.language_model import LanguageModel
from alto_jax.mllm.text import SpecialIds
from alto_jax.params import cast
from alto_jax.tokenizer.alto import ALTo
from benchmarks.gpu_common import Job, Options, experiment, filled, language_params, timed, token_loop

CODES = 18  # of an adaptive answer, the paper's mean
TEXT_TOKENS = 64
FEW, MANY = 2, 50  # codes of the two answers whose difference is the cost of a token


def model_config(options: Options) -> ModelConfig:
    """The whole model of the size."""
    return experiment("stage3.py:8b", options, {}).model


def special_ids(cfg: ModelConfig) -> SpecialIds:
    """Ids at the end of the vocabulary, as in published checkpoints."""
    vocab, codes = cfg.need_language_model().vocab_size, cfg.tokenizer.codebook_size
    first = vocab - codes - 13
    names = ("im_start", "im_end", "img", "img_end", "img_context", "ref", "ref_end", "box", "box_end", "mask_start",
             "mask_end")  # fmt: skip
    ids = {name: first + i for i, name in enumerate(names)}
    return SpecialIds(pad=0, bos=None, code_0=vocab - codes, num_codes=codes, **ids)


def param_shapes(cfg: ModelConfig, options: Options) -> dict[str, Any]:
    """Shapes of the whole model's parameters, as they are used for answers."""
    shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    language = language_params(cfg.need_language_model(), shapes.pop("language_model"), options)
    if not options.is_debug:
        keep = OptimConfig().frozen_float32
        shapes = jax.eval_shape(lambda p: cast(p, "bfloat16", keep=keep), shapes)
    return {**shapes, "language_model": language}


def prompt_ids(cfg: ModelConfig, rows: int) -> np.ndarray:
    """int32[rows, P]: image, text, `<ALTo_Start>`; no padding."""
    special = special_ids(cfg)
    text = np.random.default_rng(0).integers(1, special.im_start, (rows, TEXT_TOKENS))
    text[:, -1] = special.mask_start
    image = np.full((rows, cfg.num_image_tokens), special.img_context)
    return np.concatenate([image, text], axis=1).astype(np.int32)


def images(rows: int, side: int) -> np.ndarray:
    """uint8[rows, side, side, 3]."""
    return np.random.default_rng(1).integers(0, 256, (rows, side, side, 3)).astype(np.uint8)


def weight_bytes(params: dict) -> int:
    """Bytes of the language model that one token reads: all but the table of embeddings, of which it is a row."""
    used = {name: tree for name, tree in params.items() if name != "embed" or "head" not in params}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(used))


def exactly(cfg: GenerateConfig, count: Any) -> Controls:
    """Answers with masks of `count` codes (traceable)."""
    return dataclasses.replace(cfg.controls(), min_length=count, max_length=count)


def copy(options: Options, rows: int) -> Job:
    """The card's two ceilings: bytes read and written by a negation, operations of a matrix product."""
    size, side = (2**12, 64) if options.is_debug else (2**28, 8192)
    block, matrix = jax.ShapeDtypeStruct((size,), jnp.float32), jax.ShapeDtypeStruct((side, side), jnp.bfloat16)
    lowered = {
        "copy": jax.jit(lambda x: -x).lower(block),
        "matmul": jax.jit(lambda a, b: a @ b).lower(matrix, matrix),
    }

    def measure(compiled: dict) -> list[dict]:
        x, a, b = filled((block, matrix, matrix))
        moved = timed(lambda: compiled["copy"](x), options)
        product = timed(lambda: compiled["matmul"](a, b), options)
        return [
            {"case": "copy", **moved, "gb_per_s": 2 * x.nbytes / moved["ms"] / 1e6},
            {"case": "matmul", **product, "tflops": 2 * side**3 / product["ms"] / 1e9},
        ]

    return Job(lowered, measure, (block, matrix))


def decode(options: Options, rows: int, *, only_prefill: bool = False) -> Job:
    """A token's time: two answers of different lengths by one program. Also: prompt, 18 codes and END; or the prompt
    and its first token alone."""
    cfg = model_config(options)
    size, special = cfg.need_language_model(), special_ids(cfg)
    shapes = param_shapes(cfg, options)["language_model"]
    ids = prompt_ids(cfg, rows)
    inputs = jax.ShapeDtypeStruct((*ids.shape, size.embed_dim), size.dtype)
    how = GenerateConfig(
        max_new_tokens=1 if only_prefill else MANY + 1, grammar=not only_prefill, stop_at_mask_end=True
    )

    def run(params: dict, inputs: jax.Array, ids: jax.Array, count: jax.Array) -> Any:
        mask = jnp.ones(ids.shape, bool)
        with told_precision(cfg.matmul_precision):
            return generate(LanguageModel(size), params, inputs, mask, how, special, jax.random.key(0), prompt_ids=ids,
                            controls=exactly(how, count))  # fmt: skip

    with token_loop(options):
        lowered = jax.jit(run).lower(shapes, inputs, ids, jnp.int32(CODES))

    def measure(compiled: dict) -> list[dict]:
        params, embedded = filled(shapes), filled(inputs)

        def answer(count: int) -> dict:
            arguments = params, embedded, jnp.asarray(ids), jnp.int32(count)
            steps = int(compiled["generate"](*arguments).num_steps)
            assert steps == (1 if only_prefill else count + 1), f"{steps} tokens for {count} codes"
            return timed(lambda: compiled["generate"](*arguments).ids, options)

        if only_prefill:
            return [{"case": f"prefill{rows}", **answer(1)}]
        few, whole, many = (answer(count) for count in (FEW, CODES, MANY))
        token = {
            "ms": (many["ms"] - few["ms"]) / (MANY - FEW),
            "ms_min": (many["ms_min"] - few["ms_max"]) / (MANY - FEW),
            "ms_max": (many["ms_max"] - few["ms_min"]) / (MANY - FEW),
        }
        rate = weight_bytes(shapes) / token["ms"] / 1e6
        return [{"case": f"decode{rows}", **token, "gb_per_s": rate}, {"case": f"tokens{rows}", **whole}]

    return Job({"generate": lowered}, measure, (shapes, inputs))


def prefill(options: Options, rows: int) -> Job:
    """The prompt and the first token."""
    return decode(options, rows, only_prefill=True)


def answer(options: Options, rows: int) -> Job:
    """From images in the host's memory to mask logits there: both encoders, prompt, 18 codes and END, mask."""
    cfg = model_config(options)
    special, shapes = special_ids(cfg), param_shapes(cfg, options)
    ids, side = prompt_ids(cfg, rows), cfg.tokenizer.image_size
    pixels = images(rows, side) if cfg.pixel_input == "native" else None
    batch = PromptBatch(images(rows, cfg.need_vision().image_size), pixels, ids, np.ones(ids.shape, bool), None)
    codes = min(CODES, cfg.tokenizer.num_latent_tokens)
    how = GenerateConfig(max_new_tokens=cfg.tokenizer.num_latent_tokens + 1, grammar=True, stop_at_mask_end=True)

    def run(params: dict, batch: PromptBatch, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = segment(cfg, params, batch, how, special, jax.random.key(0), controls=exactly(how, count))
        return found.mask_logits, found.length

    with token_loop(options):
        lowered = jax.jit(run).lower(shapes, batch, jnp.int32(codes))

    def measure(compiled: dict) -> list[dict]:
        params = filled(shapes)
        whole = lambda: [np.asarray(part) for part in compiled["answer"](params, batch, np.int32(codes))]
        lengths = whole()[1]
        assert (lengths == codes).all(), f"answers of {lengths.tolist()} codes, not of {codes}"
        return [{"case": f"answer{rows}", **timed(whole, options, wait=lambda parts: parts)}]

    return Job({"answer": lowered}, measure, shapes)


def vit(options: Options, rows: int) -> Job:
    """InternViT, pixel shuffle and projector."""
    cfg = model_config(options)
    shapes = {name: tree for name, tree in param_shapes(cfg, options).items() if name in ("vision", "projector")}
    image = images(rows, cfg.need_vision().image_size)
    return _module(options, f"vit{rows}", ALToLLM(cfg), "image_tokens", cfg, shapes, image)


def sam(options: Options, rows: int) -> Job:
    """SAM's image encoder at its own size, the image's normalisation included."""
    cfg = model_config(options)
    tokenizer = param_shapes(cfg, options)["tokenizer"]
    shapes = {name: tokenizer[name] for name in ("latent_tokens", "sam_encoder")}  # Note: the module asks for both.
    image = images(rows, cfg.tokenizer.image_size)
    return _module(options, f"sam{rows}", ALTo(cfg.tokenizer), "image_features", cfg, shapes, image)


def masks(options: Options, rows: int) -> Job:
    """Codes and SAM features to mask logits: de-tokenizer and pixel decoder."""
    cfg = model_config(options)
    size = cfg.tokenizer
    shapes = {
        n: tree for n, tree in param_shapes(cfg, options)["tokenizer"].items() if n not in ("sam_encoder", "encoder")
    }
    codes = np.random.default_rng(2).integers(0, size.codebook_size, (rows, size.num_latent_tokens)).astype(np.int32)
    length = np.full(rows, min(CODES, size.num_latent_tokens), np.int32)
    assert size.sam is not None
    features = jax.ShapeDtypeStruct((rows, size.sam.grid, size.sam.grid, size.sam.out_channels), size.sam.dtype)
    return _module(options, f"masks{rows}", ALTo(size), "decode_codes", cfg, shapes, codes, length, features)


def _module(options: Options, case: str, module: Any, method: str, cfg: ModelConfig, shapes: dict, *given: Any) -> Job:
    """One method of a module as a case; what is given as a shape becomes a random array."""

    def run(params: dict, *given: Any) -> Any:
        with told_precision(cfg.matmul_precision):
            return apply_module(module, params, *given, method=method)

    abstract = [a for a in given if isinstance(a, jax.ShapeDtypeStruct)]

    def measure(compiled: dict) -> list[dict]:
        params = filled(shapes)
        arrays = [filled(a) if isinstance(a, jax.ShapeDtypeStruct) else jnp.asarray(a) for a in given]
        return [{"case": case, **timed(lambda: compiled[method](params, *arrays), options)}]

    return Job({method: jax.jit(run).lower(shapes, *given)}, measure, (shapes, abstract))
