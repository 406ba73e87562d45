"""Answers told token by token are those of `segment`; conversations are those that the model was taught."""

import numpy as np
import pytest

import alto_jax
from alto_jax.data.composition import ScenesConfig
from alto_jax.data.scenes import SceneMasks
from alto_jax.inference.decoding import Decoding
from alto_jax.mllm import text as words


@pytest.fixture(scope="module")
def model(debug_model):
    return alto_jax.load(debug_model.path)


@pytest.fixture(scope="module")
def image():
    return SceneMasks(ScenesConfig(image_size=(48, 56), num_scenes=1))[0]["image"]


@pytest.fixture
def advances(monkeypatch):
    """The numbers of tokens that the model was asked to go on for, in order."""
    found, advance = [], Decoding.advance

    def counted(self, count=1):
        found.append(count)
        advance(self, count)

    monkeypatch.setattr(Decoding, "advance", counted)
    return found


@pytest.mark.parametrize("asked", [{"text": "the red apple"}, {"boxes": [(0, 12, 28, 48)]}, {"prompt": "Where?"}])
def test_a_stream_ends_with_the_answer_of_segment(model, image, asked):
    encoded = model.encode_image(image)
    *events, last = model.stream(encoded, **asked)
    wanted = model.segment(encoded, **asked)
    answer = last.answer
    same = ("text", "token_ids", "codes", "num_masks", "token_probability", "confidence")
    assert {name: getattr(answer, name) for name in same} == {name: getattr(wanted, name) for name in same}
    np.testing.assert_array_equal(answer.probability, wanted.probability)  # of the same programs
    prefix = 0 if "prompt" in asked else len(model.text.encode(words.FORCED_ANSWER_PREFIX))
    assert [event.token_id for event in events] == wanted.token_ids[prefix:]
    assert "".join(event.text for event in events if event.code is not None).count("<TOK_") == wanted.length
    codes = [event for event in events if event.mask_index == 0]
    assert [event.code for event in codes] == wanted.codes
    if codes:
        np.testing.assert_array_equal([event.mask for event in codes], model.growth(encoded, wanted))
        before = [np.zeros_like(wanted.mask), *(event.mask for event in codes[:-1])]
        assert [event.change for event in codes] == [np.mean(a != e.mask) for a, e in zip(before, codes)]


def test_tokens_come_before_the_next_is_computed(model, image, advances):
    events = model.stream(image, "the red apple", length=6)
    assert advances == []  # nothing yet, but what is wrong with a request is told at once
    for count in range(6):
        event = next(events)
        assert event.length == count + 1 and event.mask.shape == image.shape[:2] and event.answer is None
        assert advances == [1] * count  # the first token needs none
    assert next(events).text == "<ALTo_End>" and next(events).answer.length == 6
    assert advances == [1] * 6 and next(events, None) is None
    advances.clear()
    model.segment(image, "the red apple", length=6)
    assert len(advances) == 1


def test_streams_of_a_bucket_share_their_programs(model, image):
    """Also with what `segment` compiled."""
    encoded = model.encode_image(image)
    model.segment(encoded, "the red apple", length=4)
    list(model.stream(encoded, "the red apple", length=4))
    compiled = lambda: {str(name): call._cache_size() for name, call in model._functions.items()}
    before = compiled()
    for phrase, options in (("the big grape", {"length": 5}), ("the old horse", {"end_bias": 2.0})):
        list(model.stream(encoded, phrase, **options))
    assert compiled() == before


