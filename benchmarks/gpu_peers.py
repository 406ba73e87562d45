"""The peer's cases of `benchmarks/gpu.py`: transformers and PyTorch at the same sizes, random weights, same prompts.

The language model is Llama's (whose operations InternLM2 has), with sdpa attention; decoding by `generate` with its
default cache, or (decode_compiled) with a static cache, whose forward pass transformers compiles on a GPU.
"""

import re
from typing import Any

import torch
import transformers

from alto_jax.mllm.alto_llm import ModelConfig
from benchmarks.gpu_common import Job, Options, timed
from benchmarks.gpu_inference import CODES, FEW, MANY, images, model_config, prompt_ids


def make(case: str, options: Options) -> Job:
    """The peer of a case: decode1, decode12, decode_compiled, prefill1, vit12, …"""
    name, rows = re.fullmatch(r"([a-z_]+?)(\d*)", case).groups()
    cfg = model_config(options)
    measures = {"decode": _decode, "decode_compiled": _decode_compiled, "prefill": _prefill, "vit": _vit, "sam": _sam,
                "masks": _masks}  # fmt: skip

    @torch.inference_mode()
    def measure(compiled: dict) -> list[dict]:
        del compiled
        torch.manual_seed(0)
        # Note: weights are drawn on the device in the type that they are used in.
        torch.set_default_dtype(torch.float32 if options.is_debug else torch.bfloat16)
        with torch.device(_device()):
            return measures[name](cfg, options, int(rows or 1))

    return Job({}, measure, place=_place)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _place() -> dict[str, Any]:
    """As `gpu_common.place`."""
    has = torch.cuda.is_available()
    return {
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if has else None,
        "device": torch.cuda.get_device_name() if has else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _timed(call: Any, options: Options) -> dict:
    return timed(call, options, wait=lambda _: torch.cuda.synchronize() if torch.cuda.is_available() else None)


def _language_model(cfg: ModelConfig) -> Any:
    size = cfg.need_language_model()
    config = transformers.LlamaConfig(
        vocab_size=size.vocab_size, hidden_size=size.embed_dim, num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads, num_key_value_heads=size.num_kv_heads, intermediate_size=size.mlp_dim,
        rms_norm_eps=size.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def _decode(cfg: ModelConfig, options: Options, rows: int, *, static: bool = False) -> list[dict]:
    model, ids = _language_model(cfg), torch.from_numpy(prompt_ids(cfg, rows)).long().to(_device())
    cache = None
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=ids.shape[1] + MANY + 1)

    def answer(count: int) -> dict:
        def call() -> Any:
            kept = {}
            if cache is not None:
                cache.reset()
                kept = {"past_key_values": cache}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count + 1, do_sample=False,
                                 min_new_tokens=count + 1, **kept)  # fmt: skip
            assert out.shape[1] == ids.shape[1] + count + 1
            return out

        return _timed(call, options)

    few, whole, many = (answer(count) for count in (FEW, CODES, MANY))
    span = MANY - FEW
    token = {"ms": (many["ms"] - few["ms"]) / span, "ms_min": (many["ms_min"] - few["ms_max"]) / span,
             "ms_max": (many["ms_max"] - few["ms_min"]) / span}  # fmt: skip
    # Note: `generate` compiles by itself where a cache can be compiled with, on a GPU.
    way = "static cache, compiled" if torch.cuda.is_available() else "static cache"
    how = {"how": way if static else "eager"}
    table = model.get_input_embeddings().weight  # Of which a token reads a row.
    read = sum(p.nbytes for p in model.parameters()) - table.nbytes
    rate = read / token["ms"] / 1e6
    return [{"case": f"decode{rows}", **how, **token, "gb_per_s": rate}, {"case": f"tokens{rows}", **how, **whole}]


def _decode_compiled(cfg: ModelConfig, options: Options, rows: int) -> list[dict]:
    return _decode(cfg, options, rows, static=True)


def _prefill(cfg: ModelConfig, options: Options, rows: int) -> list[dict]:
    model, ids = _language_model(cfg), torch.from_numpy(prompt_ids(cfg, rows)).long().to(_device())
    call = lambda: model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return [{"case": f"prefill{rows}", **_timed(call, options)}]


def _vit(cfg: ModelConfig, options: Options, rows: int) -> list[dict]:
    size, width = cfg.need_vision(), cfg.need_language_model().embed_dim
    config = transformers.InternVLVisionConfig(
        hidden_size=size.embed_dim, num_hidden_layers=size.num_layers, num_attention_heads=size.num_heads,
        intermediate_size=size.mlp_dim, image_size=[size.image_size] * 2, patch_size=[size.patch_size] * 2,
        attention_bias=size.qkv_bias, use_qk_norm=size.qk_norm, norm_type=size.norm_type, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.InternVLVisionModel(config).eval()
    merged = 4 * size.embed_dim
    projector = torch.nn.Sequential(torch.nn.LayerNorm(merged), torch.nn.Linear(merged, width), torch.nn.GELU(),
                                    torch.nn.Linear(width, width))  # fmt: skip
    pixels, half = _pixels(rows, size.image_size), size.grid // 2

    def call() -> torch.Tensor:
        x = model(pixels).last_hidden_state[:, 1:]
        x = x.reshape(rows, half, 2, half, 2, -1).transpose(2, 3).reshape(rows, half * half, merged)
        return projector(x)

    return [{"case": f"vit{rows}", **_timed(call, options)}]


def _sam(cfg: ModelConfig, options: Options, rows: int) -> list[dict]:
    size = cfg.tokenizer.sam
    assert size is not None
    config = transformers.SamVisionConfig(
        hidden_size=size.embed_dim, output_channels=size.out_channels, num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads, image_size=size.image_size, patch_size=size.patch_size,
        window_size=size.window_size, global_attn_indexes=list(size.global_attn_indexes),
        mlp_dim=size.mlp_ratio * size.embed_dim, attn_implementation="sdpa",
    )  # fmt: skip
    model, pixels = transformers.SamVisionModel(config).eval(), _pixels(rows, size.image_size)
    return [{"case": f"sam{rows}", **_timed(lambda: model(pixels).last_hidden_state, options)}]


def _masks(cfg: ModelConfig, options: Options, rows: int) -> list[dict]:
    """The transformer alone: there is no peer of the pixel decoder."""
    size = cfg.tokenizer.decoder
    layer = torch.nn.TransformerEncoderLayer(size.embed_dim, size.num_heads, 4 * size.embed_dim, activation="gelu",
                                             batch_first=True, norm_first=True)  # fmt: skip
    model = torch.nn.TransformerEncoder(layer, size.num_layers, enable_nested_tensor=False).eval()
    tokens = torch.randn(rows, 1 + cfg.tokenizer.grid**2 + cfg.tokenizer.num_latent_tokens, size.embed_dim)
    return [{"case": f"masks{rows}", **_timed(lambda: model(tokens), options)}]


def _pixels(rows: int, side: int) -> torch.Tensor:
    """Images as both sides get them, float[rows, 3, side, side] in -1..1."""
    image = torch.from_numpy(images(rows, side)).to(_device()).permute(0, 3, 1, 2)
    return (image / 127.5 - 1).to(torch.get_default_dtype())
