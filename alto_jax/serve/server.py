"""uvicorn with what it lacks: deadlines for headers and for taking a response, a limit of connections, and a drain."""

import asyncio
import json
import logging
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from alto_jax.serve.guard import Guard
from alto_jax.serve.limits import Fault, Limits

_log = logging.getLogger(__name__)


def protocol(of_limits: Limits) -> type[H11Protocol]:
    """The protocol of a connection, within limits."""

    class Protocol(H11Protocol):
        limits = of_limits
        _headers_due: asyncio.TimerHandle | None = None
        _write_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > self.limits.max_connections:
                told = f"{self.limits.max_connections} connections are open; ask again"
                self._refuse(Fault("busy", told, headers={"retry-after": "1"}))
                return
            self._await_headers()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._headers_due = _cancel(self._headers_due)
            elif self._headers_due is None and not self.transport.is_closing():
                self._await_headers()  # Note: the next request's, or the rest of a body that was answered already.

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_due, self._write_due = _cancel(self._headers_due), _cancel(self._write_due)
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._close_in_time()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._close_in_time()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_due = self._write_due or self.loop.call_later(self.limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if not self.transport.is_closing():
                self._write_due = _cancel(self._write_due)

        def send_400_response(self, msg: str) -> None:
            self._refuse(Fault("bad_request", "no HTTP request that can be read"))

        def _await_headers(self) -> None:
            self._headers_due = self.loop.call_later(self.limits.header_seconds, self._headers_late)

        def _headers_late(self) -> None:
            told = f"the request did not arrive within {self.limits.header_seconds:g} s"
            self._refuse(Fault("slow_client", told))

        def _refuse(self, fault: Fault) -> None:
            """A response outside of any request, and the end of the connection."""
            self._headers_due = _cancel(self._headers_due)
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                body = json.dumps(fault.body()).encode()
                extra = "".join(f"{name}: {value}\r\n" for name, value in fault.headers.items())
                head = f"HTTP/1.1 {fault.status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
                self.transport.write(f"{head}{extra}connection: close\r\n\r\n".encode() + body)
            self.transport.close()
            self._close_in_time()

        def _close_in_time(self) -> None:
            """A connection that is closed, but whose client takes nothing, ends."""
            if self.transport.is_closing() and self._write_due is None:
                self._write_due = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    return Protocol


def _cancel(timer: asyncio.TimerHandle | None) -> Any:
    """Ends a timer; gives None, which takes its place."""
    if timer is not None:
        timer.cancel()
    return None


class Server(uvicorn.Server):
    """Ends on SIGTERM or SIGINT: accepts nothing new, finishes what was accepted, at most for `drain_seconds`.

    Attributes:
      lost: accepted requests that were not answered when the time was over.
    """

    def __init__(self, app: Any, guard: Guard, limits: Limits, *, access_log: bool = False):
        level = "info" if access_log else "error"
        config = uvicorn.Config(
            app, http=protocol(limits), ws="none", lifespan="on", access_log=access_log, log_level=level,
            timeout_keep_alive=5, timeout_graceful_shutdown=5, server_header=False, loop="asyncio", proxy_headers=False,
        )  # fmt: skip
        super().__init__(config)
        self.guard, self.limits, self.lost = guard, limits, 0
        self._drains_until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signals' handler; a second signal does not wait."""
        if self.guard.draining:
            self._drains_until = 0.0
            return
        self._drains_until = time.monotonic() + self.limits.drain_seconds
        self.guard.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second; returns whether to end."""
        if self.guard.draining and not self.should_exit:
            if self.guard.in_flight == 0:
                self.should_exit = True
            elif time.monotonic() >= self._drains_until:
                self.lost = self.guard.in_flight
                self.should_exit = True
        return await super().on_tick(counter)
