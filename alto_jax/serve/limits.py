"""What the service accepts at most, and the one form of everything that it refuses."""

import dataclasses
import hmac
import os
import pathlib
from typing import Any

from alto_jax.config import ConfigError

_MIB = 1 << 20


def _limit(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Limits:
    """Every limit is a flag of the same name; the unit is in its name or its help."""

    max_body_bytes: int = _limit(16 * _MIB, "of a request's body (413)")
    max_buffered_bytes: int = _limit(256 * _MIB, "of the bodies of all requests together (503)")
    max_pixels: int = _limit(1 << 24, "of an image, width times height, told before it is decoded (413)")
    max_phrases: int = _limit(16, "phrases of a request (422)")
    max_boxes: int = _limit(16, "boxes of a request (422)")
    max_phrase_chars: int = _limit(256, "characters of a phrase (422)")
    max_queue: int = _limit(128, "masks that wait or are computed (503 with Retry-After)")
    max_connections: int = _limit(512, "open connections (503)")
    request_seconds: float = _limit(30.0, "from the whole body to the answer (504; what still waits is not computed)")
    body_seconds: float = _limit(15.0, "for a client to send a body (408)")
    header_seconds: float = _limit(10.0, "for a client to send a request's headers (408)")
    write_seconds: float = _limit(30.0, "for a client to take what is sent, before its connection is closed")
    drain_seconds: float = _limit(60.0, "after SIGTERM, for what was accepted")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"--{field.name}={value}: expected a finite number above 0")
        if self.max_queue < self.max_phrases:
            raise ConfigError(f"--max_queue={self.max_queue}: expected at least --max_phrases, {self.max_phrases}")
        if self.max_buffered_bytes < self.max_body_bytes:
            message = f"expected at least --max_body_bytes, {self.max_body_bytes}"
            raise ConfigError(f"--max_buffered_bytes={self.max_buffered_bytes}: {message}")


class Fault(Exception):
    """A refused or failed request: an HTTP status, and {"error": {"code", "message", "field"}}.

    Attributes:
      status: of HTTP.
      code: a word for programs, as `FAULTS` lists them.
      message: for people.
      field: of the request, where one is at fault.
      headers: more of the response.
    """

    def __init__(self, code: str, message: str, field: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.message = FAULTS[code][0], code, message
        self.field, self.headers = field, headers or {}

    def body(self) -> dict[str, Any]:
        """What the client gets, JSON-compatible."""
        return {"error": {"code": self.code, "message": self.message, "field": self.field}}


# code: (status, when), of all that the service refuses.
FAULTS = {
    "bad_request": (400, "no HTTP, or no request that can be read"),
    "bad_json": (400, "the body is no JSON object: cut off, NaN, a field twice, nested too deeply"),
    "bad_multipart": (400, "the body is no multipart form"),
    "unauthorized": (401, "no API key, or a wrong one"),
    "not_found": (404, "no such path"),
    "method_not_allowed": (405, "the path does not have this method"),
    "slow_client": (408, "headers or body did not arrive in time"),
    "body_too_large": (413, "more bytes than --max_body_bytes"),
    "image_too_large": (413, "more pixels than --max_pixels, told before they are decoded"),
    "unsupported_media_type": (415, "neither application/json nor multipart/form-data"),
    "invalid_field": (422, "a field is missing, unknown, of a wrong type, or out of range"),
    "bad_image": (422, "no image of a known format, a cut-off one, or one smaller than 8 pixels"),
    "client_closed": (499, "the client went away; seen in the metrics alone"),
    "internal": (500, "a fault of the service; its log has the trace"),
    "busy": (503, "too much waits or is being sent; Retry-After says when to ask again"),
    "not_ready": (503, "the programs are being compiled"),
    "draining": (503, "the service was told to end"),
    "timeout": (504, "no answer within --request_seconds"),
}

_SHORTEST_KEY = 16


def read_keys(path: str | None) -> tuple[bytes, ...]:
    """The API keys of a file, one a line, or that of the environment's ALTO_API_KEY; () if neither is given.

    Raises:
      ConfigError: a file that can't be read or holds none, or a key that is too short or has blanks.
    """
    if path is None:
        given, origin = [os.environ["ALTO_API_KEY"]] if "ALTO_API_KEY" in os.environ else [], "ALTO_API_KEY"
    else:
        origin = f"--api_key_file={path}"
        try:
            given = [line.strip() for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{origin}: {error}") from error
        given = [line for line in given if line]
        if not given:
            raise ConfigError(f"{origin}: holds no key")
    for key in given:
        # Note: the key itself stays out of the message.
        if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{origin}: expected keys of at least {_SHORTEST_KEY} visible ASCII characters")
    return tuple(key.encode() for key in given)


def is_known(key: bytes, keys: tuple[bytes, ...]) -> bool:
    """Whether a key is one of `keys`, in a time that tells nothing of them."""
    return any([hmac.compare_digest(key, known) for known in keys])  # Note: a list, so that all are compared.
