"""The tokenizer files of a PyTorch checkpoint → one `tokenizer.json` that `tokenizers` loads alone.

InternLM2 directories hold a sentencepiece model, Qwen2 directories `vocab.json` and `merges.txt`; both name
their special tokens in `added_tokens_decoder` (tokenizer_config.json) or added_tokens.json. Every such
token must have its id in the result.
"""

import dataclasses
from pathlib import Path
import re
from typing import Any

from alto_jax.mllm.text import TextTokenizer

from .files import SourceError, check_content, read_json, short

# How Qwen2 splits a text before merging.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds tokenizer files."""
    names = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    return any(all((directory / name).is_file() for name in group) for group in names)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a checkpoint.

    directory: where its files lie. tokenizer: a `tokenizers.Tokenizer`. source_ids: ids of the source's own tokens,
    without mask tokens. size: rows that an embedding table needs, one more than the largest id.
    """

    directory: Path
    tokenizer: Any
    source_ids: frozenset[int]
    size: int

    def save(self, out: Path) -> None:
        """Writes `out/tokenizer.json`."""
        self.tokenizer.save(str(out / "tokenizer.json"), pretty=False)

    def check_rows(self, rows: int) -> None:
        """Raises SourceError if an embedding table of so many rows is too small."""
        if self.size > rows:
            raise SourceError(
                f"{self.directory}: the tokenizer has {self.size} tokens, the embedding table {rows} rows"
            )


def read(directory: Path, *, num_codes: int | None = None) -> Vocabulary:
    """Reads the tokenizer files of a directory.

    Args:
      directory: the source's tokenizer files.
      num_codes: vision and mask tokens that are missing are appended in the reference's order, with so many
        codes; None: they are left as they are (they need not be there).

    Raises:
      FileNotFoundError: no tokenizer files. SourceError: files that do not fit together, or of another content.
      ImportError: a sentencepiece model without the package `sentencepiece`.
    """
    added = added_tokens(directory)
    if (directory / "tokenizer.json").is_file():
        tokenizer = _load(directory / "tokenizer.json")
    elif (directory / "tokenizer.model").is_file():
        tokenizer = _from_sentencepiece(directory / "tokenizer.model", added)
    elif has_tokenizer(directory):
        tokenizer = _from_vocabulary(directory)
    else:
        raise FileNotFoundError(
            f"{directory}: no tokenizer files (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)"
        )
    _add(tokenizer, added)
    for index, token in added.items():
        if tokenizer.token_to_id(token["content"]) != index:
            raise SourceError(
                f"{directory}: special token {token['content']!r} should have id {index},"
                f" got {tokenizer.token_to_id(token['content'])}"
            )
    ids = set(tokenizer.get_vocab(with_added_tokens=True).values())
    if num_codes is not None:
        special = TextTokenizer.complete(tokenizer, num_codes, str(directory)).ids
        if special.num_codes != num_codes:
            raise SourceError(
                f"{directory}: the tokenizer has {special.num_codes} mask codes, the codebook {num_codes}"
            )
        ids -= {special.mask_start, special.mask_end, *range(special.code_0, special.code_0 + num_codes)}
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return Vocabulary(directory, tokenizer, frozenset(ids), size)


def convert(directory: Path, out: Path, *, num_codes: int | None = None, vocab_size: int | None = None) -> None:
    """`read`, then writes `out/tokenizer.json`; the tokenizer must not have more than `vocab_size` tokens."""
    vocabulary = read(directory, num_codes=num_codes)
    if vocab_size is not None:
        vocabulary.check_rows(vocab_size)
    vocabulary.save(out)


def added_tokens(directory: Path) -> dict[int, dict[str, Any]]:
    """Id → special token {"content", "lstrip", "rstrip", …} of a directory, by rising id."""
    file = directory / "tokenizer_config.json"
    decoder = read_json(file).get("added_tokens_decoder")
    if decoder is not None and not isinstance(decoder, dict):
        raise SourceError(f"{file}: added_tokens_decoder: expected ids and tokens, got {short(decoder)}")
    found: dict[int, dict[str, Any]] = {}
    for index, token in (decoder or {}).items():
        where = f"{file}: added_tokens_decoder.{index}"
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise SourceError(f"{where}: expected a token with its content, got {short(token)}")
        if not re.fullmatch("[0-9]{1,9}", index):
            raise SourceError(f"{where}: expected an id, got {short(index)}")
        found[int(index)] = dict(token)
    file = directory / "added_tokens.json"
    for content, index in read_json(file).items():
        if type(index) is not int or not 0 <= index < 10**9 or not content:
            raise SourceError(f"{file}: {content}: expected an id, got {short(index)}")
        found.setdefault(index, {"content": content, "special": True})
    return dict(sorted(found.items()))


def _load(file: Path) -> Any:
    from tokenizers import Tokenizer

    read_json(file)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # Note: the library raises plain `Exception`.
        raise SourceError(f"{file}: not a tokenizer.json ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _add(tokenizer: Any, added: dict[int, dict[str, Any]]) -> None:
    from tokenizers import AddedToken

    def make(token):
        options = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
        return AddedToken(token["content"], normalized=False, special=bool(token.get("special", True)), **options)

    known = {index for index, token in tokenizer.get_added_tokens_decoder().items()}
    for index, token in added.items():
        if index not in known:
            (tokenizer.add_special_tokens if token.get("special", True) else tokenizer.add_tokens)([make(token)])


def _from_sentencepiece(file: Path, added: dict[int, dict[str, Any]]) -> Any:
    """A sentencepiece BPE model with byte fallback, as InternLM2's own fast converter turns it over."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError(f"{file}: reading it needs sentencepiece: pip install 'alto_jax[convert]'") from error
    from tokenizers import Tokenizer, decoders, models, normalizers

    check_content(file)
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:
        raise SourceError(f"{file}: not a sentencepiece model ({_first_line(error)})") from error
    if not 0 <= model.trainer_spec.unk_id < len(model.pieces):
        raise SourceError(f"{file}: not a sentencepiece model (it has {len(model.pieces)} pieces)")
    if model.trainer_spec.model_type != 2 or model.normalizer_spec.name not in ("identity", ""):
        raise SourceError(f"{file}: expected a BPE model without normalisation, got {model.normalizer_spec.name!r}")
    pieces = [piece.piece for piece in model.pieces]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for piece in model.pieces:
        if piece.type != 1:  # a normal piece: every split into two pieces is a merge, best score first
            continue
        splits = [(piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece))]
        splits = [s for s in splits if s[0] in vocabulary and s[1] in vocabulary]
        merges += [(-piece.score, s) for s in sorted(splits, key=lambda s: (vocabulary[s[0]], vocabulary[s[1]]))]
    merges.sort(key=lambda merge: merge[0])
    for index, token in added.items():  # named tokens take the place of unused pieces
        if index < len(pieces) and pieces[index] != token["content"]:
            vocabulary.pop(pieces[index], None)
            vocabulary[token["content"]] = index
    merges = [pair for _, pair in merges if all(part in vocabulary for part in (*pair, "".join(pair)))]
    unknown = pieces[model.trainer_spec.unk_id]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.trainer_spec.byte_fallback)
    )
    prefix = [normalizers.Prepend("▁")] if model.normalizer_spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _from_vocabulary(directory: Path) -> Any:
    """Qwen2's byte-level BPE."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary, merges = _vocabulary(directory / "vocab.json"), _merges(directory / "merges.txt")
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # Note: the library raises plain `Exception`.
        raise SourceError(f"{directory / 'merges.txt'}: does not fit vocab.json: {_first_line(error)}") from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _vocabulary(file: Path) -> dict[str, int]:
    """Token → id of a vocab.json."""
    vocabulary = read_json(file)
    if not vocabulary:
        raise SourceError(f"{file}: holds no tokens")
    owners: dict[int, str] = {}
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < 10**9:
            raise SourceError(f"{file}: {short(token)}: expected an id, got {short(index)}")
        if owners.setdefault(index, token) != token:
            raise SourceError(f"{file}: {short(token)} and {short(owners[index])} have the same id {index}")
    return vocabulary


def _merges(file: Path) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, best first."""
    check_content(file)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{file}: not UTF-8 text: {error}") from error
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise SourceError(f"{file}: line {number}: expected two tokens with a space between, got {short(line)}")
        merges.append((pair[0], pair[1]))
    if not merges:
        raise SourceError(f"{file}: holds no merges")
    return merges
