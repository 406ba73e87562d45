"""The tokenizer files of PyTorch checkpoints as one tokenizer.json."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from alto_jax.mllm.text import TextTokenizer
from tests.golden_models import golden_tokenizer_files
from tools.convert_torch_weights.sources import SourceError
from tools.convert_torch_weights.text import convert, has_tokenizer

TEXTS = ["Segment the red square.", "It's 12:30 —  two  spaces\n\nand lines ", "你好, naïve café 🙂", "a\tb  \r\n c"]


@pytest.fixture
def qwen2(tmp_path):
    """A small directory of Qwen2's layout: vocab.json, merges.txt, added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    folder = tmp_path / "qwen2"
    folder.mkdir()
    tokenizer.model.save(str(folder))
    size = tokenizer.get_vocab_size()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>",
             "<ref>", "</ref>", "<box>", "</box>"]  # fmt: skip
    added = {str(size + i): {"content": name, "special": True} for i, name in enumerate(names)}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added})
    )
    return folder


def test_internlm2_has_the_references_special_ids(tmp_path):
    source = golden_tokenizer_files(tmp_path / "torch")
    convert(source, tmp_path, num_codes=1024, vocab_size=1547)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    added = json.loads((source / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert len(added) > 1000
    for index, token in added.items():
        assert tokenizer.token_to_id(token["content"]) == int(index)
        assert tokenizer.encode(token["content"]).ids == [int(index)]
    text = TextTokenizer.load(tmp_path)
    assert text.decode(text.encode("Segment <ref>red square</ref>")).split() == [
        "Segment",
        "<ref>",
        "red",
        "square</ref>",
    ]


def test_qwen2_equals_transformers(qwen2, tmp_path):
    convert(qwen2, tmp_path, num_codes=4)
    ours = TextTokenizer.load(tmp_path)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(qwen2)
    for text in [*TEXTS, "<|im_start|>user\n<ref>it's</ref><|im_end|>\n"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text
    assert ours.ids.mask_start == ours.ids.box_end + 1 and ours.ids.num_codes == 4


def test_files_that_do_not_fit_are_named(qwen2, tmp_path):
    size = 300 + 12 + 2 + 4
    with pytest.raises(SourceError, match=rf"the tokenizer has {size} tokens, the embedding table {size - 1} rows"):
        convert(qwen2, tmp_path, num_codes=4, vocab_size=size - 1)
    config = json.loads((qwen2 / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["500"] = {"content": "<late>"}
    (qwen2 / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="special token '<late>' should have id 500, got 312"):
        convert(qwen2, tmp_path)
    (qwen2 / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="tokenizer.json: not a tokenizer.json"):
        convert(qwen2, tmp_path)
    assert has_tokenizer(qwen2) and not has_tokenizer(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        convert(tmp_path / "none", tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.model").write_bytes(b"\x00\x01 not a model")
    with pytest.raises(SourceError, match="tokenizer.model: "):
        convert(tmp_path / "bad", tmp_path)
