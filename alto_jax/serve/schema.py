"""What a request and an answer look like: pydantic models, and the reading of JSON and forms into them.

Every fault of a body is one `Fault` that names the field and the value.
"""

import json
import math
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alto_jax.serve.limits import Fault

Form = Literal["rle", "png", "overlay", "codes", "score"]
DEFAULT_FORMS: tuple[Form, ...] = ("rle", "codes", "score")
_BIAS = 100.0
# Note: `fail_fast`, since pydantic would collect every wrong value of a list: gigabytes for a body of millions.
_Box = Annotated[list[float], Field(min_length=4, max_length=4, fail_fast=True)]

_EXAMPLE_ANSWER: dict[str, Any] = {
    "model": "alto-tiny",
    "size": [4, 6],
    "results": [
        {
            "phrase": "the red apple", "text": "The mask appears at <ALTo_Start><TOK_17><TOK_3><ALTo_End>", "length": 2,
            "codes": [17, 3], "score": 0.71, "token_probability": 0.83, "confidence": 0.86,
            "rle": {"size": [4, 6], "counts": "52203O0"}, "png": None, "overlay": None,
        }
    ],
    "seconds": 0.21,
}  # fmt: skip


class Options(BaseModel):
    """What is asked about an image: exactly one of phrase, phrases and boxes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    phrase: str | None = Field(None, description="What to segment.", examples=["the red apple"])
    phrases: list[str] | None = Field(None, fail_fast=True, description="Several; each has a mask of its own.")
    boxes: list[_Box] | None = Field(
        None,
        fail_fast=True,
        description="(x1, y1, x2, y2) in pixels of the image turned upright; one mask of all that they mean.",
    )
    length: Literal["adaptive", "full"] | int = Field(
        "adaptive", description="Of a mask: as many tokens as it needs, all that the model has, or an exact number."
    )
    end_bias: float = Field(0.0, ge=-_BIAS, le=_BIAS, description="Above 0: shorter masks; below: longer ones.")
    returns: list[Form] = Field(
        list(DEFAULT_FORMS), fail_fast=True, description="Forms of an answer; the others are null. rle: COCO's run "
        "lengths. png, overlay: base64 of a PNG, the mask as 0 and 255, the image with the mask on it.",
    )  # fmt: skip


class SegmentRequest(Options):
    """A request as JSON."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image": "iVBORw0KGgo…", "phrase": "the red apple"},
                {"image": "iVBORw0KGgo…", "boxes": [[12, 30, 55, 80]], "length": 8, "returns": ["png", "score"]},
            ]
        }
    )

    image: str = Field(description="An image file in base64 (PNG, JPEG, WebP, …); a data: URL is accepted as well.")


class Answer(BaseModel):
    """One mask; what was not asked for with `returns` is null."""

    phrase: str | None = Field(description="That it answers; null for boxes.")
    text: str = Field(description="The answer as the model gave it, mask tokens written out.")
    length: int = Field(description="Mask tokens; 0 if the answer holds no mask.")
    codes: list[int] | None = None
    score: float | None = Field(None, description="token_probability times confidence; not calibrated.")
    token_probability: float | None = None
    confidence: float | None = None
    rle: dict[str, Any] | None = None
    png: str | None = None
    overlay: str | None = None


class SegmentResponse(BaseModel):
    """The answers, in the order of the phrases."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE_ANSWER]})

    model: str
    size: list[int] = Field(description="Height and width of the image, and so of the masks.")
    results: list[Answer]
    seconds: float = Field(description="From the whole body to the answer.")


class Told(BaseModel):
    """What is wrong: a word for programs, a line for people, and the field of the request."""

    code: str
    message: str
    field: str | None


class ErrorResponse(BaseModel):
    """Every response that is no answer."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"error": {"code": "invalid_field", "message": "phrase: expected text, got 3", "field": "phrase"}}
            ]
        }
    )

    error: Told


