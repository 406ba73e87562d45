"""Conversation files in every form that people have them in: one record, one reading."""

import json

import numpy as np
from PIL import Image
import pytest

from alto_jax import experiment, main
from alto_jax.data import chat_lines, pipeline, prepare, sources
from alto_jax.data.chat_examples import chat_text
from alto_jax.data.conversations import Conversations
from alto_jax.data.prepared import Prepared
from alto_jax.data.prompts import NoPrompts, Prompts, requests
from alto_jax.mllm import text
from tests.conftest import ROOT
from tests.data.test_prepare import job

ASK, ANSWER = text.question("the café", adaptive=True), text.answer(adaptive=True)
TURNS = [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]
WORDS = [{"from": "human", "value": "Où?"}, {"from": "gpt", "value": "Là."}]


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "a.png")
    mask = np.zeros((20, 30), np.uint8)
    mask[4:12, 3:9] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(np.roll(mask, 9, axis=1)).save(tmp_path / "n.png")
    return tmp_path


def write(folder, *records, name="chat.jsonl", raw=None):
    """The meta file of a set with these records."""
    content = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records) if raw is None else raw
    (folder / name).write_text(content, encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps({"set": {"root": ".", "annotation": name}}))
    return folder / "meta.json"


SAID = {"image": "a.png", "mask": "m.png"}
PART = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": ASK}]
FORMS = [
    {"image": "a.png", "mask": "m.png", "conversations": TURNS},
    {"image": ["a.png"], "mask": ["m.png"], "conversations": TURNS},
    {"images": ["a.png"], "masks": ["m.png"], "messages": TURNS},
    {**SAID, "conversations": [{"from": "user", "value": ASK}, {"from": "assistant", "value": ANSWER}]},
    {**SAID, "messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}]},
    {**SAID, "messages": [{"role": "user", "content": PART}, {"role": "assistant", "content": ANSWER}]},
]  # fmt: skip


@pytest.mark.parametrize("as_list", [False, True])
def test_all_forms_give_the_same_records(folder, as_list, debug_model):
    raw = json.dumps(FORMS, indent=2, ensure_ascii=False) if as_list else None
    source = Conversations(write(folder, *FORMS, name="chat.json", raw=raw))
    tok = text.TextTokenizer.load(debug_model.path)
    sizes = dict(max_length=200, num_image_tokens=4, num_latent_tokens=8, max_masks=1, system=None)
    assert [record["key"] for record in source] == [f"set/chat.json:{n}" for n in range(1, len(FORMS) + 1)]
    ids = [chat_text(record, tok, **sizes)[0] for record in source]
    assert all(len(record["masks"]) == 1 and "café" in str(record["conversations"]) for record in source)
    assert all(row == ids[0] for row in ids) and source.num_prompts().tolist() == [1] * len(FORMS)


@pytest.mark.parametrize("image", [{}, {"image": ""}, {"image": None}, {"image": []}, {"image": [""]}, {"images": []}])
def test_records_without_an_image_are_text(folder, image, debug_model):
    source = Conversations(write(folder, {**image, "conversations": WORDS}, FORMS[0]))
    record = source[0]
    assert record["image"] is None and record["masks"] == [] and record["conversations"] == WORDS
    assert source.conversation(0)["image"] is None and "image" not in source.conversation(1)
    tok = text.TextTokenizer.load(debug_model.path)
    options = dict(vision_size=28, image_size=64, mask_size=32, num_image_tokens=4, max_length=200, max_masks=1,
                   num_latent_tokens=8, batch_size=2, seed=0, system=None, num_epochs=1, shuffle=False)  # fmt: skip
    (batch,) = pipeline.chat_batches(source, tok, **options)
    assert (batch.ids == tok.ids.img_context).sum(1).tolist() == [0, 4]
    assert batch.mask_valid.tolist() == [[False], [True]] and not batch.image[0].any() and batch.image[1].any()
    supervised = [i for i in batch.labels[0].tolist() if i != text.IGNORE]
    assert tok.decode(supervised) == "Là.<|im_end|>"


def test_text_alone_shares_packed_rows(folder, debug_model):
    source = Conversations(write(folder, *[{"conversations": WORDS}, FORMS[0]] * 3))
    tok = text.TextTokenizer.load(debug_model.path)
    options = dict(vision_size=28, image_size=64, mask_size=32, num_image_tokens=4, max_length=160, max_masks=1,
                   num_latent_tokens=8, batch_size=2, seed=0, system=None, num_threads=0)  # fmt: skip
    batch = next(iter(pipeline.chat_batches(source, tok, **options, pack_samples=4)))
    assert batch.segment_ids.max() >= 3 and (batch.segment_ids > 0).any(1).all()
    for row in range(2):
        number = int((batch.ids[row] == tok.ids.img_context).sum()) // 4
        shown = [bool(image.any()) for image in batch.image[row]]
        assert 0 < number <= batch.segment_ids[row].max() and shown == sorted(shown, reverse=True)
        assert sum(shown) == number == int(batch.mask_valid[row].sum())


def test_long_text_without_masks_is_cut(debug_model):
    tok = text.TextTokenizer.load(debug_model.path)
    sizes = dict(num_image_tokens=4, num_latent_tokens=8, max_masks=1, system=None)
    long = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because " * 300}]
    whole, _ = chat_text({"key": "k", "image": None, "conversations": long}, tok, max_length=9999, **sizes)
    ids, labels = chat_text({"key": "k", "image": None, "conversations": long}, tok, max_length=64, **sizes)
    assert ids == whole[:64] and len(labels) == 64 and labels[-1] == ids[-1]
    for turns in (
        [{**TURNS[0], "value": "Why? " * 300 + ASK}, TURNS[1]],
        [{**long[0], "value": "Why? " * 300}, long[1]],
    ):
        with pytest.raises(ValueError, match="record k: .* text tokens, but max_length is 64"):
            chat_text({"key": "k", "conversations": turns}, tok, max_length=64, **sizes)
    with pytest.raises(ValueError, match="record k: conversations: there is no answer"):
        chat_text({"key": "k", "conversations": long[:1]}, tok, max_length=64, **sizes)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"image": ["a.png", "b.png"], "mask": "m.png", "conversations": TURNS}, "2 images in one record with a mask"),
        ({"images": ["a.png", "b.png", "c.png"], "mask": ["m.png"], "messages": TURNS}, "3 images in one record with"),
        ({"video": "v.mp4", "conversations": WORDS}, "a video"),
    ],
)
def test_unsupported_records_are_named_once_and_are_no_bad_records(folder, record, what, caplog):
    meta = write(folder, record, FORMS[0], record)
    source = Conversations(meta)
    assert [r["key"] for r in source] == ["set/chat.jsonl:2"] and len(Conversations(meta)) == 1
    (said,) = [m for m in caplog.messages if "passed over" in m]
    assert said.startswith("2 of 3 records are passed over") and f"chat.jsonl line 1: {what}" in said
    with pytest.raises(ValueError, match=rf"meta\.json: none of its records can be used: .*line 1: {what}"):
        Conversations(write(folder, record, record))


