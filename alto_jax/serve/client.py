"""A client of the service, of Python's standard library alone: copy it where you need it.

python -m alto_jax.serve.client photo.jpg "the red apple" [--url http://127.0.0.1:8000] [--stream]

client = Client("http://127.0.0.1:8000", key="…")
answer = client.segment("photo.jpg", phrase="the red apple", returns=["png", "score"])
png = base64.b64decode(answer["results"][0]["png"])
"""

import argparse
import base64
from collections.abc import Iterator
import contextlib
import email.utils
import http.client
import json
import os
import pathlib
import sys
import time
from typing import Any
import urllib.error
import urllib.request


class ServiceError(Exception):
    """What the service refused: status of HTTP, code, field of the request or None; the message is the exception's."""

    def __init__(self, status: int, code: str, message: str, field: str | None, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.code, self.field, self.retry_after = status, code, field, retry_after


class _Refuse(urllib.request.HTTPRedirectHandler):
    """Follows nothing: urllib would ask again with GET, without the body, and show the key to whoever is named."""

    def redirect_request(self, request: Any, *response: Any) -> None:
        return None


class Client:
    """Asks a service."""

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None, timeout: float = 60.0):
        """Takes where it is, its API key, and the seconds to wait for an answer.

        Raises:
          ValueError: the URL does not begin with http:// or https://.
        """
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError(f"url: expected one that begins with http:// or https://, got {url!r}")
        self.url, self.key, self.timeout = url.rstrip("/"), key, timeout
        self._opener = urllib.request.build_opener(_Refuse)

    def segment(self, image: str | os.PathLike | bytes, *, retries: int = 0, **asked: Any) -> dict[str, Any]:
        """Masks of an image.

        Args:
          image: a file, or its content.
          retries: how often to ask again where the service is busy, after the time that it names.
          **asked: phrase, phrases or boxes; length, end_bias, returns (docs/serve.md).

        Returns:
          The response's JSON: {"model", "size", "results", "seconds"}.

        Raises:
          ServiceError: the service refused, or could not.
        """
        while True:
            try:
                with self._open("/v1/segment", _body(image, asked)) as response:
                    return _answer(response)
            except ServiceError as error:
                if not retries or error.status != 503:
                    raise
                retries -= 1
                time.sleep(error.retry_after or 1.0)

    def stream(self, image: str | os.PathLike | bytes, **asked: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields ("token", {"result", "index", "code", "change", …}) for each mask token, then ("answer", the answer).

        Raises:
          ServiceError: as `segment`, also after some tokens.
        """
        with self._open("/v1/segment/stream", _body(image, asked)) as response:
            event, done = "", False
            for line in _lines(response):
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "event":
                    event = value
                elif name == "data" and event == "error":
                    raise _error(response.status, json.loads(value))
                elif name == "data":
                    done = event == "answer"
                    yield event, json.loads(value)
            if not done:
                raise ServiceError(response.status, "cut_off", "the stream ended before its answer", None)

    def model(self) -> dict[str, Any]:
        """What answers, and its limits."""
        with self._open("/v1/model") as response:
            return _answer(response)

    def is_ready(self) -> bool:
        """Whether the service takes requests; False also where nothing listens."""
        try:
            with self._open("/readyz"):
                return True
        except (ServiceError, OSError):
            return False

    def _open(self, path: str, body: bytes | None = None) -> Any:
        headers = {"content-type": "application/json"} if body is not None else {}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            return self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                content, after = _whole(error), error.headers.get("retry-after")
            if 300 <= error.code < 400:
                message = f"HTTP status {error.code}: it is at {error.headers.get('location')}; give that as the url"
                raise ServiceError(error.code, "moved", message, None) from error
            try:
                told = json.loads(content)
            except ValueError:  # such as a proxy's own page
                told = {}
            raise _error(error.code, told, _seconds(after)) from error


def _whole(response: Any) -> bytes:
    """The body of a response; ServiceError if it is cut off."""
    try:
        return response.read()
    except (http.client.IncompleteRead, ConnectionResetError) as error:
        raise ServiceError(response.status, "cut_off", "the response ended before its end", None) from error


def _lines(response: Any) -> Iterator[bytes]:
    """The lines of a stream as they come, also of one that is cut off."""
    with contextlib.suppress(http.client.IncompleteRead, ConnectionResetError):
        yield from response


def _answer(response: Any) -> dict[str, Any]:
    """The JSON of a response; ServiceError if it has none."""
    content = _whole(response)
    try:
        return json.loads(content)
    except ValueError as error:  # such as a page to log in
        message = f"HTTP status {response.status}, but no JSON"
        raise ServiceError(response.status, "unknown", message, None) from error


def _seconds(after: str | None) -> float | None:
    """The header Retry-After in seconds from now: a number, or a date (proxies); None if it says nothing."""
    after = (after or "").strip()
    if after.isascii() and after.isdigit():
        return float(after)
    date = email.utils.parsedate_tz(after)
    try:
        return None if date is None else max(email.utils.mktime_tz(date) - time.time(), 0.0)
    except (ValueError, OverflowError):  # such as the 99th of a month
        return None


def _error(status: int, told: Any, after: float | None = None) -> ServiceError:
    """What the service told; a proxy in front of it may tell anything."""
    found = told.get("error") if isinstance(told, dict) else None
    found = found if isinstance(found, dict) else {"message": f"HTTP status {status}: {found}"} if found else {}
    return ServiceError(status, found.get("code", "unknown"), found.get("message", f"HTTP status {status}"),
                        found.get("field"), after)  # fmt: skip


def _body(image: str | os.PathLike | bytes, asked: dict[str, Any]) -> bytes:
    content = image if isinstance(image, bytes) else pathlib.Path(image).read_bytes()
    return json.dumps({"image": base64.b64encode(content).decode("ascii"), **asked}).encode()


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m alto_jax.serve.client", description=__doc__.splitlines()[0])
    parser.add_argument("image", metavar="IMAGE", help="a file")
    parser.add_argument("phrase", metavar="PHRASE", help='such as "the red apple"')
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default=os.environ.get("ALTO_API_KEY"), help="(default: ALTO_API_KEY)")
    parser.add_argument("--stream", action="store_true", help="token by token")
    options = parser.parse_args()
    try:
        client = Client(options.url, options.key)
        if options.stream:
            for event, value in client.stream(options.image, phrase=options.phrase):
                print(event, json.dumps(value))
        else:
            print(json.dumps(client.segment(options.image, phrase=options.phrase), indent=1))
    except (ServiceError, OSError, ValueError, http.client.HTTPException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
