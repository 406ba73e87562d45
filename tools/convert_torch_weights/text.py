"""The tokenizer files of a PyTorch checkpoint → one `tokenizer.json` that `tokenizers` loads alone.

InternLM2 directories hold a sentencepiece model, Qwen2 directories `vocab.json` and `merges.txt`; both name
their special tokens in `added_tokens_decoder` (tokenizer_config.json) or added_tokens.json. Every such
token must have its id in the result.
"""

import json
from pathlib import Path
from typing import Any

from alto_jax.mllm.text import TextTokenizer
from tools.convert_torch_weights.sources import SourceError

# How Qwen2 splits a text before merging.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds tokenizer files."""
    names = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    return any(all((directory / name).is_file() for name in group) for group in names)


def convert(directory: Path, out: Path, *, num_codes: int | None = None, vocab_size: int | None = None) -> None:
    """Writes `out/tokenizer.json`.

    Args:
      directory: the source's tokenizer files.
      out: where to write.
      num_codes: vision and mask tokens that are missing are appended in the reference's order, with so many
        codes; None: they are left as they are (they need not be there).
      vocab_size: rows of the embedding table; the tokenizer must not have more tokens.

    Raises:
      FileNotFoundError: no tokenizer files. SourceError: files that do not fit together.
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
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    if num_codes is not None:
        text = TextTokenizer.load(out, num_codes=num_codes)
        text.save(out)
        size = text.vocab_size
        if text.ids.num_codes != num_codes:
            raise SourceError(
                f"{directory}: the tokenizer has {text.ids.num_codes} mask codes, the codebook {num_codes}"
            )
    if vocab_size is not None and size > vocab_size:
        raise SourceError(f"{directory}: the tokenizer has {size} tokens, the embedding table {vocab_size} rows")


def added_tokens(directory: Path) -> dict[int, dict[str, Any]]:
    """Id → special token {"content", "lstrip", "rstrip", …} of a directory, by rising id."""
    config = _json(directory / "tokenizer_config.json")
    found = {int(index): dict(token) for index, token in config.get("added_tokens_decoder", {}).items()}
    for content, index in _json(directory / "added_tokens.json").items():
        found.setdefault(int(index), {"content": content, "special": True})
    return dict(sorted(found.items()))


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{file}: not readable as JSON: {error}") from error


def _load(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # Note: the library raises plain `Exception`.
        raise SourceError(f"{file}: not a tokenizer.json ({error})") from error


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

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:
        raise SourceError(f"{file}: not a sentencepiece model ({error})") from error
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
            del vocabulary[pieces[index]]
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

    tokenizer = Tokenizer(models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