def test_more_masks_than_the_run_takes_are_named_when_opened(folder, caplog):
    two = {"image": "a.png", "mask": ["m.png", "n.png"], "conversations": TURNS * 2}
    meta = write(folder, two, FORMS[0])
    assert len(Conversations(meta, max_masks=2)) == 2 and len(Conversations(meta, max_masks=1)) == 1
    assert "1 of 2 records have more masks than config.data.max_masks=1" in caplog.text
    folder_of = prepare.prepare(job("conversations", folder), folder / "out", max_bad_fraction=0)
    assert len(Prepared(folder_of, max_masks=2)) == 2
    (kept,) = Prepared(folder_of, max_masks=1)
    assert kept["key"] == "set/chat.jsonl:2"
    assert Prepared(folder_of, max_masks=1).num_prompts().tolist() == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "is no JSON"),
        ('{"conversations": [["human", "x"]]}', "field conversations: expected turns"),
        ('{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', "field messages: expected turns"),
        ('{"messages": [{"role": "user", "content": 3}]}', "field messages: expected turns"),
        ('{"mask": "m.png", "conversations": [{"from": "human", "value": "x"}]}', "field image: expected a path, as"),
        ('{"image": {"path": 1}, "conversations": [{"from": "human", "value": "x"}]}', "field image: expected a path"),
        ('{"image": "a.png", "mask": "m.png", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", '
         '"value": "<ALTo_Start><TOK_0><ALTo_End><ALTo_Start><TOK_0><ALTo_End>"}]}', "1 masks, but 2 mask"),
    ],
)  # fmt: skip
def test_malformed_records_stay_and_say_what_is_wrong(folder, line, message):
    source = Conversations(write(folder, raw=json.dumps(FORMS[0]) + "\n" + line + "\n"))
    assert len(source) == 2
    with pytest.raises(ValueError, match=rf"chat\.jsonl(:| line )2.*{message}"):
        Prompts(source, "x")[1]


