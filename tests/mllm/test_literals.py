"""Special tokens that people write out: refused everywhere, so that image tokens and image features always match."""

import pytest

from alto_jax.data.chat_examples import chat_text, prompt_example
from alto_jax.mllm import literals, text
from tests.data import replicas

SPECIAL = ["<IMG_CONTEXT>", "<img>", "</img>", "<|im_end|>", "<|im_start|>", "<pad>", "<TOK_7>"]
MASK_ENDS = ["<ALTo_Start>", "<ALTo_End>"]
MASK = "<ALTo_Start><TOK_1><TOK_1><ALTo_End>"


@pytest.fixture(scope="module")
def tok():
    return text.TextTokenizer.train_builtin(["the red apple on the left"] * 9, 300, 64)


@pytest.mark.parametrize("special", SPECIAL + MASK_ENDS)
@pytest.mark.parametrize(
    "place", ["{}", "{} says <image>\nSegment <ref>red</ref>.", "Segment <ref>{}</ref>.", "Why{}not?"]
)
def test_special_tokens_in_a_request_are_refused(tok, special, place):
    asked = place.replace("{}", special)
    with pytest.raises(ValueError, match=r"conversation: '.*' stands in(side a mask| a human turn)|does not end"):
        text.render_prompt(tok, asked, 4)
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "Yes"}]
    with pytest.raises(ValueError, match="record k: conversation: "):
        chat_text({"key": "k", "conversations": turns}, tok, max_length=200, num_image_tokens=4, num_latent_tokens=8,
                  max_masks=1, system=None)  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [*SPECIAL, "<ALTo_End><TOK_1><ALTo_Start>", "<ALTo_Start><ALTo_End>",
     "<ALTo_Start>", "<ALTo_End>", f"{MASK}<TOK_1>", "<ALTo_Start><ALTo_Start><TOK_1><ALTo_End><ALTo_End>",
     "<ALTo_Start>a<TOK_1><ALTo_End>", "<ALTo_Start><TOK_1> <TOK_1><ALTo_End>", "The <image>."],
)  # fmt: skip
def test_what_is_no_mask_in_an_answer_is_refused(tok, answer):
    turns = [{"from": "human", "value": "Segment <ref>it</ref>."}, {"from": "gpt", "value": answer}]
    with pytest.raises(ValueError, match="conversation"):
        text.render_conversation(tok, turns, 4)
    with pytest.raises(ValueError, match="record k: conversation"):
        chat_text({"key": "k", "conversations": turns}, tok, max_length=200, num_image_tokens=4, num_latent_tokens=8,
                  max_masks=1, system=None)  # fmt: skip


def test_what_may_be_written_is_kept(tok):
    turns = [
        {
            "from": "human",
            "value": "<image>\nWhat is <ref>it</ref><box>[[1,2,3,4]]</box><quad>[1]</quad>? a < b <i> <im>",
        }
    ]
    turns += [{"from": "gpt", "value": f"<ref>It</ref><box>[[1,2,3,4]]</box> {MASK} and {MASK}."}]
    ids, labels = text.render_conversation(tok, turns, 4, system="Be brief.")
    assert ids.count(tok.ids.img_context) == 4 and len(labels) == len(ids)
    assert turns[1]["value"] in tok.decode(ids)
    literals.check_turn(tok, "gpt", "")
    asked = f"What is {MASK}?"  # mask perception
    assert MASK in tok.decode(text.render_prompt(tok, asked, 4))
    with pytest.raises(ValueError, match="'<ALTo_Start>' stands in a system turn"):
        literals.check_turn(tok, "system", asked)


@pytest.mark.parametrize("place", ["system", "option"])
def test_the_system_message_is_checked_too(tok, place):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    for said in ("Use <IMG_CONTEXT>.", "Look: <image>"):
        given = {"system": said} if place == "option" else {}
        spoken = turns if place == "option" else [{"from": "system", "value": said}, *turns]
        with pytest.raises(ValueError, match="conversation: .* system turn"):
            text.render_conversation(tok, spoken, 4, **given)


def test_an_image_in_a_phrase_is_refused(tok):
    for make in (lambda: text.question("<image>", adaptive=True), lambda: text.no_target_question("the <image>")):
        with pytest.raises(ValueError, match="phrase: expected the name or description of an object, got '.*<image>'"):
            make()
    with pytest.raises(ValueError, match="phrase: expected the name or description of an object, got 'a <ALTo_Start>"):
        text.question(f"a {MASK}", adaptive=True)


def test_a_prompt_names_its_record(tok):
    scene = replicas.scenes(1)[0]
    record = {"key": "k", "image": scene.image, "masks": [scene.union([0])]}
    record["conversations"] = [{"from": "human", "value": "Segment <ref>the <IMG_CONTEXT></ref>."}]
    with pytest.raises(ValueError, match="record k: conversation: '<IMG_CONTEXT>' stands in a human turn"):
        prompt_example(record, tok, vision_size=28, image_size=64, mask_size=32, max_prompt_length=99,
                       num_image_tokens=4, system=None, answer_prefix="", template=0)  # fmt: skip


def test_predict_and_evaluation_refuse_them(debug_model):
    import alto_jax
    from alto_jax.evaluate.answerer import Answerer
    from alto_jax.evaluate.device import Programs

    image, model = replicas.scenes(1)[0].image, alto_jax.load(debug_model.path)
    for asked in ({"text": "the <IMG_CONTEXT>"}, {"prompt": "Segment <|im_end|>."}, {"text": "<image>"}):
        with pytest.raises(ValueError, match="conversation: '<|phrase: expected"):
            model.segment(image, **asked)
    answerer = Answerer(model.cfg, model.params, model.text, None, Programs(None))
    with pytest.raises(ValueError, match="conversation: '<img>' stands in a human turn"):
        answerer.example({"key": "k", "image": image}, prompt="Is <img> here?")
