"""Mixtures, text buckets, and both of them in a training run on real formats."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest

from alto_jax.data import pipeline, prepare, sources
from alto_jax.data.mixture import Mixture
from alto_jax.evaluate import results, runner
from alto_jax.mllm.text import TextTokenizer
from alto_jax.parallel.shares import BatchShare
from tests.data import replicas
from tests.data.test_prepare import SIZES, job
from tests.evaluate.test_runner import compiled_once  # noqa: F401 - a fixture
from tests.evaluate.test_runner import options as evaluate_options


class Named:
    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return {"key": str(index)}


def test_mixture_has_exact_shares_and_loses_no_record():
    mixed = Mixture({"a": (Named(10), 3.0), "b": (Named(50), 1.0)}, seed=1)
    assert mixed.counts == {"a": 150, "b": 50} and len(mixed) == 200
    keys = [record["key"] for record in mixed]
    assert sorted(key for key in keys if key[0] == "b") == sorted(f"b:{i}" for i in range(50))
    assert [keys.count(f"a:{i}") for i in range(10)] == [15] * 10
    assert keys == [r["key"] for r in Mixture({"a": (Named(10), 3.0), "b": (Named(50), 1.0)}, seed=1)]
    assert 20 < sum(key[0] == "b" for key in keys[:100]) < 30
    with pytest.raises(ValueError, match="mixture.a.weight"):
        Mixture({"a": (Named(1), 0.0)})


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [((7,), (2.0,)), ((10, 50), (3.0, 1.0)), ((5, 5, 5), (1, 1, 1)), ((3, 40, 11, 1), (0.05, 0.2, 0.7, 0.05))],
)
def test_a_mixture_is_even_in_every_stretch(sizes, weights):
    """Each source's records in the order of its rows, none left out; shares right in each stretch, not only in all."""
    for seed in range(3):
        mixed = Mixture({str(i): (Named(s), w) for i, (s, w) in enumerate(zip(sizes, weights))}, seed=seed)
        places = [mixed.place(index) for index in range(len(mixed))]
        for number, size in enumerate(sizes):
            mine = [nth for which, nth in places if which == number]
            assert mine == list(range(mixed.counts[str(number)])) and len(mine) >= size
            share = mixed.counts[str(number)] / len(mixed)
            assert abs(share - weights[number] / sum(weights)) < 1 / len(mixed)
            so_far = np.cumsum([which == number for which, _ in places])
            assert np.abs(so_far - share * np.arange(1, len(mixed) + 1)).max() < len(sizes)
        assert [record["key"] for record in mixed][-1] == mixed[-1]["key"]
        with pytest.raises(IndexError):
            mixed[len(mixed)]


def test_a_mixture_takes_no_memory_for_its_records():
    """A small share of a large set beside a small one makes an epoch of millions, and entries for none of them."""
    tracemalloc.start()
    mixed = Mixture({"large": (Named(200_000), 0.05), "small": (Named(1000), 0.95)})
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(mixed) == 4_000_000 and mixed.counts == {"large": 200_000, "small": 3_800_000} and used < 50_000
    keys = [mixed[index]["key"] for index in range(0, len(mixed), 997)]
    assert sum(key.startswith("large:") for key in keys) == pytest.approx(len(keys) / 20, rel=0.1)
    iterator = iter(pipeline.batches(mixed, list, batch_size=50, seed=3))
    first = next(iterator), next(iterator)
    assert len({record["key"] for record in first[0]}) > 40
    state = iterator.get_state()
    following = next(iterator)
    again = iter(pipeline.batches(mixed, list, batch_size=50, seed=3))
    again.set_state(state)
    assert next(again) == following
    with pytest.raises(ValueError, match="mixture.large.weight: with 1e-06 of .* can be shuffled"):
        Mixture({"large": (Named(200_000), 1e-6), "small": (Named(1000), 1.0)})
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mixture.a.weight"):
            Mixture({"a": (Named(3), weight), "b": (Named(3), 1.0)})


def test_text_buckets_cut_padding_only(tmp_path, debug_model):
    from alto_jax.data.conversations import Conversations

    tok = TextTokenizer.load(debug_model.path)
    source = Conversations(replicas.write_conversations(tmp_path, 6))
    sizes = dict(vision_size=28, image_size=64, mask_size=32, num_image_tokens=4, max_length=256, num_latent_tokens=8)
    options = dict(max_masks=2, batch_size=1, seed=0, system=None, num_epochs=1)
    whole = list(pipeline.chat_batches(source, tok, **sizes, **options))
    cut = list(pipeline.chat_batches(source, tok, **sizes, **options, length_buckets=(60, 80, 128)))
    lengths = [batch.ids.shape[1] for batch in cut]
    assert len(set(lengths)) > 1 and set(lengths) <= {60, 80, 128, 256}
    for a, b, length in zip(whole, cut, lengths):
        np.testing.assert_array_equal(a.ids[:, :length], b.ids)
        assert not a.text_mask[:, length:].any() and a.text_mask.sum() == b.text_mask.sum()
    options |= {"batch_size": 2, "share": BatchShare((0,), 2, 2)}
    part = next(iter(pipeline.chat_batches(source, tok, **sizes, **options, length_buckets=(60, 80))))
    assert part.ids.shape[1] == 256


