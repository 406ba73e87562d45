"""Conversations: messages as chat services take them → turns as the model was taught them."""

from collections.abc import Mapping, Sequence
from typing import Any

from alto_jax.mllm import literals
from alto_jax.mllm import text as words

SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
_FIELDS = ("role", "content", "image")


def read_messages(
    tokenizer: words.TextTokenizer, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, str]], Any]:
    """Checks messages.

    Args:
      tokenizer: of the text; decides what is more than text.
      messages: {"role": "system" | "user" | "assistant", "content": text, "image": of a user's message}, as
        `Segmenter.chat` takes them.

    Returns:
      (turns as `text.template_text` takes them, the image or None).

    Raises:
      ValueError: what is wrong, and in which message.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages: expected a list of {{role, content}}, got {messages!r:.80}")
    turns: list[dict[str, str]] = []
    picture, asked = None, 0
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{place}: expected {{role, content}}, got {message!r:.80}")
        if unknown := [name for name in message if name not in _FIELDS]:
            raise ValueError(f"{place}.{unknown[0]}: unknown field; known: {', '.join(_FIELDS)}")
        role, content, image = (message.get(name) for name in _FIELDS)
        if not isinstance(role, str) or role not in SPEAKERS:
            raise ValueError(f"{place}.role: expected one of {', '.join(SPEAKERS)}, got {role!r:.80}")
        expected = ("user", "assistant")[asked % 2]
        if role != expected and not (role == "system" and index == 0):
            raise ValueError(f"{place}.role: expected {expected!r} here, got {role!r}")
        asked += role != "system"
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{place}.content: expected text, got {content!r:.80}")
        try:
            literals.check_turn(tokenizer, SPEAKERS[role], content)
        except ValueError as error:
            raise ValueError(f"{place}.content: {error}") from error
        if words.IMAGE in content and (image is None or content.count(words.IMAGE) > 1):
            raise ValueError(
                f"{place}.content: expected {words.IMAGE} at most once, beside an image, got {content!r:.80}"
            )
        if image is not None:
            if role != "user":
                raise ValueError(f"{place}.image: expected it in a user's message, got it in one of the {role}")
            if picture is not None:
                raise ValueError(f"{place}.image: expected one image in a conversation, got a second one")
            picture = image
            content = content if words.IMAGE in content else f"{words.IMAGE}\n{content}"
        turns.append({"from": SPEAKERS[role], "value": content})
    if turns[-1]["from"] != "human":
        raise ValueError(f"messages[{len(turns) - 1}].role: expected the last message to be the user's")
    return turns, picture
