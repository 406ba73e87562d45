"""Questions answered in words: the command, beside the Python call."""

import json

import numpy as np
from PIL import Image
import pytest

import alto_jax
from alto_jax import predict
from alto_jax.config import ConfigError


@pytest.fixture
def asked(debug_model, tmp_path, monkeypatch):
    """Runs the command on a wide image: `asked(options) -> exit code`; `asked.image` and `asked.folder`."""
    image = np.random.default_rng(0).integers(0, 256, (56, 168, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")

    def run(*options: str) -> int:
        command = ["predict", "--checkpoint", str(debug_model.path), "--image", str(tmp_path / "a.png"), *options]
        monkeypatch.setattr("sys.argv", command)
        return predict.main()

    run.image, run.folder = image, tmp_path
    return run


def test_the_command_answers_as_the_call_does(asked, debug_model, capsys):
    file = asked.folder / "a.json"
    assert asked("--question", "What is it?", "--max_tiles", "4", "--json", str(file)) == 0
    found, shown = json.loads(file.read_text()), capsys.readouterr().out
    expected = alto_jax.load(debug_model.path).answer(asked.image, "What is it?", max_tiles=4)
    assert found["num_tiles"] == [4] and found["token_ids"] == expected.token_ids and len(expected.token_ids) > 1
    assert found["text"] == expected.text and shown.startswith(f"{expected.text}\ntiles: 4  ")


def test_what_the_call_takes_and_refuses(debug_model):
    model, image = alto_jax.load(debug_model.path), np.zeros((56, 56, 3), np.uint8)
    given = model.answer(image, "What?", max_tiles=np.int64(1), max_new_tokens=np.int32(2))
    assert given.token_ids == model.answer(image, "What?", max_new_tokens=2).token_ids
    turn = {"from": "human", "value": "What?"}
    for question, message in [
        ([{"role": "user", "content": "What?"}], r'question\[0\]: expected {"from": "human"'),
        ([turn, {"from": "gpt", "value": None}], r"question\[1\]: expected"), (["What?"], r"question\[0\]: expected"),
        (None, "question: expected text, or a list of turns, got None"), (turn, "question: expected text, or a list"),
        ([], "question: expected some text"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.answer(image, question)
    for name in ("max_tiles", "max_new_tokens"):
        for value in (True, 0, 1.5, "2"):
            with pytest.raises(ValueError, match=f"{name}: expected a whole number of at least 1"):
                model.answer(image, "What?", **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--question", "What?", "--out", "m.png"), "--out=m.png: does not go with --question"),
        (("--question", "What?", "--text", "it"), "--text=it: does not go with --question"),
        (("--question", "What?", "--length", "4"), "--length=4: does not go with --question"),
        (("--question", " "), "--question=' ': expected some text"),
        (("--question", "What?", "--max_tiles", "0"), "--max_tiles=0: expected at least 1"),
        (("--text", "it", "--max_tiles", "2"), "--max_tiles=2: expected 1 without --question; masks have one tile"),
    ],
)
def test_what_does_not_go_with_a_question_is_one_error(asked, options, message):
    with pytest.raises(ConfigError, match=message):
        asked(*options)