@pytest.mark.parametrize("raw", ["[", "[{}", '[{"a": 1} {"b": 2}]', "[{}] {}", "[1, ", "[nope]"])
def test_a_list_that_is_cut_or_wrong_is_one_error(folder, raw):
    with pytest.raises(ValueError, match=r"chat\.json is no JSON list, after entry \d: "):
        Conversations(write(folder, name="chat.json", raw=raw))
    with pytest.raises(ValueError, match="chat.json holds no entry"):
        Conversations(write(folder, name="chat.json", raw="\n []"))


def test_a_changed_file_is_read_anew(folder):
    assert len(Conversations(write(folder, FORMS[0]))) == 1
    assert len(Conversations(write(folder, FORMS[0], FORMS[1]))) == 2


def test_requests_are_turns_that_name_what_one_mask_shows():
    said = lambda *pairs: [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(pairs)]
    fixed = text.answer(adaptive=False)
    assert requests(TURNS, 1, "") == [(ASK, 0)] and requests(WORDS, 0, "") == []
    assert requests(TURNS[:1], 1, "") == [(ASK, 0)]  # prompts alone
    assert requests(said("Where is it?", ANSWER, ASK, fixed), 2, "") == [(ASK, 1)]
    assert requests(said("Where is it?", ANSWER), 1, "") == []
    both = requests(said("Segment <ref>a</ref> and <ref>b</ref>.", ANSWER + fixed), 2, "")
    assert both == [(text.question("a", adaptive=True), 0), (text.question("b", adaptive=False), 1)]
    assert requests(said("Segment <ref>both</ref>.", ANSWER + fixed), 2, "") == []
    boxed = "Segment <ref>a</ref><box>[[1,2,3,4]]</box>."
    assert requests(said(boxed, ANSWER), 1, "") == [(boxed, 0)] and len(text.find_references(boxed)) == 1
    with pytest.raises(ValueError, match="here: 2 masks, but 1 mask placeholders"):
        requests(TURNS, 2, "here")


def test_nothing_to_prompt_with_is_one_error_when_opened(folder, debug_model):
    meta = write(folder, {"conversations": WORDS}, {"image": "a.png", "conversations": WORDS})
    with pytest.raises(NoPrompts, match=r"none of the 2 records asks for a mask .* nothing to prompt with"):
        Prompts(Conversations(meta), "x")
    for stage, opened in (("stage3", sources.prompt_iterator), ("stage2", sources.held_out_prompts)):
        loaded = main.load_config(str(ROOT / f"configs/{stage}.py:debug"))
        loaded.data.source, loaded.data.meta = "jsonl", str(meta)
        config = experiment.make_experiment(loaded)
        tok = text.TextTokenizer.load(debug_model.path)
        with pytest.raises(ValueError, match=rf"config\.data\.meta {meta}: none of the 2 records asks for a mask"):
            opened(config, tok, *(() if stage == "stage2" else (0, 1)))
    assert len(sources.chat_source(config)) == 2  # Text is trained on.


def test_text_alone_is_prepared_and_read_back(folder, debug_model):
    meta = write(folder, {"conversations": WORDS}, FORMS[0], {"image": "a.png", "conversations": WORDS})
    raw = Conversations(meta)
    for image_format in ("raw", "png", "jpeg"):
        made = job("conversations", folder, image_format=image_format)
        stored = Prepared(prepare.prepare(made, folder / image_format, max_bad_fraction=0))
        assert [r["image"] is None for r in stored] == [True, False, False]
        assert [stored.conversation(i).get("image", 0) for i in range(3)] == [None, 0, 0]
        assert [r["conversations"] for r in stored] == [r["conversations"] for r in raw]
        assert stored.num_prompts().tolist() == raw.num_prompts().tolist() == [0, 1, 0]
        (stored.directory / "requests.npy").unlink()  # as before it was written
        assert Prepared(stored.directory).num_prompts().tolist() == [0, 1, 0]


def test_lines_say_which_images_they_show(folder):
    lines = chat_lines.find_lines(write(folder, FORMS[0], {"conversations": WORDS}).with_name("chat.jsonl"))
    assert (lines.image_hashes != 0).tolist() == [True, False] and lines.kinds.tolist() == [chat_lines.GOOD] * 2
