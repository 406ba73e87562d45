"""The outermost layer of the application: who may ask, what is counted, and bodies that are read within limits.

Every fault, also one that nobody foresaw, becomes a response with a message in JSON; the service goes on.
"""

import asyncio
from collections.abc import Callable, MutableMapping
import contextlib
import json
import logging
import time
from typing import Any

from alto_jax.serve.limits import Fault, Limits, is_known
from alto_jax.serve.metrics import Metrics

_log = logging.getLogger(__name__)
_OPEN = ("/healthz", "/readyz")  # Paths that need no key.
PATHS = ("/v1/segment", "/v1/segment/stream", "/v1/model", "/healthz", "/readyz", "/metrics", "/openapi.json")
_WORK = ("/v1/segment", "/v1/segment/stream")
_LINGER = 2.0  # seconds that the rest of a refused body is read, so that its sender comes to read the response
Message = MutableMapping[str, Any]


class Bodies:
    """The bytes of all bodies that are held, and their limits."""

    def __init__(self, limits: Limits):
        self.limits, self.held = limits, 0

    async def read(self, scope: Message, receive: Callable[[], Any]) -> bytes:
        """A request's body; its bytes count as held until `release`.

        Raises:
          Fault: body_too_large, busy, slow_client, bad_request, client_closed.
        """
        limits = self.limits
        declared = dict(scope["headers"]).get(b"content-length")
        if declared is not None and int(declared) > limits.max_body_bytes:  # Note: digits; the protocol has checked.
            raise self._too_large(f"{int(declared)} bytes")
        content = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Fault("client_closed", "the client went away while it sent the body")
                    chunk = message.get("body", b"")
                    if len(content) + len(chunk) > limits.max_body_bytes:
                        raise self._too_large(f"more than {limits.max_body_bytes} bytes")
                    if self.held + len(chunk) > limits.max_buffered_bytes:
                        told = f"the service holds {limits.max_buffered_bytes} bytes of other requests; ask again"
                        raise Fault("busy", told, headers={"retry-after": "1"})
                    self.held += len(chunk)
                    content += chunk
                    if not message.get("more_body", False):
                        return bytes(content)
        except TimeoutError as error:
            self.release(len(content))
            message = f"the body did not arrive within {limits.body_seconds:g} s"
            raise Fault("slow_client", message) from error
        except BaseException:
            self.release(len(content))
            raise

    def release(self, count: int) -> None:
        """Gives bytes back."""
        self.held -= count

    def _too_large(self, got: str) -> Fault:
        return Fault("body_too_large", f"the body has {got}; at most {self.limits.max_body_bytes} are accepted")


class Guard:
    """ASGI middleware around the application.

    Attributes:
      draining: set when the service is to end: what was accepted goes on, nothing new is.
      in_flight: requests for masks that were accepted and are not answered.
      is_ready: tells whether the programs are compiled.
    """

    def __init__(self, limits: Limits, keys: tuple[bytes, ...], is_ready: Callable[[], bool]):
        self.keys, self.is_ready = keys, is_ready
        self.bodies = Bodies(limits)
        self.draining, self.in_flight = False, 0
        self.app: Any = None
        self.metrics: Metrics | None = None

    async def __call__(self, scope: Message, receive: Callable[[], Any], send: Callable[[Message], Any]) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, path = time.monotonic(), scope["path"] if scope["path"] in PATHS else "other"
        state = {"status": 0, "rest": _has_body(scope), "done": False}

        async def counted_receive() -> Message:
            message = await receive()
            state["rest"] = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                if state["rest"]:
                    await self._discard(scope, counted_receive, state)
                if state["rest"] or self.draining:
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)
            state["done"] = message["type"] == "http.response.body" and not message.get("more_body", False)

        works = path in _WORK
        accepted = False
        try:
            self._admit(scope, path)
            accepted = works
            self.in_flight += accepted
            await self.app(scope, counted_receive, counted_send)
        except Fault as fault:
            await respond(counted_send, fault, self.metrics)
        except Exception:
            _log.exception("%s %s failed", scope["method"], path)
            if not state["done"]:
                raise  # Note: the response has begun; the server closes the connection.
        finally:
            self.in_flight -= accepted
            if self.metrics is not None:
                self.metrics.requests.labels(path, str(state["status"] or 499)).inc()
                self.metrics.seconds.labels(path).observe(time.monotonic() - began)

    def _admit(self, scope: Message, path: str) -> None:
        """Raises Fault: unauthorized, draining, not_ready."""
        if self.keys and path not in _OPEN and scope["method"] != "OPTIONS":
            if not is_known(_key(scope), self.keys):
                message = "expected a valid API key, as Authorization: Bearer KEY or X-API-Key: KEY"
                raise Fault("unauthorized", message, headers={"www-authenticate": "Bearer"})
        if path in _WORK and scope["method"] == "POST":
            if self.draining:
                raise Fault("draining", "the service is ending", headers={"retry-after": "5"})
            if not self.is_ready():
                raise Fault("not_ready", "the programs are being compiled", headers={"retry-after": "10"})

    async def _discard(self, scope: Message, receive: Callable[[], Any], state: Message) -> None:
        """Reads what is left of a refused body, for a while: most clients send all of it before they read."""
        if any(name == b"expect" for name, _ in scope["headers"]):
            return  # Note: they wait for the word to send it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while state["rest"]:
                    await receive()


async def respond(send: Callable[[Message], Any], fault: Fault, metrics: Metrics | None = None) -> None:
    """Sends a fault as a response."""
    if metrics is not None:
        metrics.faults.labels(fault.code).inc()
    body = json.dumps(fault.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | fault.headers
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": fault.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _has_body(scope: Message) -> bool:
    headers = dict(scope["headers"])
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def _key(scope: Message) -> bytes:
    """The key that a request brings, b"" without one."""
    headers = dict(scope["headers"])
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
