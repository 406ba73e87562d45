"""Low-rank adapters: what they compute, what is saved, and the way back to a plain model."""

import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax import layers
from alto_jax.checkpoint import loading, runs
from alto_jax.experiment import OptimConfig, make_experiment
from alto_jax.lora import adapters
from alto_jax.lora.adapters import LoraConfig
from alto_jax.main import load_config
from alto_jax.mllm.language_model import LanguageModel, LanguageModelConfig
from alto_jax.parallel import sharding
from alto_jax.params import merge_params
from alto_jax.train import start
from alto_jax.train.state import create_state, make_optimizer
from tests.conftest import ROOT, run_python
from tests.train.test_loop import arrays

CFG = LoraConfig(rank=3, alpha=6.0, targets=r"/(qkv|q|kv|out|gate|up|down|head|fc1)/kernel$")


@jax.jit
def filled(added):
    """Adapters whose B is not 0."""
    leaves, tree = jax.tree.flatten(added)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves)])


def language_model():
    model = LanguageModel(LanguageModelConfig(vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, mlp_dim=24))
    ids = jax.random.randint(jax.random.key(0), (2, 7), 0, 40)
    init = jax.jit(lambda key: model.init(key, ids, method="forward")["params"])
    return model, {"language_model": init(jax.random.key(1))}, ids


def made(base):
    """New adapters of the language model or of a vision block."""
    return jax.jit(lambda params: adapters.make_adapters(params, CFG, jax.random.key(2)))(base)


def test_applied_equals_merged():
    """(x A) B beside each layer, also of scanned stacks and of kernels of many axes, equals the merged kernels."""
    model, base, ids = language_model()
    apply = lambda params: model.apply({"params": params["language_model"]}, ids, method="forward")
    forward = jax.jit(lambda params: apply(params))
    added = made(base)
    assert len(jax.tree.leaves(added)) == 2 * 7  # q, kv, out, gate, up, down of the stack, and the head
    plain = forward(base)
    with adapters.applied(CFG):
        fresh = forward(merge_params(base, added))
    np.testing.assert_array_equal(fresh, plain)  # B = 0

    whole = merge_params(base, filled(added))
    with adapters.applied(CFG):
        found = forward(whole)
        direct = jax.jit(jax.grad(lambda a: jnp.sum(jnp.tanh(apply(merge_params(base, a))))))
        found_grads = direct(filled(added))
    merge = jax.jit(lambda params: adapters.merged(params, CFG))
    merged = merge(whole)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    expected = forward(merged)
    assert float(jnp.max(jnp.abs(expected - plain))) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    through = lambda a: jnp.sum(jnp.tanh(apply(adapters.merged(merge_params(base, a), CFG))))
    expected_grads = jax.jit(jax.grad(through))(filled(added))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found_grads, expected_grads)
    np.testing.assert_array_equal(forward(adapters.without_adapters(whole)), plain)


def test_merged_is_base_plus_adapter_to_float32_rounding():
    model, base, _ = language_model()
    whole = merge_params(base, filled(made(base)))
    merged = adapters.merged(whole, CFG)["language_model"]["blocks"]["layers"]["attn"]
    attn = jax.tree.map(lambda a: np.asarray(a, np.float64), whole["language_model"]["blocks"]["layers"]["attn"])
    for name, formula in (("q", "ldr,lrnh->ldnh"), ("kv", "ldr,lrcnh->ldcnh"), ("out", "lnhr,lrd->lnhd")):
        exact = attn[name]["kernel"] + 2.0 * np.einsum(formula, attn[name]["lora_a"], attn[name]["lora_b"])
        np.testing.assert_allclose(merged[name]["kernel"], exact, rtol=3e-7, atol=3e-7)


def test_vision_layers():
    block = layers.ViTBlock(num_heads=2, mlp_dim=12, norm_eps=1e-6)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    base = {"vision": jax.jit(block.init)(jax.random.key(1), x)["params"]}
    whole = merge_params(base, filled(made(base)))
    assert "lora_b" in whole["vision"]["attn"]["qkv"] and "lora_a" not in whole["vision"]["mlp"]["fc2"]
    with adapters.applied(CFG):
        found, _ = jax.jit(lambda p: block.apply({"params": p}, x))(whole["vision"])
    expected, _ = jax.jit(lambda p: block.apply({"params": p}, x))(adapters.merged(whole, CFG)["vision"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_can_have_no_adapter():
    base = {"vision": {"patch_embed": nn.Conv(3, (2, 2)).init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))["params"]}}
    with pytest.raises(ValueError, match=r"lora.targets: '\.\*' names a convolution, vision/patch_embed/kernel"):
        adapters.make_adapters(base, LoraConfig(rank=2, targets=".*"), jax.random.key(0))
    with pytest.raises(ValueError, match="'nothing' names no kernel"):
        adapters.make_adapters(base, LoraConfig(rank=2, targets="nothing"), jax.random.key(0))


