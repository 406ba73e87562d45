"""A tiny ALToLLM with random weights, for tests of data and evaluation."""

import pathlib
import types
from typing import Any

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def random_params(model: Any) -> dict[str, np.ndarray]:
    """Random parameters of a model by their path, drawn without compiling its initialisation."""
    from flax import traverse_util
    import jax

    from alto_jax.mllm.alto_llm import init_params

    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    abstract, rng, flat = traverse_util.flatten_dict(shapes, sep="/"), np.random.default_rng(0), {}
    for name, leaf in abstract.items():
        if name.endswith("/scale"):
            flat[name] = np.ones(leaf.shape, np.float32)
        else:
            spread = 0.5 if "pixel_decoder/conv_out" in name else 0.3 / np.sqrt(max(leaf.shape[-2:][0], 1))
            flat[name] = rng.normal(0, spread, leaf.shape).astype(np.float32)
    return flat


def write_model(path: pathlib.Path, config: Any) -> None:
    """A checkpoint of a stage-2 configuration's sizes; such that its masks are neither full nor empty."""
    from alto_jax.checkpoint import rows
    from alto_jax.config import to_dict
    from alto_jax.data import vocabulary

    flat = random_params(config.model)
    shapes = {name: (value.shape, value.dtype) for name, value in flat.items()}

    def fill(sinks):
        for name, value in flat.items():
            sinks[name][...] = value

    meta = {"stage": "stage2", "model": to_dict(config.model), "data": {"system": None}, "step": 0}
    rows.save_params(path, shapes, fill, meta)
    vocabulary.text_tokenizer(config).save(path)


@pytest.fixture(scope="session")
def debug_model(tmp_path_factory):
    """A checkpoint of stage2.py:debug's sizes."""
    from alto_jax import experiment, main

    config = experiment.make_experiment(main.load_config(str(ROOT / "configs/stage2.py:debug")))
    path = tmp_path_factory.mktemp("debug_model")
    write_model(path, config)
    return types.SimpleNamespace(path=path, config=config)
