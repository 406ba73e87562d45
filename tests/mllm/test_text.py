"""Special tokens, tokenizer, chat template, labels: against the reference's strings and ids."""

import json
from pathlib import Path
import pickle
import resource
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from alto_jax.mllm import text
from tests.golden_models import golden_tokenizer_files
from tools.convert_torch_weights.text import convert

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def fixture():
    return json.loads((GOLDEN / "altollm_text.json").read_text())


@pytest.fixture(scope="module")
def internlm2_file(tmp_path_factory):
    """The reference's small sentencepiece tokenizer as a tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    convert(golden_tokenizer_files(folder / "torch"), folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def internlm2(internlm2_file):
    return text.TextTokenizer.load(internlm2_file)


@pytest.fixture(scope="module")
def builtin():
    return text.TextTokenizer.train_builtin(["the red apple on the left", "all frogs"] * 20, 400, 64)


def unpadded(ids, pad, length):
    """The row without padding, which must be on one side only."""
    row = ids[:length] if ids[-1] == pad else ids[len(ids) - length :]
    assert set(ids) - set(row) <= {pad}
    return row


def test_special_ids_equal_the_reference(internlm2, fixture):
    expected, ids = fixture["special_ids"], internlm2.ids
    assert internlm2.vocab_size == fixture["len_tokenizer"]
    assert (ids.bos, ids.pad) == (expected["<s>"], expected["</s>"])
    assert (ids.im_start, ids.im_end) == (expected["<|im_start|>"], expected["<|im_end|>"])
    assert (ids.img, ids.img_end, ids.img_context) == tuple(expected[t] for t in ("<img>", "</img>", "<IMG_CONTEXT>"))
    assert (ids.ref, ids.ref_end, ids.box, ids.box_end) == tuple(
        expected[t] for t in ("<ref>", "</ref>", "<box>", "</box>")
    )
    assert (ids.mask_start, ids.mask_end) == (expected["<ALTo_Start>"], expected["<ALTo_End>"])
    assert (ids.code_0, ids.code_0 + ids.num_codes - 1) == (expected["<TOK_0>"], expected["<TOK_1023>"])
    for token, index in expected.items():
        assert internlm2.encode(token) == [index]
        assert internlm2.decode([index]) == token


def test_chat_template_equals_the_reference():
    fixture = json.loads((GOLDEN / "conversation_template.json").read_text())
    turns = lambda *values: [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]
    assert text.SYSTEM_MESSAGE == fixture["system_message"]
    assert "".join(text.template_text(turns("<image>\nHello"))) == fixture["single_turn"]
    assert "".join(text.template_text(turns("Q1", "A1", "Q2"))) == fixture["two_turns"]
    own = [{"from": "system", "value": "S"}, *turns("Q", "A")]
    start = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ"
    assert "".join(text.template_text(own)).startswith(start)
    assert "".join(text.template_text(own[1:], None)) == (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )


def test_prompt_ids_equal_the_reference(internlm2, fixture):
    for prompt, expected in zip(fixture["prompts"], fixture["gen_input_ids"]):
        ids = text.render_prompt(internlm2, prompt, fixture["num_image_token"])
        assert ids == unpadded(expected, internlm2.ids.pad, len(ids))
        explicit = text.render_prompt(internlm2, f"<image>\n{prompt}", fixture["num_image_token"])
        assert explicit == ids


def test_conversation_ids_and_labels_equal_the_reference(internlm2, fixture):
    targets = [("red square", True, 0), ("blue circle", False, 0), ("green shape", True, 1)]
    for (phrase, adaptive, template), ids, labels in zip(targets, fixture["sft_input_ids"], fixture["sft_labels"]):
        conversation = [
            {"from": "human", "value": text.question(phrase, adaptive=adaptive, template=template)},
            {"from": "gpt", "value": text.answer(adaptive=adaptive)},
        ]
        got_ids, got_labels = text.render_conversation(internlm2, conversation, fixture["num_image_token"])
        assert len(got_ids) == len(got_labels)
        assert got_ids == unpadded(ids, 0, len(got_ids))  # Note: the reference's collator pads with 0.
        assert got_labels == labels[: len(got_labels)]


def test_answers_equal_the_reference(internlm2, fixture):
    for ids, expected in zip(fixture["gen_sequences"], fixture["responses"]):
        # Note: the reference's slow tokenizer puts spaces around special tokens.
        assert text.answer_text(internlm2, ids).replace(" ", "") == expected.replace(" ", "")


def test_labels_cover_exactly_the_answers(builtin):
    conversation = [
        {"from": "human", "value": "Q1"},
        {"from": "gpt", "value": text.answer(4, adaptive=False)},
        {"from": "human", "value": "Q2"},
        {"from": "gpt", "value": "Yes"},
    ]
    ids, labels = text.render_conversation(builtin, conversation, 3)
    assert all(label in (text.IGNORE, i) for i, label in zip(ids, labels))
    supervised = builtin.decode([label for label in labels if label != text.IGNORE])
    assert supervised == f"{text.answer(4, adaptive=False)}<|im_end|>Yes<|im_end|>"
    assert ids.count(builtin.ids.img_context) == 3
    assert builtin.decode(ids).count("<img>") == 1


def test_forced_prefix_continues_the_training_text(internlm2, builtin):
    for tok in (internlm2, builtin):
        question = text.question("the apple", adaptive=True)
        prompt = text.render_prompt(tok, question, 2, answer_prefix=text.FORCED_ANSWER_PREFIX)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text.answer(5, adaptive=True)}]
        ids, _ = text.render_conversation(tok, turns, 2)
        assert ids[: len(prompt)] == prompt and prompt[-1] == tok.ids.mask_start
        assert ids[len(prompt)] == tok.ids.code_0 + 1


def test_builtin_tokenizer_round_trip(builtin, tmp_path):
    sample = f"Ünïcode 苹果 \n{text.answer(8, adaptive=True)}"
    assert builtin.decode(builtin.encode(sample)) == sample
    ids = builtin.ids
    assert ids.num_codes == 64 and builtin.vocab_size == ids.code_0 + 64
    order = [ids.pad, ids.im_start, ids.im_end, ids.img, ids.img_end, ids.img_context]
    assert order == list(range(ids.pad, ids.pad + 6))
    assert [ids.ref, ids.ref_end, ids.box, ids.box_end, ids.mask_start, ids.mask_end, ids.code_0] == list(
        range(ids.img_context + 3, ids.img_context + 10)
    )
    builtin.save(tmp_path / "tokenizer")
    for other in (text.TextTokenizer.load(tmp_path / "tokenizer"), pickle.loads(pickle.dumps(builtin))):
        assert other.ids == ids and other.encode(sample) == builtin.encode(sample)
    again = text.TextTokenizer.train_builtin(["the red apple on the left", "all frogs"] * 20, 400, 64)
    assert again.encode(sample) == builtin.encode(sample)


def test_a_full_disk_leaves_the_file_of_before(builtin, tmp_path):
    """A run writes it at every start; half a file would end all later ones."""
    before = builtin.save(tmp_path).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            builtin.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_missing_tokens_are_named_or_appended(internlm2, internlm2_file, tmp_path):
    vocabulary = json.loads(internlm2_file.read_text())
    keep = lambda token: not token["content"].startswith(("<ALTo", "<TOK"))
    vocabulary["added_tokens"] = [t for t in vocabulary["added_tokens"] if keep(t)]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match=r"tokenizer\.json: special token <ALTo_Start> is missing"):
        text.TextTokenizer.load(tmp_path)
    assert text.TextTokenizer.load(file, num_codes=1024).ids == internlm2.ids
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["<ALTo_Start>", "<ALTo_End>", "<TOK_0>", "<TOK_1>", "<TOK_3>"])
    with pytest.raises(ValueError, match="<TOK_2>"):
        text.TextTokenizer(tokenizer)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        text.TextTokenizer.load(tmp_path / "nowhere")
    file.write_text("no json")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        text.TextTokenizer.load(file)


def test_sentences():
    assert text.question("road", adaptive=False) == "Segment <ref>road</ref>."
    assert text.question("<box>1</box>", adaptive=True, template=12) == (
        "What is the mask for <box>1</box> by adaptive length?"
    )
    assert len({text.question("x", adaptive=True, template=i) for i in range(20)}) == 7
    assert text.no_target_question("a cat") == (
        'Does the image contain <ref>a cat</ref>?\nAnswer "yes" or "no" directly.'
    )
    assert text.answer(2, adaptive=True) == "The mask appears at <ALTo_Start><TOK_1><TOK_1><ALTo_End>."
    assert text.join_descriptions(["a", "b"]) == "Meet all the descriptions: 1. a. 2. b. "
    assert text.find_reference("<image>\nSegment <ref>a b</ref>.") == "<ref>a b</ref>"
    assert text.find_reference("Hello") is None
    with pytest.raises(ValueError, match="phrase"):
        text.question("  ", adaptive=True)


def test_placeholders_are_resized():
    two = f"{text.answer(adaptive=True)} {text.answer(adaptive=False)}"
    assert text.resize_placeholders(two, 3) == f"{text.answer(3, adaptive=True)} {text.answer(3, adaptive=False)}"
    for bad in ("<ALTo_Start><TOK_0>", "<ALTo_Start><TOK_0><TOK_1><ALTo_End>", "<ALTo_Start>x<ALTo_End>"):
        with pytest.raises(ValueError, match="conversation"):
            text.resize_placeholders(bad, 3)


@pytest.mark.parametrize(
    ("turns", "num_image_tokens", "message"),
    [
        ([], 1, "at least one turn"),
        ([{"from": "gpt", "value": "A"}], 1, r"conversations\[0\].from"),
        ([{"from": "human", "value": "<image><image>"}], 1, "at most one <image>"),
        ([{"from": "human", "value": "<image>"}], 0, "<image> stands in the text, but there is no image"),
    ],
)
def test_bad_conversations(builtin, turns, num_image_tokens, message):
    with pytest.raises(ValueError, match=message):
        text.render_conversation(builtin, turns, num_image_tokens)


def test_importing_text_is_light():
    code = "import sys, alto_jax.mllm.text; print({'jax', 'flax', 'transformers', 'tokenizers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
