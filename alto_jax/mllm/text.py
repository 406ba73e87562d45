"""Text of the language model: special tokens, the tokenizer, the chat template and the task's sentences.

Comes in: questions, phrases, conversations (host strings). Goes out: token ids (and labels) as Python
lists. This is the one place for every fixed string of the task: data readers, training, prediction and
evaluation take their questions and answers from here.

Source: InternVL 2.5's chat template with ALTo's tokens appended to the vocabulary. Imports neither jax
nor transformers; `tokenizers` is imported when a tokenizer is loaded or trained.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from pathlib import Path
import re
from typing import Any

from alto_jax.config import write_whole
from alto_jax.mllm import literals
from alto_jax.mllm.image_text import IMAGE as IMAGE
from alto_jax.mllm.image_text import IMG as IMG
from alto_jax.mllm.image_text import IMG_CONTEXT as IMG_CONTEXT
from alto_jax.mllm.image_text import IMG_END as IMG_END
from alto_jax.mllm.image_text import place_images

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
REF, REF_END = "<ref>", "</ref>"
BOX, BOX_END = "<box>", "</box>"
MASK_START, MASK_END = "<ALTo_Start>", "<ALTo_End>"
PAD = "<pad>"

# Note: the order in which the reference appends tokens to a vocabulary; converted weights depend on it.
VISION_TOKENS = (IMG, IMG_END, IMG_CONTEXT, "<quad>", "</quad>", REF, REF_END, BOX, BOX_END)
MARKUP = ("<quad>", "</quad>", REF, REF_END, BOX, BOX_END)  # Special tokens that people and model may write.
MASK_TOKENS = (MASK_START, MASK_END)
PAD_CANDIDATES = (PAD, "</s>", "<|endoftext|>")  # The first in the vocabulary (built-in, InternLM2, Qwen2).
BOS = "<s>"  # Put in front of a text once, where the vocabulary has it (InternLM2).

SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
TURN_END = IM_END + "\n"
HEADERS = {"system": IM_START + "system\n", "human": IM_START + "user\n", "gpt": IM_START + "assistant\n"}

IGNORE = -100  # Label of a position that is not supervised.
NUM_FILE_PLACEHOLDERS = 32  # Per mask in conversation files, whatever number of latents the model has.

FIXED_TEMPLATE = "Segment {}."
ADAPTIVE_TEMPLATES = (
    "Segment {} by adaptive length.",
    "Create a mask for {} by adaptive length.",
    "Generate a mask for {} by adaptive length.",
    "Do segmentation for {} by adaptive length.",
    "Please give the mask for {} by adaptive length.",
    "What is the mask for {} by adaptive length?",
    "Can you segment {} by adaptive length?",
)
NO_TARGET_TEMPLATE = 'Does the image contain {}?\nAnswer "yes" or "no" directly.'
YES, NO = "Yes", "No"
ANSWER_PREFIX = "The mask appears at "
FORCED_ANSWER_PREFIX = ANSWER_PREFIX + MASK_START


def code_token(index: int) -> str:
    """Returns the token of mask code `index`, e.g. "<TOK_7>"."""
    return f"<TOK_{index}>"


def reference(phrase: str) -> str:
    """Returns `<ref>phrase</ref>`; a phrase that already carries `<ref>` or `<box>` is kept as it is.

    Raises:
      ValueError: the phrase has no text, or holds `<image>`, which would place the image there, or a mask.
    """
    if not phrase.strip() or IMAGE in phrase or MASK_START in phrase:
        raise ValueError(f"phrase: expected the name or description of an object, got {phrase!r:.80}")
    return phrase if REF in phrase or BOX in phrase else f"{REF}{phrase}{REF_END}"


def question(phrase: str, *, adaptive: bool, template: int = 0) -> str:
    """Returns the request for the mask of `phrase`.

    Args:
      phrase: what to segment ("the red apple").
      adaptive: True asks for as many mask tokens as needed, False for all of them.
      template: which of the seven adaptive wordings (taken modulo 7); the fixed one has one wording.
    """
    wording = ADAPTIVE_TEMPLATES[template % len(ADAPTIVE_TEMPLATES)] if adaptive else FIXED_TEMPLATE
    return wording.replace("{}", reference(phrase))


def no_target_question(phrase: str) -> str:
    """Returns the yes/no question whether the image contains `phrase` (asked before a mask that may not exist)."""
    return NO_TARGET_TEMPLATE.replace("{}", reference(phrase))


def answer(num_placeholders: int = NUM_FILE_PLACEHOLDERS, *, adaptive: bool) -> str:
    """Returns the answer with one mask: `num_placeholders` x `<TOK_1>` (adaptive) or `<TOK_0>` (fixed)."""
    return f"{FORCED_ANSWER_PREFIX}{code_token(int(adaptive)) * num_placeholders}{MASK_END}."


def join_descriptions(sentences: Sequence[str]) -> str:
    """Returns several sentences about one object as one phrase.

    Compat: the trailing space is the reference's.
    """
    return "Meet all the descriptions: " + "".join(f"{i}. {s}. " for i, s in enumerate(sentences, 1))


def join_classes(names: Sequence[str]) -> str:
    """Returns several class names as one phrase (open vocabulary, several classes)."""
    return ", ".join(names)


def split_classes(phrase: str) -> list[str]:
    """Returns the class names of a phrase that `join_classes` made of names without commas."""
    return phrase.split(", ")


def find_reference(text: str) -> str | None:
    """Returns the first `<ref>…</ref>` or `<box>…</box>` of a human turn with its tags, None without one."""
    return next(iter(find_references(text)), None)


def find_references(text: str) -> list[str]:
    """Returns all `<ref>…</ref>` and `<box>…</box>` of a human turn with their tags, in order.

    A `<box>` right after a `<ref>` tells where that is; it belongs to the same object and is left out.
    """
    found = re.findall(rf"({REF}.*?{REF_END})(?:\s*{BOX}.*?{BOX_END})?|({BOX}.*?{BOX_END})", text, flags=re.DOTALL)
    return [ref or box for ref, box in found]


def resize_placeholders(text: str, num_placeholders: int) -> str:
    """Rewrites every mask of a conversation turn to `num_placeholders` placeholders of the same kind.

    Raises:
      ValueError: a mask whose placeholders are not all `<TOK_0>` or all `<TOK_1>`, or that does not end.
    """

    def replace(found: re.Match) -> str:
        kinds = set(re.findall(r"<TOK_\d+>", found.group(1)))
        if kinds not in ({code_token(0)}, {code_token(1)}) or re.sub(r"<TOK_\d+>", "", found.group(1)):
            raise ValueError(
                f"conversation: expected {MASK_START}, {code_token(0)} or {code_token(1)} repeated, {MASK_END}, "
                f"got {found.group(0)[:80]!r}"
            )
        return f"{MASK_START}{kinds.pop() * num_placeholders}{MASK_END}"

    if text.count(MASK_START) != text.count(MASK_END):
        raise ValueError(f"conversation: {MASK_START} and {MASK_END} do not match in {text[:80]!r}")
    return re.sub(rf"{MASK_START}(.*?){MASK_END}", replace, text, flags=re.DOTALL)


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens; mask code c has id `code_0 + c`, c in 0..num_codes-1. `bos` may be None."""

    pad: int
    bos: int | None
    im_start: int
    im_end: int
    img: int
    img_end: int
    img_context: int
    ref: int
    ref_end: int
    box: int
    box_end: int
    mask_start: int
    mask_end: int
    code_0: int
    num_codes: int