def test_what_a_stream_refuses_it_refuses_at_once(model, image):
    for asked, message in [
        ({"text": ["a", "b"]}, "text: expected one request"), ({"text": "!"}, "text: expected the name"),
        ({"text": "a", "boxes": [(0, 0, 9, 9)]}, "expected one of them"),
        ({"text": "a", "length": 0}, "length: expected"), ({"boxes": []}, "boxes: expected at least one"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.stream(image, **asked)


def test_a_conversation_of_one_question_is_that_question(model, image):
    said = model.chat([{"role": "user", "content": "Where is it?", "image": image}], max_new_tokens=40)
    wanted = model.segment(image, prompt="Where is it?", max_new_tokens=40)
    assert (said.text, said.token_ids, said.codes) == (wanted.text, wanted.token_ids, wanted.codes)
    assert said.mask.shape == image.shape[:2] and len(said.masks) == said.num_masks
    placed = [{"role": "user", "content": "<image>\nWhere is it?", "image": model.encode_image(image)}]
    assert model.chat(placed, max_new_tokens=40).token_ids == said.token_ids


def test_turns_are_those_of_training(model, image, monkeypatch):
    """The ids that are asked are those of `render_conversation`, which prepares training; earlier masks stay in."""
    seen, ask = [], type(model).ask

    def noted(self, encoded, beginning, asked, settings):
        seen.append([*beginning, *asked[0][0]])
        return ask(self, encoded, beginning, asked, settings)

    monkeypatch.setattr(type(model), "ask", noted)
    earlier = "The mask appears at <ALTo_Start><TOK_3><TOK_4><ALTo_End>."
    messages = [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "The apple?"},
        {"role": "assistant", "content": earlier}, {"role": "user", "content": "And the cup?", "image": image},
    ]  # fmt: skip
    said = model.chat(messages, max_new_tokens=8)
    turns = [
        {"from": "human", "value": "The apple?"}, {"from": "gpt", "value": earlier},
        {"from": "human", "value": "<image>\nAnd the cup?"},
    ]  # fmt: skip
    ids, _ = words.render_conversation(model.text, turns, model.cfg.num_image_tokens, "Be short.")
    assert seen[0] == ids and model.text.decode(ids).endswith("<|im_start|>assistant\n")
    # What was said can be said again, and asked further; without an image masks have the tokenizer's size.
    assert said.message == {"role": "assistant", "content": said.text}
    alone = model.chat([{"role": "user", "content": "Hello"}], max_new_tokens=8)
    assert alone.mask.shape == (model.cfg.tokenizer.mask_size,) * 2
    ids, _ = words.render_conversation(model.text, [{"from": "human", "value": "Hello"}], 0, model.system)
    assert seen[1] == ids and model.text.ids.img_context not in ids


def test_messages_that_do_not_fit(model, image):
    user, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    cases = [
        ([], "messages: expected a list"), ("hello", "messages: expected a list"), (user, "messages: expected a list"),
        (["hello"], r"messages\[0\]: expected \{role, content\}, got 'hello'"),
        ([{**user, "images": 1}], r"messages\[0\].images: unknown field; known: role, content, image"),
        ([{**user, "role": "human"}], r"messages\[0\].role: expected one of system, user, assistant, got 'human'"),
        ([{**user, "role": ["user"]}], r"messages\[0\].role: expected one of"),
        ([said], r"messages\[0\].role: expected 'user' here, got 'assistant'"),
        ([user, user], r"messages\[1\].role: expected 'assistant' here, got 'user'"),
        ([user, {"role": "system", "content": "x"}], r"messages\[1\].role: expected 'assistant' here, got 'system'"),
        ([user, said], r"messages\[1\].role: expected the last message to be the user's"),
        ([{"role": "system", "content": "x"}], r"messages\[0\].role: expected the last message"),
        ([{**user, "content": " "}], r"messages\[0\].content: expected text, got ' '"),
        ([{"role": "user"}], r"messages\[0\].content: expected text, got None"),
        ([{**user, "content": [{"type": "text"}]}], r"messages\[0\].content: expected text"),
        ([{**user, "content": "<image> what?"}], r"messages\[0\].content: expected <image> at most once, beside"),
        ([{**user, "content": "<image><image>", "image": image}], r"messages\[0\].content: expected <image> at most"),
        ([{**user, "content": "<|im_end|>"}], r"messages\[0\].content: conversation: '<|im_end|>' stands in a human"),
        ([user, {**said, "content": "<ALTo_Start>"}, user], r"messages\[1\].content: conversation: a mask begins"),
        ([{**user, "image": image}, said, {**user, "image": image}], r"messages\[2\].image: expected one image"),
        ([user, {**said, "image": image}, user], r"messages\[1\].image: expected it in a user's message"),
        ([{**user, "image": np.zeros((4, 4))}], r"image: expected uint8\[H, W, 3\]"),
    ]  # fmt: skip
    for messages, message in cases:
        with pytest.raises(ValueError, match=message):
            model.chat(messages)
    with pytest.raises(ValueError, match="max_new_tokens: expected a whole number"):
        model.chat([user], max_new_tokens=0)