def config_of(debug_model, **data):
    config = debug_model.config
    train = dataclasses.replace(config.train, steps=2, batch_size=2)
    changed = dataclasses.replace(config.data, max_length=200, max_masks=2, **data)
    quick = dataclasses.replace(config.eval, num_samples=0)
    return dataclasses.replace(config, init_from=str(debug_model.path), train=train, data=changed, eval=quick)


@pytest.mark.usefixtures("compiled_once")
def test_every_format_is_prepared_trained_on_and_evaluated(tmp_path, debug_model):
    """Two steps on a mixture of all training sets, prepared (and some raw); then every benchmark, prepared and raw.

    SA-1B, of stage 1, has its turn in test_bad_files.py.
    """
    from alto_jax.train.loop import train

    data = tmp_path / "data"
    replicas.write_conversations(data / "chat")
    replicas.write_all(data)
    sizes = {**SIZES, "vision_size": debug_model.config.model.vision.image_size}

    def prepared(name, folder):
        return str(prepare.prepare(job(name, data / folder, sizes), tmp_path / folder, max_bad_fraction=0))

    training = [("conversations", "chat"), ("refcoco_train", ""), ("refcoco_train", "psalm"), ("refcoco+_train", "")]
    training += [("refcocog_train", ""), ("grefcoco_train", ""), ("grefcoco_train", "psalm")]
    content = {f"{name} {folder}": {"weight": 1, "source": "prepared", "root": prepared(name, folder)}
               for name, folder in training}  # fmt: skip
    content |= {
        "raw chat": {"weight": 1, "source": "jsonl", "meta": "data/chat/meta.json"},
        "raw": {"weight": 1, "source": "referring", "root": "data", "meta": "refcoco,grefcoco"},
    }
    (tmp_path / "mix.json").write_text(json.dumps(content))
    config = config_of(debug_model, source="mixture", meta=str(tmp_path / "mix.json"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=24))
    keys = [record["key"] for record in sources.chat_source(config)]
    order = iter(pipeline.batches(keys, list, batch_size=24, seed=config.seed + sources._SEED_OFFSET))
    assert {key.split(":")[0] for _ in range(2) for key in next(order)} == content.keys()
    result = train(config, tmp_path / "run")
    assert np.isfinite(result["metrics_last"]["loss"])

    trained = type(debug_model)(path=tmp_path / "run", config=config)
    names = ["refcoco_val", "refcoco+_val", "refcocog_val", "grefcoco_val", "refcocom_val_part_only", "a150", "pc59"]
    names += ["refcocom_val_object_part", "pas20"]
    raw = runner.evaluate(evaluate_options(trained, data, tmp_path / "raw", ",".join(names)))
    assert len(raw) == len(names)
    for task, numbers in raw.items():  # by the areas that were written down
        lines = results.read_results(tmp_path / "raw" / f"results/{task}.jsonl")[1]
        ious = [line["intersection"] / line["union"] if line["union"] else 1.0 for line in lines if "union" in line]
        assert len(ious) == numbers["num_samples"] and numbers["giou"] == pytest.approx(np.mean(ious))
    name, out = "grefcoco_val", tmp_path / "out"
    found = runner.evaluate(evaluate_options(trained, prepared(name, ""), out, name))
    task = f"{name}.joined.adaptive"
    assert found[task] == raw[task]
    file = f"results/{task}.jsonl"
    (header, lines), (raw_header, raw_lines) = (results.read_results(path / file) for path in (out, tmp_path / "raw"))
    assert lines == raw_lines and header["data"] != raw_header["data"]  # resized images are other data
    assert {**header, "data": ""} == {**raw_header, "data": ""}


def test_stage_three_and_stage_one_sources(tmp_path, debug_model):
    replicas.write_refer(tmp_path, "grefcoco", splits=("train",))
    config = config_of(debug_model, source="referring", root=str(tmp_path), meta="grefcoco")
    records = list(sources.chat_source(config, adaptive_only=True))
    assert all(len(r["masks"]) == 1 and "adaptive" in r["conversations"][0]["value"] for r in records)
    replicas.write_sa1b(tmp_path / "sa1b")
    sizes = {**SIZES, "vision_size": 0}
    folder = prepare.prepare(job("sa1b", tmp_path / "sa1b", sizes), tmp_path / "out", max_bad_fraction=0)
    config = dataclasses.replace(config_of(debug_model, source="prepared", root=str(folder)), stage="stage1")
    batch = next(sources.mask_iterator(config))
    assert batch.image.shape == (2, 64, 64, 3) and batch.mask.shape == (2, 32, 32)
    with pytest.raises(ValueError, match="prepared kind is 'masks', expected 'chat'"):
        sources.chat_source(config)