class TextTokenizer:
    """A `tokenizers.Tokenizer` whose vocabulary has the special tokens of the task.

    Attributes:
      ids: SpecialIds of this vocabulary.
      vocab_size: number of tokens, special ones included.
      reserved_ids: the special tokens but MARKUP: those that the template and the masks are made of.
    """

    def __init__(self, tokenizer: Any, source: str = "tokenizer"):
        """Wraps `tokenizer`, which comes from `source`; ValueError names a special token that is missing."""
        self._tokenizer = tokenizer
        self._fixed: dict[str, tuple[int, ...]] = {}
        self.ids = _special_ids(tokenizer, source)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        special |= {i for i in dataclasses.astuple(self.ids)[:-1] if i is not None}
        special |= set(range(self.ids.code_0, self.ids.code_0 + self.ids.num_codes))
        self.reserved_ids = frozenset(special - {tokenizer.token_to_id(token) for token in MARKUP})

    @classmethod
    def load(cls, path: str | Path, *, num_codes: int | None = None) -> "TextTokenizer":
        """Reads `tokenizer.json`.

        Args:
          path: the file or its folder.
          num_codes: if given, vision and mask tokens that are missing are appended in the reference's
            order, with this many codes (an InternVL vocabulary before stage 2).

        Raises:
          FileNotFoundError: no such file.
          ValueError: not a tokenizer file, or a special token is missing.
        """
        from tokenizers import Tokenizer  # late: keeps the start fast

        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such tokenizer file")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # Note: the library raises plain `Exception`.
            raise ValueError(f"{file}: not a tokenizer.json ({error})") from error
        return cls(tokenizer, str(file)) if num_codes is None else cls.complete(tokenizer, num_codes, str(file))

    @classmethod
    def complete(cls, tokenizer: Any, num_codes: int, source: str = "tokenizer") -> "TextTokenizer":
        """Wraps a `tokenizers.Tokenizer` after appending the vision and mask tokens that it lacks, as `load` does."""
        _append(tokenizer, (*VISION_TOKENS, *MASK_TOKENS, *map(code_token, range(num_codes))))
        return cls(tokenizer, source)

    @classmethod
    def train_builtin(cls, texts: Iterable[str], vocab_size: int, num_codes: int) -> "TextTokenizer":
        """Trains a byte-level BPE and appends the special tokens.

        Args:
          texts: training text; the fixed strings of this module are added to it.
          vocab_size: upper limit of the text vocabulary (bytes and merges, without special tokens), >= 256.
          num_codes: number of mask codes.

        Returns:
          A tokenizer whose ids are: text vocabulary, `<pad> <|im_start|> <|im_end|>`, then the
          reference's tokens in its order.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # late: keeps the start fast

        if vocab_size < 256:
            raise ValueError(f"vocab_size: expected at least 256 (the bytes), got {vocab_size}")
        if num_codes < 1:
            raise ValueError(f"num_codes: expected at least 1, got {num_codes}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        sentences = (FIXED_TEMPLATE, *ADAPTIVE_TEMPLATES, NO_TARGET_TEMPLATE, YES, NO, ANSWER_PREFIX)
        headers = (header.removeprefix(IM_START) for header in HEADERS.values())
        tokenizer.train_from_iterator([*texts, *(s.replace("{}", " ") for s in sentences), *headers], trainer)
        _append(tokenizer, (PAD, IM_START, IM_END, *VISION_TOKENS, *MASK_TOKENS, *map(code_token, range(num_codes))))
        return cls(tokenizer, "built-in tokenizer")

    def save(self, directory: str | Path) -> Path:
        """Writes `directory/tokenizer.json`, whole or not at all (OSError), and returns its path."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "tokenizer.json"
        write_whole(file, self._tokenizer.to_str(pretty=False))
        return file

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; special tokens in it become their ids, nothing is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_fixed(self, text: str) -> list[int]:
        """`encode` for text that comes again and again: kept after the first time."""
        ids = self._fixed.get(text)  # Note: other threads may clear the table meanwhile.
        if ids is None:
            if len(self._fixed) >= 64:
                self._fixed.clear()
            ids = self._fixed[text] = tuple(self.encode(text))
        return list(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, special tokens written out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def _append(tokenizer: Any, tokens: Iterable[str]) -> None:
    """Appends the tokens that the vocabulary lacks, in order, as special tokens."""
    from tokenizers import AddedToken  # late: keeps the start fast

    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens])