def test_checkpoint_of_the_8b_run_is_small():
    """Adapters and their optimizer state are below 1 % of the whole state, by shapes."""
    plain = load_config(str(ROOT / "configs" / "stage2.py:8b")).to_dict()
    sizes = {}
    for rank in (0, 16):
        plain["lora"]["rank"] = rank
        config = make_experiment(plain)
        from alto_jax.mllm.alto_llm import init_params

        def build(key, config=config):
            params = init_params(config.model, key)
            if config.lora.rank:
                params = merge_params(params, adapters.make_adapters(params, config.lora, key))
            optimizer = make_optimizer(config.optim, 10)
            return create_state(params, config.trainable, optimizer, {}, config.optim)

        state = jax.eval_shape(build, jax.random.key(0))
        saved = state.replace(frozen={}) if rank else state
        sizes[rank] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))
    print(f"whole state {sizes[0] / 2**30:.1f} GiB, adapters {sizes[16] / 2**30:.2f} GiB")
    assert 0 < sizes[16] < 0.01 * sizes[0]


SPECIAL = {"lora.rank": 2, "train.steps": 2, "eval.num_samples": 4, "train.checkpoint_every": 1}


def test_run_of_adapters(quickstart, tmp_path):
    """Stage 3 on adapters, its rollouts beside kernels of 8 bits: the base is the reference, resume and merge work, the
    base must be the same."""
    base, run, out = quickstart.path / "stage2", tmp_path / "run", tmp_path / "merged"
    command = ["-m", "alto_jax.main", "--config=configs/stage3.py:debug", f"--workdir={run}"]
    command += [f"--config.{name}={value}" for name, value in SPECIAL.items()]
    command += [f"--config.{change}" for change in quickstart.overrides["stage3"]]
    command += ["--config.grpo.generate.quantize=int8"]
    done = run_python(*command, f"--config.init_from={base}")
    assert done.returncode == 0, done.stderr[-3000:]
    saved = arrays(run, 2)
    assert not any("frozen" in name or "kernel" in name for name in saved)
    moved = [n for n in saved if "['params']" in n and n.endswith("['lora_b']") and np.any(saved[n])]
    assert moved, "the adapters did not train"
    # No second copy of the language model: the reference is the base.
    assert "reference" not in (run / "parameters.txt").read_text()

    merged = run_python("-m", "alto_jax.lora", "merge", run, out)
    assert merged.returncode == 0, merged.stderr[-3000:]
    plain, whole = arrays(base, 4), arrays(out, 0)
    name = "['language_model']['blocks']['layers']['mlp']['up']"
    a, b = (saved[f"['params']{name}['lora_{i}']"].astype(np.float64) for i in "ab")
    before = plain[f"['params']{name}['kernel']"].astype(np.float64)
    np.testing.assert_allclose(whole[f"['params']{name}['kernel']"], before + 8.0 * a @ b, rtol=3e-7, atol=3e-7)
    np.testing.assert_array_equal(
        whole["['params']['vision']['patch_embed']['kernel']"], plain["['params']['vision']['patch_embed']['kernel']"]
    )
    assert "lora" not in json.loads((out / "checkpoints" / "0" / "meta" / "metadata").read_text())
    # Opened in 8 bits, what is rounded is base and adapters together.
    opened = [loading.load_model(place, for_inference=True, quantize="int8") for place in (run, out)]
    jax.tree.map(np.testing.assert_array_equal, *[model.params for model in opened])

    # Resumed from step 1, the end is the same; with another base there is no way on.
    import shutil

    shutil.rmtree(run / "checkpoints" / "2")
    (run / "result.json").unlink()
    other = run_python(*command, f"--config.init_from={quickstart.path / 'stage3'}")
    assert other.returncode == 2 and "init_from" in other.stderr
    moved_base = shutil.copytree(base, tmp_path / "moved")  # another place of the same base is no other base
    again = run_python(*command, f"--config.init_from={moved_base}")
    assert again.returncode == 0 and "resumed from step 1" in again.stdout, again.stderr[-3000:]
    resumed = arrays(run, 2)
    assert resumed.keys() == saved.keys()
    for key in saved:
        np.testing.assert_array_equal(resumed[key], saved[key], err_msg=key)


def test_a_base_that_has_moved(debug_model, tmp_path, monkeypatch):
    here, gone = debug_model.path, str(tmp_path / "gone")
    meta = {"base": gone, "base_identity": runs.identity(here)}
    with pytest.raises(
        runs.Mismatch, match=r"RUN: .* their base is gone \(ALTO_BASE=DIR says where it is now\): .*gone"
    ):
        loading.base_of(meta, "RUN")
    monkeypatch.setenv("ALTO_BASE", str(here))
    assert loading.base_of(meta, "RUN") == str(here)
    with pytest.raises(runs.Mismatch, match=f"RUN: its adapters belong to {gone} at step 7 abc, {here} is at step "):
        loading.base_of(meta | {"base_identity": "step 7 abc"}, "RUN")


def test_adapters_need_a_base(tmp_path):
    plain = load_config(str(ROOT / "configs" / "stage2.py:debug")).to_dict()
    plain["lora"]["rank"] = 2
    config = make_experiment(plain)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    with pytest.raises(FileNotFoundError, match=r"config.init_from: adapters .* need a base"):
        start.initial_state(config, type("Stage", (), {"init": lambda key: {}, "inherits": ()}), None, None, mesh)
    assert OptimConfig().trainable == ".*" and config.trainable == "/lora_[ab]$"
    with pytest.raises(runs.Mismatch, match="holds adapters alone, and their base is gone"):
        loading.load_base({"base": str(tmp_path / "gone"), "base_identity": "x"}, {}, "RUN")
