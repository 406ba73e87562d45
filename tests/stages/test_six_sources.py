"""Stage 2 on a mixture of the paper's kinds of data: it trains, resumes exactly, and is evaluated on all of them."""

import dataclasses
import json
import shutil

import numpy as np
from PIL import Image
import pytest

from alto_jax.data import sources
from alto_jax.evaluate import runner
from alto_jax.mllm import text
from tests.data import replicas
from tests.evaluate.test_runner import options
from tests.one_step import one_step_program  # noqa: F401 - a fixture
from tests.train.test_loop import arrays, position

NAMES = ("multi_target_sa1b_val", "refcoco_val", "grefcoco_val", "rec_refcoco_val", "pope_popular")


def write_dialogues(root) -> None:
    """Meta files of two sets: text alone; questions about pictures, in several turns where a mask is in the second."""
    says = lambda *said: [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(said)]
    words = [{"conversations": says(f"How much is {n} and {n}?", f"It is {2 * n}.", "Sure?", "Yes.")} for n in range(4)]
    (root / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in words))
    (root / "masks").mkdir()
    pictures = []
    for number, scene in enumerate(replicas.scenes(4)):
        Image.fromarray(scene.image).save(root / f"{number}.jpg", quality=95)
        Image.fromarray(scene.union([0])).save(root / "masks" / f"{number}.png")
        shown = text.MASK_START + text.code_token(1) * 32 + text.MASK_END
        turns = says("<image>\nWhat is it?", "A thing.", f"And {shown}?", f"The {scene.objects[0].name}.")
        masks = {"mask": f"masks/{number}.png"} if number % 2 else {}
        pictures.append({"image": f"{number}.jpg", **masks, "conversations": turns if masks else turns[:2]})
    (root / "vqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pictures))
    for name in ("text", "vqa"):
        entry = {"root": ".", "annotation": f"{name}.jsonl", "data_augment": False, "repeat_time": 1, "length": 4}
        (root / f"{name}.json").write_text(json.dumps({name: entry}))


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    for dataset in ("refcoco", "grefcoco"):
        replicas.write_refer(root, dataset, splits=("val", "train"), count=4)
    replicas.write_sa1b(root / "sa1b", ids=(0, 1, 2, *replicas.SA1B_VALIDATION))
    replicas.write_questions(root)
    (root / "chat").mkdir()
    write_dialogues(root / "chat")
    entries = {
        "boxes": {"source": "sa1b_chats", "root": "sa1b"},
        "refcoco": {"source": "referring", "root": ".", "meta": "refcoco"},
        "grefcoco": {"source": "referring", "root": ".", "meta": "grefcoco"},
        "text": {"source": "jsonl", "meta": "chat/text.json"},
        "vqa": {"source": "jsonl", "meta": "chat/vqa.json"},
        "comprehension": {"source": "comprehension", "root": ".", "meta": "refcoco"},
    }
    mixture = {name: {"weight": 1, **entry} for name, entry in entries.items()}
    (root / "mixture.json").write_text(json.dumps(mixture))
    return root


@pytest.mark.usefixtures("one_step_program")
def test_six_sources_train_resume_and_are_evaluated(data, tmp_path, debug_model):
    from alto_jax.train.loop import train

    config = debug_model.config
    change = lambda group, **values: dataclasses.replace(getattr(config, group), **values)
    config = dataclasses.replace(
        config, init_from=str(debug_model.path), train=change("train", steps=4, batch_size=6, checkpoint_every=2),
        data=change("data", source="mixture", meta=str(data / "mixture.json"), max_length=260, max_targets=2),
        eval=change("eval", num_samples=0),
    )  # fmt: skip
    records = sources.chat_source(config)
    kinds = {record["key"].partition(":")[0] for record in records}
    assert kinds == {"boxes", "refcoco", "grefcoco", "text", "vqa", "comprehension"}
    assert any(record["image"] is None for record in records)
    prompts = sources.chat_source(config, adaptive_only=True)
    assert {record["key"].partition(":")[0] for record in prompts} == {"boxes", "refcoco", "grefcoco"}
    whole = train(config, tmp_path / "run")
    assert np.isfinite(whole["metrics_last"]["loss"])
    steps = sorted(int(step.name) for step in (tmp_path / "run" / "checkpoints").iterdir())
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / str(steps[-1]))
    (tmp_path / "again" / "result.json").unlink()
    train(config, tmp_path / "again")
    first, second = (arrays(tmp_path / run, steps[-1]) for run in ("run", "again"))
    assert all(np.array_equal(first[name], second[name]) for name in first) and first.keys() == second.keys()
    assert position(tmp_path / "run", steps[-1]) == position(tmp_path / "again", steps[-1])
    trained = type(debug_model)(path=tmp_path / "run", config=config)
    found = runner.evaluate(options(trained, data, tmp_path / "out", ",".join(NAMES), worst=0))
    assert {task["benchmark"] for task in found.values()} == set(NAMES)
    assert all(task["num_skipped"] == 0 and task["num_samples"] >= 2 for task in found.values())