class ModelResponse(BaseModel):
    """What answers, and what it takes."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    version: str = Field(description="Of alto_jax.")
    parameters: int
    device: str
    mask_tokens: int = Field(description="The most of a mask, and the largest `length`.")
    codebook_size: int
    image_size: int = Field(description="Side of the square that the vision tower sees, in pixels.")
    batch_sizes: list[int]
    question_buckets: list[int] = Field(description="Tokens that questions are padded to; the last is the most.")
    limits: dict[str, int | float]


def _strictly(content: bytes | str) -> Any:
    """The value of a JSON text without NaN and fields that are there twice; ValueError or RecursionError."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number in JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the field {shown(name)} is there twice")
            found[name] = value
        return found

    return json.loads(content, parse_constant=refuse, object_pairs_hook=once)


def read_json(content: bytes) -> dict[str, Any]:
    """The object of a JSON body.

    Raises:
      Fault: bad_json.
    """
    try:
        value = _strictly(content)
    except RecursionError as error:
        raise Fault("bad_json", "the body is no JSON: it nests too deeply") from error
    except ValueError as error:
        raise Fault("bad_json", f"the body is no JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(value, dict):
        raise Fault("bad_json", f"the body is no JSON object, but {type(value).__name__}")
    return value


def check(model: type[Options], values: dict[str, Any]) -> Any:
    """`values` as a request.

    Raises:
      Fault: invalid_field, the first that is wrong.
    """
    for name in values:  # Note: told here, since pydantic would collect all of them.
        if name not in model.model_fields:
            known = ", ".join(model.model_fields)
            raise Fault("invalid_field", f"{shown(name)}: unknown field; known: {known}", name[:80])
    try:
        asked = model.model_validate(values)
    except ValidationError as error:
        raise _fault(error, model) from error
    given = [name for name in ("phrase", "phrases", "boxes") if getattr(asked, name) is not None]
    if len(given) != 1:
        told = " and ".join(given) or "none"
        field = given[-1] if given else "phrase"
        raise Fault("invalid_field", f"phrase, phrases, boxes: expected one of them, got {told}", field)
    if not asked.returns:
        raise Fault("invalid_field", f"returns: expected at least one of {', '.join(get_args(Form))}", "returns")
    asked.returns = list(dict.fromkeys(asked.returns))  # Note: each is made once, however often it is asked for.
    return asked


def _fault(error: ValidationError, model: type[Options]) -> Fault:
    """The first error in our words."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"] if isinstance(part, int) or part in model.model_fields]
    field = ".".join(place)
    if first["type"] == "missing":
        return Fault("invalid_field", f"{field}: the field is missing", field)
    got = shown(first["input"])
    if place and place[0] == "length":
        message = f"length: expected 'adaptive', 'full' or a whole number of at least 1, got {got}"
        return Fault("invalid_field", message, "length")
    what = first["msg"].removeprefix("Input should be ")
    return Fault("invalid_field", f"{field}: expected {what[0].lower()}{what[1:]}, got {got}", field)


def shown(value: Any) -> str:
    """A value of a request as it stands in a message: short, and in characters that every terminal has."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}…"


def from_form(fields: list[tuple[str, str]]) -> dict[str, Any]:
    """The text fields of a form as those of JSON: phrases and returns may be repeated, boxes are JSON.

    Raises:
      Fault: invalid_field.
    """
    values: dict[str, Any] = {}
    for name, text in fields:
        if name in ("phrases", "returns"):
            values.setdefault(name, []).append(text)
            continue
        if name in values:
            raise Fault("invalid_field", f"{shown(name)}: the field is there twice", name[:80])
        values[name] = text
        if name == "boxes":
            values[name] = _form_json(name, text)
        elif name == "end_bias" or (name == "length" and text not in ("adaptive", "full")):
            values[name] = _form_number(name, text)
    return values


def _form_json(name: str, text: str) -> Any:
    try:
        return _strictly(text)
    except (ValueError, RecursionError) as error:
        message = f"{name}: expected JSON, such as [[12, 30, 55, 80]], got {shown(text)}"
        raise Fault("invalid_field", message, name) from error


def _form_number(name: str, text: str) -> Any:
    """A number, or the text itself, which then is of the wrong type."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text