def _special_ids(tokenizer: Any, source: str) -> SpecialIds:
    def find(*candidates: str) -> int:
        for token in candidates:
            index = tokenizer.token_to_id(token)
            if index is not None:
                return index
        raise ValueError(f"{source}: special token {' or '.join(candidates)} is missing from the vocabulary")

    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ids = dict(im_start=find(IM_START), im_end=find(IM_END), img=find(IMG), img_end=find(IMG_END))
    ids |= dict(img_context=find(IMG_CONTEXT), ref=find(REF), ref_end=find(REF_END), box=find(BOX))
    ids |= dict(box_end=find(BOX_END), mask_start=find(MASK_START), mask_end=find(MASK_END), code_0=find(code_token(0)))
    num_codes = 1
    while vocabulary.get(code_token(num_codes)) == ids["code_0"] + num_codes:
        num_codes += 1
    total = sum(re.fullmatch(r"<TOK_\d+>", token) is not None for token in vocabulary)
    if total != num_codes:
        raise ValueError(
            f"{source}: special token {code_token(num_codes)} should have id {ids['code_0'] + num_codes}, "
            f"got {vocabulary.get(code_token(num_codes))}: the {total} mask codes must have consecutive ids"
        )
    return SpecialIds(pad=find(*PAD_CANDIDATES), bos=vocabulary.get(BOS), num_codes=num_codes, **ids)


def template_text(conversations: Sequence[Mapping[str, str]], system: str | None = SYSTEM_MESSAGE) -> list[str]:
    """Returns the turn strings of a conversation; a last human turn is followed by an open assistant header.

    Args:
      conversations: `{"from": "system" | "human" | "gpt", "value": text}`; a leading system turn
        replaces `system`.
      system: the system message, None leaves the system segment out.

    Raises:
      ValueError: no turn, or a speaker that is not known or not in turn.
    """
    turns = list(conversations)
    if turns and turns[0]["from"] == "system":
        system = turns.pop(0)["value"]
    if not turns:
        raise ValueError("conversations: expected at least one turn, got none")
    texts = [] if system is None else [HEADERS["system"] + system + TURN_END]
    for index, turn in enumerate(turns):
        speaker = ("human", "gpt")[index % 2]
        if turn["from"] != speaker:
            raise ValueError(f"conversations[{index}].from: expected {speaker!r}, got {turn['from']!r}")
        texts.append(HEADERS[speaker] + turn["value"] + TURN_END)
    if len(turns) % 2:
        texts.append(HEADERS["gpt"])
    return texts


