"""A service in this process, and what the tests of it ask with."""

import contextlib
import signal
import socket
import threading
import time
import types

from alto_jax.serve import __main__ as command
from alto_jax.serve.app import Service
from alto_jax.serve.batcher import Batcher
from alto_jax.serve.limits import Limits
from alto_jax.serve.server import Server

KEY = "a-key-of-some-length"
LIMITS = Limits(
    max_body_bytes=200_000, max_buffered_bytes=2_000_000, max_phrases=8, max_boxes=2, max_phrase_chars=60,
    max_queue=24, max_connections=32, request_seconds=20, body_seconds=0.6, header_seconds=0.6,
    drain_seconds=20,
)  # fmt: skip


@contextlib.contextmanager
def serving(engine, limits, **options):
    """A service in this process, on a port of its own, ready."""
    batcher = Batcher(engine, limits.max_queue, window=0.02)
    service = Service(batcher, "debug", limits, **options)
    server = Server(service.app, service.guard, limits)
    listener = command.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    found = types.SimpleNamespace(
        service=service, server=server, batcher=batcher, port=port, url=f"http://127.0.0.1:{port}", thread=thread
    )
    try:
        wait_until(lambda: batcher.state == "ready" and server.started, 120)
        yield found
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
        listener.close()
    assert not thread.is_alive() and not batcher.is_alive


def wait_until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def read(connection):
    """(status, headers, body) of what comes until the connection is closed."""
    content = b""
    with contextlib.suppress(ConnectionResetError):  # what we sent and nobody read
        while chunk := connection.recv(65536):
            content += chunk
    head, _, body = content.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers, body


def ask(port, raw):
    """Sends a whole request, as most clients do before they read."""
    with connect(port) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(raw)
        return read(connection)
