"""Answers that choose one of several options, "B. a dog", or say it in words."""

import re

_CHOICE = re.compile(r"^\s*\(?([A-Z])[.):]|^\s*([A-Z])\s*$|\b([B-E])\b|\b(A)(?=[.):,]|\s*$)")


def is_right(answer: str, label: str) -> bool:
    """Whether an answer names the option of the label, or, where that is no option ("A. …"), is the same name.

    An answer that names no option is wrong; the data set's own evaluation takes it as A.
    """
    wanted = _choice(label)
    if wanted:
        return _choice(answer) == wanted
    plain = lambda said: " ".join(re.sub(r"[^\w\s]", " ", said.lower()).split())
    return plain(answer) == plain(label)


def _choice(said: str) -> str:
    """The letter of the option that is named, "" if none is."""
    found = _CHOICE.search(said)
    return next(filter(None, found.groups()), "") if found else ""
