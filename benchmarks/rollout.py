"""A rollout of one group here and by transformers' `generate`, in one run: `python benchmarks/rollout.py`.

Needs `pip install -e '.[convert]' torch transformers` (PyTorch for CPU). Qwen2-0.5B's shape with random weights, the
same in both (float32); a prompt of 316 tokens, 34 new tokens (nothing ends early), temperature 1, top-k 10. For a
group of 12, transformers gets the prompt 12 times; here the group shares it. The two alternate; medians of wall and
CPU seconds, and their ratio (target for the group: 0.6 of the wall time). Also says whether the greedy answers agree.
"""

import argparse
from pathlib import Path
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from alto_jax.mllm.generate import GenerateConfig, generate
from alto_jax.mllm.language_model import LanguageModel, LanguageModelConfig
from alto_jax.mllm.text import SpecialIds

SHAPE = LanguageModelConfig(
    vocab_size=151936, embed_dim=896, num_layers=24, num_heads=14, num_kv_heads=2, mlp_dim=4864, rope_theta=1e6,
    norm_eps=1e-6, qkv_bias=True, tie_embeddings=True,
)  # fmt: skip
# Note: ids beyond the vocabulary, so that no answer ends early.
SPECIAL = SpecialIds(
    pad=0, bos=None, im_start=200001, im_end=200002, img=200003, img_end=200004, img_context=200005, ref=200006,
    ref_end=200007, box=200008, box_end=200009, mask_start=200010, mask_end=200011, code_0=200012, num_codes=1024,
)  # fmt: skip


def torch_model(shape: LanguageModelConfig) -> torch.nn.Module:
    """transformers' Qwen2 with random weights."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=shape.vocab_size, hidden_size=shape.embed_dim, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, intermediate_size=shape.mlp_dim,
        rms_norm_eps=shape.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model


def jax_params(model: torch.nn.Module, shape: LanguageModelConfig) -> dict:
    """The same weights in this package's layout."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    width, heads, kv_heads, head = shape.embed_dim, shape.num_heads, shape.num_kv_heads, shape.head_width
    stack = lambda name, convert: np.stack([convert(f"model.layers.{i}.{name}") for i in range(shape.num_layers)])
    kernel = lambda name: stack(f"{name}.weight", lambda key: state[key].T)
    scale = lambda name: {"scale": stack(f"{name}.weight", state.__getitem__)}
    kv_kernels = [kernel(f"self_attn.{n}_proj").reshape(-1, width, kv_heads, head) for n in "kv"]
    bias = lambda n: stack(f"self_attn.{n}_proj.bias", state.__getitem__)
    layers = {
        "attn_norm": scale("input_layernorm"),
        "mlp_norm": scale("post_attention_layernorm"),
        "attn": {
            "q": {
                "kernel": kernel("self_attn.q_proj").reshape(-1, width, heads, head),
                "bias": bias("q").reshape(-1, heads, head),
            },
            "kv": {
                "kernel": np.stack(kv_kernels, axis=2),
                "bias": np.stack([bias(n).reshape(-1, kv_heads, head) for n in "kv"], axis=1),
            },
            "out": {"kernel": kernel("self_attn.o_proj").reshape(-1, heads, head, width)},
        },
        "mlp": {name: {"kernel": kernel(f"mlp.{name}_proj")} for name in ("gate", "up", "down")},
    }
    return {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "blocks": {"layers": layers},
        "norm": {"scale": state["model.norm.weight"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=316)
    parser.add_argument("--tokens", type=int, default=34)
    parser.add_argument("--layers", type=int, default=SHAPE.num_layers, help="fewer: a quick look, not the figure")
    options = parser.parse_args()
    shape = LanguageModelConfig(**{**vars(SHAPE), "num_layers": options.layers})
    reference = torch_model(shape)
    params = jax.device_put(jax_params(reference, shape))
    model = LanguageModel(shape)
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (1, options.prompt))
    embedded = jnp.asarray(params["embed"]["embedding"][ids])
    mask = np.ones(ids.shape, bool)

    def here(group: int, **how) -> np.ndarray:
        cfg = GenerateConfig(max_new_tokens=options.tokens, **how)
        out = generate(model, params, embedded, mask, cfg, SPECIAL, jax.random.key(0), group)
        return np.asarray(out.ids)[0]

    @torch.inference_mode()
    def there(group: int, **how) -> np.ndarray:
        prompt = torch.from_numpy(ids).repeat(group, 1)
        out = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=options.tokens, pad_token_id=0, **how
        )
        assert out.shape[1] == options.prompt + options.tokens
        return out[:, options.prompt :].numpy()

    print(f"threads: torch {torch.get_num_threads()}; torch {torch.__version__}, transformers "
          f"{transformers.__version__}, jax {jax.__version__}; {options.layers} layers")  # fmt: skip
    same = here(1) == there(1, do_sample=False)
    print(f"greedy answers agree on the first {int(np.cumprod(same[0]).sum())} of {options.tokens} tokens")
    ours = dict(temperature=1.0, top_k=10)
    theirs = dict(do_sample=True, temperature=1.0, top_k=10, top_p=1.0)
    for group in (options.group, 1):
        here(group, **ours)  # Note: compiles.
        times: dict[str, list] = {"alto_jax": [], "transformers": []}
        for _ in range(options.rounds):
            for name, function, how in (("alto_jax", here, ours), ("transformers", there, theirs)):
                wall, cpu = time.perf_counter(), time.process_time()
                function(group, **how)
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in times.items()}
        ratio = [a / b for a, b in zip(medians["alto_jax"], medians["transformers"])]
        text = "; ".join(f"{name} {wall:.2f} s wall, {cpu:.2f} s CPU" for name, (wall, cpu) in medians.items())
        print(f"group of {group}: {text}; ratio {ratio[0]:.2f} wall, {ratio[1]:.2f} CPU", flush=True)


if __name__ == "__main__":
    main()
