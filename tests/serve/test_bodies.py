"""Bodies that are within the limit of bytes and made to take hours or gigabytes are refused at once."""

import asyncio
import time
import types

import pytest
from starlette.datastructures import Headers

from alto_jax.serve import app, schema
from alto_jax.serve.limits import Fault, Limits
from tests.serve.bad_requests import form

MANY = 60_000


def check(**values):
    return schema.check(schema.SegmentRequest, {"image": "x", "phrase": "a"} | values)


@pytest.fixture(autouse=True)
def soon():
    """What grows with the square of a body's length took minutes here."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 10


def test_a_field_that_is_there_twice_is_found_among_many():
    names = ",".join(f'"a{index}":1' for index in range(MANY))
    with pytest.raises(Fault, match=f"the field 'a{MANY - 1}' is there twice"):
        schema.read_json(f'{{{names},"a{MANY - 1}":1}}'.encode())


@pytest.mark.parametrize(
    "values, field",
    [({"phrases": [1] * MANY}, "phrases.0"), ({"boxes": [1] * MANY}, "boxes.0"), ({"returns": [1] * MANY}, "returns.0"),
     ({"boxes": [["1"] * MANY]}, "boxes.0"), ({"boxes": [["1", "2", "3", "4"]]}, "boxes.0.0"),
     ({f"a{index}": 1 for index in range(MANY)}, "a0")],
)  # fmt: skip
def test_of_many_faults_one_is_collected(values, field):
    with pytest.raises(Fault) as refused:
        check(**values)
    assert refused.value.field in (field, f"{field}.0")
    cause = refused.value.__cause__
    assert cause is None or cause.error_count() == 1


def test_a_form_that_is_asked_for_often_is_made_once():
    assert check(returns=["png", "rle"] * MANY).returns == ["png", "rle"]


def parse(body, kind):
    request = types.SimpleNamespace(headers=Headers({"content-type": f"multipart/form-data; {kind}"}))
    return asyncio.run(app._parse_form(request, body, Limits()))


def test_a_long_boundary():
    with pytest.raises(Fault, match="no multipart form"):
        parse(b"-" * (1 << 21), f"boundary=a{'-' * 60_000}")


def test_the_text_of_a_form_is_in_no_codec_that_a_client_names():
    body = form([("image", b"x"), ("phrase", "caf\u00e9 \\ud800")], "b")
    for kind in ("boundary=b", "boundary=b; charset=unicode_escape", "boundary=b; charset=punycode"):
        assert parse(body, kind)[1].phrase == "caf\u00e9 \\ud800"
    with pytest.raises(Fault, match="its end is missing"):
        parse(body[:-8], "boundary=b")