def render_prompt(
    tok: TextTokenizer,
    question: str | Sequence[Mapping[str, str]],
    num_image_tokens: int | Sequence[int],
    system: str | None = SYSTEM_MESSAGE,
    answer_prefix: str = "",
) -> list[int]:
    """Returns the ids of a prompt that ends where the assistant's answer begins.

    It has exactly `num_image_tokens` image tokens, whatever the question says.

    Args:
      tok: tokenizer.
      question: the human turn, or turns as for `template_text`, of which the last is a human one.
      num_image_tokens: `<IMG_CONTEXT>` tokens of the image, or of each of several; 0 for a prompt without an image.
        Where no turn says `<image>`, they are put in front, see `image_text.place_images`.
      system: the system message, None leaves the system segment out.
      answer_prefix: start of the answer, e.g. FORCED_ANSWER_PREFIX, so that generation goes on inside a mask.

    Raises:
      ValueError: a special token written out in a turn, see `literals.check_turn`, another number of `<image>` than of
        images, or turns that do not end with a question.
    """
    asked = [{"from": "human", "value": question}] if isinstance(question, str) else question
    if not asked or asked[-1]["from"] != "human":
        raise ValueError(f"conversations: expected a question as the last turn, got {list(asked)[-1:]!r:.80}")
    turns = _with_image(tok, asked, num_image_tokens, system)
    texts = template_text(turns, system)
    texts[-1] += answer_prefix
    return _bos(tok) + [i for text in texts for i in tok.encode(text)]


def render_conversation(
    tok: TextTokenizer,
    conversations: Sequence[Mapping[str, str]],
    num_image_tokens: int | Sequence[int],
    system: str | None = SYSTEM_MESSAGE,
) -> tuple[list[int], list[int]]:
    """Returns the ids and labels of a conversation.

    Every turn is tokenised on its own. Supervised are the answers, mask tokens included, with their
    `<|im_end|>`; not supervised (IGNORE) are system and human turns, the assistant's header and the last
    token of its turn (the line break).

    Args:
      tok: tokenizer.
      conversations: turns as for `template_text`; the images are put in front of the first human turn if no turn
        says `<image>`.
      num_image_tokens: `<IMG_CONTEXT>` tokens of the image, or of each of several; 0 for text only.
      system: the system message, None leaves the system segment out.

    Returns:
      (ids, labels), of equal length, unpadded.

    Raises:
      ValueError: turns out of order, another number of `<image>` than of images, one in an answer, or a special token
        written out, see `literals.check_turn`.
    """
    ids = _bos(tok)
    labels = [IGNORE] * len(ids)
    header_length = len(tok.encode_fixed(HEADERS["gpt"]))
    for text in template_text(_with_image(tok, conversations, num_image_tokens, system), system):
        turn = tok.encode_fixed(text) if text.startswith(HEADERS["system"]) else tok.encode(text)
        ids += turn
        if text.startswith(HEADERS["gpt"]):
            labels += [IGNORE] * header_length + turn[header_length:-1] + [IGNORE] * (len(turn) > header_length)
        else:
            labels += [IGNORE] * len(turn)
    return ids, labels


def answer_text(tok: TextTokenizer, ids: Iterable[int]) -> str:
    """Returns generated ids as text, special tokens written out, cut before `<|im_end|>` and stripped."""
    return tok.decode(ids).split(IM_END)[0].strip()


def _bos(tok: TextTokenizer) -> list[int]:
    return [] if tok.ids.bos is None else [tok.ids.bos]


def _with_image(
    tok: TextTokenizer,
    conversations: Sequence[Mapping[str, str]],
    num_image_tokens: int | Sequence[int],
    system: str | None,
) -> list[dict[str, str]]:
    """The turns with their image tokens; all that is said, the system message included, is checked before.

    So no other image token comes in.
    """
    for turn in [{"from": "system", "value": system or ""}, *conversations]:
        literals.check_turn(tok, turn["from"], turn["value"])
        if IMAGE in turn["value"] and turn["from"] != "human":
            raise ValueError(f"conversation: {IMAGE} stands in the {turn['from']} turn {turn['value'][:60]!r}")
    return place_images(conversations, num_image_tokens)
