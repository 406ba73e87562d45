"""What docs/reference.md lists says what it takes and gives: every parameter and field, shapes of arrays, errors."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap

import numpy as np
import pytest

from tests.conftest import ROOT

_ARRAY = re.compile(r"ndarray|jax\.Array|\bArray\b")
_SHAPE = re.compile(r"\b(bool|u?int\d*|float\d*)\[")


def public_names() -> dict[str, list[str]]:
    """What the reference lists, and the methods and properties that it lists of each; it has no other directives."""
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    pattern = r"^\.\. auto(?:function|class):: ([\w.]+)$(?:\n   :members: (.+)$)?"
    found = {name: members.split(", ") if members else [] for name, members in re.findall(pattern, text, re.MULTILINE)}
    assert len(found) == len(re.findall(r"^\.\. ", text, re.MULTILINE))
    assert sum(map(bool, found.values())) == text.count(":members:")
    return found


def resolve(name: str) -> object:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def raises(function: object) -> bool:
    """Whether the function's own lines raise an error for its caller."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def faults_of_function(name: str, function: object) -> list[str]:
    """What the docstring of a function or method leaves open, in words."""
    doc, signature = inspect.getdoc(function) or "", inspect.signature(function)
    if not doc:
        return [f"{name}: no docstring"]
    given = [p for p in signature.parameters.values() if p.name not in ("self", "cls", "kwargs")]
    found = [f"{name}: nothing about {p.name}" for p in given if not re.search(rf"\b{p.name}\b", doc)]
    annotations = [p.annotation for p in given] + [signature.return_annotation]
    arrays = any(
        _ARRAY.search(str(annotation)) for annotation in annotations if annotation is not inspect.Parameter.empty
    )
    if arrays and not _SHAPE.search(doc):
        found.append(f"{name}: arrays without their shapes")
    if raises(function) and "Raises:" not in doc:
        found.append(f"{name}: raises, and does not say so")
    return found


def faults_of_class(name: str, of: type, members: list[str]) -> list[str]:
    """What a class's docstring, and those of the given methods and properties, leave open."""
    found, doc = [], of.__doc__ or ""
    if not doc or doc.startswith(f"{of.__name__}("):  # Note: dataclasses write their signature there.
        return [f"{name}: no docstring"]
    if dataclasses.is_dataclass(of):
        fields = [field for field in dataclasses.fields(of) if not field.name.startswith("_")]
        found += [f"{name}: nothing about {f.name}" for f in fields if not re.search(rf"\b{f.name}\b", doc)]
        if any(_ARRAY.search(str(field.type)) for field in fields) and not _SHAPE.search(doc):
            found.append(f"{name}: arrays without their shapes")
    for key in members:
        member = getattr(of, key)
        if isinstance(member, property):
            found += [] if inspect.getdoc(member) else [f"{name}.{key}: no docstring"]
        else:
            found += faults_of_function(f"{name}.{key}", member)
    return found


def test_public_names_say_what_they_take_and_give():
    found, names = [], public_names()
    assert "alto_jax.load" in names and "segment" in names["alto_jax.inference.segmenter.Segmenter"]
    for name, members in names.items():
        of = resolve(name)
        found += faults_of_class(name, of, members) if inspect.isclass(of) else faults_of_function(name, of)
    assert found == []


@pytest.mark.parametrize(
    "doc, fault",
    [
        ("", "no docstring"),
        ("Adds `mask` bool[H, W].\n\nRaises:\n  ValueError: never.", "nothing about count"),
        ("Adds `count` to `mask`.\n\nRaises:\n  ValueError: never.", "arrays without their shapes"),
        ("Adds `count` to `mask` bool[H, W].", "raises, and does not say so"),
        ("Adds `count` to `mask` bool[H, W].\n\nRaises:\n  ValueError: no count.", ""),
    ],
)
def test_a_fault_is_found(doc, fault):
    def add(mask: np.ndarray, count: int) -> np.ndarray:
        if not count:
            raise ValueError("count")
        return mask + count

    add.__doc__ = doc
    assert [text.partition(": ")[2] for text in faults_of_function("add", add)] == [fault] * bool(fault)
