"""Stages 2 and 3 on conversations as people have them: text alone, several masks, several images among the rest."""

import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from alto_jax.data.conversations import Conversations
from alto_jax.data.prompts import Prompts
from alto_jax.mllm import text
from tests.conftest import run_python
from tests.data import replicas

COUNT = 40  # 12 records of text alone, 4 of two masks, 4 of two images, 20 of one
FRACTION = 0.3
STEPS = 2


def write_mixed(root: pathlib.Path) -> pathlib.Path:
    """A meta file with a JSONL of COUNT records, all with images of their own."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(replicas.scenes(COUNT)):
        masks = [f"masks/{number}_{k}.png" for k in range(2)]
        Image.fromarray(scene.image).save(root / "images" / f"{number}.jpg")
        mask = scene.union([0])
        for file, shift in zip(masks, (0, 9)):
            Image.fromarray(np.roll(mask, shift, axis=1)).save(root / file)
        ask = lambda phrase: {"from": "human", "value": text.question(phrase, adaptive=True)}
        answer = {"from": "gpt", "value": text.answer(adaptive=True)}
        image = f"images/{number}.jpg"
        if number % 10 < 3:
            words = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": "A number."}]
            lines.append([{"conversations": words}, {"image": "", "conversations": words}][number % 2])
        elif number % 10 == 3:
            turns = [ask("it"), answer, ask("the other one"), answer]
            lines.append({"image": image, "mask": masks, "conversations": turns})
        elif number % 10 == 4:
            turns = [{"from": "human", "value": "<image>\n<image>\nWhich is larger?"}, {"from": "gpt", "value": "No"}]
            lines.append({"image": [image, "images/0.jpg"], "conversations": turns})
        else:
            lines.append({"image": image, "mask": masks[0], "conversations": [ask("it"), answer]})
    (root / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "meta.json").write_text(json.dumps({"mixed": {"root": ".", "annotation": "chat.jsonl", "length": COUNT}}))
    return root / "meta.json"


# The command, with a list of the records that it read: which side of the split they are of, and which image they show.
TRACED = """
import json, pathlib, sys
from alto_jax import cli, main
from alto_jax.data.conversations import Conversations
seen, part, get = [], Conversations.part, Conversations.at_epoch
def named_part(self, split):
    found = part(self, split)
    found.side = "held out" if split.held_out else "training"
    return found
def traced_get(self, index, epoch):
    record = get(self, index, epoch)
    seen.append([self.side, record["key"], record.get("image_name")])
    return record
Conversations.part, Conversations.at_epoch = named_part, traced_get
def traced_main():
    code = main.main()
    pathlib.Path(SEEN).write_text(json.dumps(seen))
    return code
cli.run(traced_main)
"""


def arguments(stage: str, meta: pathlib.Path) -> list[str]:
    changes = {
        "data.source": "jsonl", "data.meta": meta, "data.max_masks": 2, "data.validation_fraction": FRACTION,
        "data.max_length": 300, "data.num_threads": 1, "train.steps": STEPS, "train.batch_size": 8,
        "eval.num_samples": 4, "eval.batch_size": 4,
    }  # fmt: skip
    changes |= {"sft.max_supervised": 200} if stage == "stage2" else {}
    return [f"--config.{name}={value}" for name, value in changes.items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, debug_model):
    """Stage 2 from random parameters, and stage 3 from it: the folder, and what each run printed and read."""
    root = tmp_path_factory.mktemp("mixed")
    meta, start, output, seen = write_mixed(root), debug_model.path, {}, {}
    for stage in ("stage2", "stage3"):
        command = [f"--config=configs/{stage}.py:debug", f"--workdir={root / stage}", f"--config.init_from={start}"]
        code = TRACED.replace("SEEN", repr(str(root / f"{stage}.json")))
        done = run_python("-c", code, *command, *arguments(stage, meta))
        assert done.returncode == 0, done.stderr[-2000:]
        start, output[stage] = root / stage, done.stdout + done.stderr
        seen[stage] = json.loads((root / f"{stage}.json").read_text())
    return root, output, seen


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_runs_end_with_a_result_and_no_bad_record(runs, stage):
    root, output, _ = runs
    result = json.loads((root / stage / "result.json").read_text())
    assert 0 < result["eval"]["giou_no_codes"] <= 1 and np.isfinite(result["metrics_last"]["loss"])
    # In stage 3 a record of several images is one of those without a prompt.
    assert ("4 of 40 records are passed over" in output[stage]) == (stage == "stage2")
    assert "left out" not in output[stage]


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_training_never_sees_what_is_evaluated(runs, stage):
    _, _, seen = runs
    sides = {side: [(key, name) for s, key, name in seen[stage] if s == side] for side in ("training", "held out")}
    assert len(sides["training"]) >= 8 * STEPS and len(sides["held out"]) >= 4
    for column in (0, 1):
        names = [{record[column] for record in records} - {None} for records in sides.values()]
        assert all(names) and not names[0] & names[1]
    if stage == "stage2":  # Text alone is trained on too; prompts all have an image.
        assert any(name is None for _, name in sides["training"])
    else:
        assert all(name is not None for records in sides.values() for _, name in records)


def test_two_masks_are_trained_on_and_are_two_prompts(tmp_path):
    config = Conversations(write_mixed(tmp_path), max_masks=2)
    masks = [len(config[i]["masks"]) for i in range(len(config))]
    assert len(masks) == COUNT - 4 and [masks.count(n) for n in range(3)] == [12, 20, 4]
    prompts = Prompts(config, "mixed")
    assert len(prompts) == 20 + 2 * 4
    first, second = [prompts[i] for i in range(len(prompts)) if "#" in prompts[i]["key"]][:2]
    assert first["key"].removesuffix("#0") == second["key"].removesuffix("#1") == "mixed/chat.jsonl:4"
    np.testing.assert_array_equal(np.roll(first["masks"][0], 9, axis=1), second["masks"][0])
    assert ["it" in first["conversations"][0]["value"], "the other one" in second["conversations"][0]["value"]] == [
        True
    ] * 2
    assert len(Conversations(tmp_path / "meta.json", max_masks=1)) == COUNT - 8
