"""Requests for one mask each, taken from conversations that hold any number of masks: what stage 3 and evaluation ask.

In: a source of ChatRecords that knows how many such requests each record has. Out: random access to ChatRecords of one
human turn, one answer and one mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alto_jax.data import identity
from alto_jax.data.bad_data import RecordError
from alto_jax.data.source import Chats, HasImages, place, read
from alto_jax.mllm import text


class NoPrompts(ValueError):
    """A data set has no request for one mask."""


def requests(conversations: Sequence[Mapping[str, str]], num_masks: int | None, where: str) -> list[tuple[str, int]]:
    """The requests of a conversation that name what one mask shows, and the number of that mask.

    A turn that is answered with one mask is such a request if it has a reference (`<ref>` or `<box>`; of several, the
    first counts) and no mask itself. One that is answered with n masks and has n references is n requests, each in the
    built-in wording. Where no turn has a mask, the only mask of a record belongs to the first turn.

    Args:
      conversations: of a ChatRecord; num_masks: how many masks it has; None: as many as the turns.
      where: file and line, or key, for messages.

    Returns:
      [(human turn, number of the mask), …], in order; none if there is no such request.

    Raises:
      ValueError: the turns have another number of masks.
    """
    turns = list(conversations)
    counts = [t["value"].count(text.MASK_START) for t in turns]
    if sum(counts) == 0 and num_masks == 1:
        first = next((number for number, turn in enumerate(turns) if turn["from"] == "human"), None)
        counts = [int(number - 1 == first) for number in range(len(turns) + 1)] if first is not None else counts
        turns = turns + [{"from": "gpt", "value": ""}]
    elif num_masks is not None and sum(counts) != num_masks:
        message = f"{where}: {num_masks} masks, but {sum(counts)} mask placeholders in the text"
        raise RecordError(message, "conversation")
    found, mask = [], 0
    for number, count in enumerate(counts):
        asked = turns[number - 1]["value"] if number and turns[number - 1]["from"] == "human" else ""
        references = text.find_references(asked) if text.MASK_START not in asked else []
        if count == 1 and references:
            found.append((asked, mask))
        elif count > 1 and len(references) == count:
            kinds = turns[number]["value"].split(text.MASK_START)[1:]
            for i, (reference, kind) in enumerate(zip(references, kinds)):
                adaptive = kind.startswith(text.code_token(1))
                found.append((text.question(reference, adaptive=adaptive), mask + i))
        mask += count
    return found


def count_requests(conversations: Sequence[Mapping[str, str]], num_masks: int | None = None) -> int:
    """How many requests there are, for `Chats.num_prompts`."""
    try:
        return len(requests(conversations, num_masks, ""))
    except ValueError:
        return 1


class Prompts:
    """Random access to ChatRecords with one request and one mask, those of a source's records in order.

    Attributes:
      caches: as the source's.
    """

    def __init__(self, source: Chats, name: str):
        """`name` of the source is for messages. NoPrompts: it has no request for one mask."""
        counts = source.num_prompts()
        self._source, self._counts, self._ends = source, counts, np.cumsum(counts, dtype=np.int64)
        self.caches: dict[str, Any] = getattr(source, "caches", {})
        if len(self) == 0:
            raise NoPrompts(
                f"{name}: none of the {len(counts)} records asks for a mask (a turn with <ref> or <box>, answered with "
                "one mask): there is nothing to prompt with, in stage 3 and in evaluation (config.eval.num_samples)"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, index: int) -> tuple[int, int]:
        """The record and the number of the request in it of prompt `index`."""
        index = place(index, self)
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - int(self._ends[row] - self._counts[row])

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py."""
        return {name: {**known, "records": len(self)} if name == "" else known
                for name, known in identity.of(self._source).items()}  # fmt: skip

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at_epoch(index, 0)

    def at_epoch(self, index: int, epoch: int) -> dict[str, Any]:
        """Prompt `index` of the record as it is drawn in an epoch."""
        row, number = self._find(index)
        record = read(self._source, row, epoch)
        where = f"record {record['key']}"
        question, mask = requests(record["conversations"], len(record["masks"]), where)[number]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text.answer(adaptive=True)}]
        key = f"{record['key']}#{number}" if self._counts[row] > 1 else record["key"]
        found = {**record, "key": key, "conversations": turns}
        of_mask = [name for name in ("masks", "codes", "code_lengths") if name in record]
        return found | {name: record[name][mask : mask + 1] for name in of_mask}

    def image_hashes(self, index: int) -> tuple[int, ...]:
        """Hashes of the images of prompt `index`, see split.py; () where the source can't tell."""
        return self._source.image_hashes(self._find(index)[0]) if isinstance(self._source, HasImages) else ()
