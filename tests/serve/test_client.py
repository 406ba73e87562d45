"""The client behind a proxy, which answers in its own ways: errors are ServiceErrors, and retries happen."""

import email.utils
import http.server
import json
import sys
import threading
import time

import pytest

from alto_jax.serve import client as module
from alto_jax.serve.client import Client, ServiceError


@pytest.fixture
def proxy():
    """Answers with (status, headers, body) of `proxy.answers`, in order; `proxy.url`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            status, headers, body = server.answers.pop(0)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(body)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *ignored):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": "bad gateway"}', "HTTP status 502: bad gateway"), (b"[]", "HTTP status 502"),
        (b"<html>", "HTTP status 502"), (b'{"error": null}', "HTTP status 502"), (b"3", "HTTP status 502"),
        (b'{"error": {"code": "busy", "message": "too much"}}', "too much"),
    ],
)  # fmt: skip
def test_errors_of_any_form(proxy, body, message):
    proxy.answers.append((502, {}, body))
    with pytest.raises(ServiceError) as refused:
        Client(proxy.url).segment(b"x", phrase="a")
    assert (str(refused.value), refused.value.status) == (message, 502)
    assert refused.value.code == ("busy" if b"busy" in body else "unknown")


def test_an_answer_that_is_a_page(proxy):
    proxy.answers.append((200, {}, b"<html>Log in"))
    with pytest.raises(ServiceError, match="HTTP status 200, but no JSON"):
        Client(proxy.url).segment(b"x", phrase="a")


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7), ("in 3000 seconds", 2000, 3000), ("soon", 1, 1),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 1, 1), ("Wed, 21 Oct 2015 07:28:00 -0000", 1, 1),
        ("Wed, 99 Oct 99999 07:28:00 GMT", 1, 1), ("nan", 1, 1),
    ],
)  # fmt: skip
def test_retries_wait_as_they_are_told(proxy, monkeypatch, header, least, most):
    if header.startswith("in "):
        header = email.utils.formatdate(time.time() + int(header.split()[1]), usegmt=True)
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    proxy.answers += [(503, {"Retry-After": header}, b"[]"), (200, {}, b'{"results": []}')]
    assert Client(proxy.url).segment(b"x", phrase="a", retries=1) == {"results": []}
    assert len(waited) == 1 and least <= waited[0] <= most


def test_the_command_refuses_an_address_that_is_none(proxy, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    ask = lambda url: monkeypatch.setattr(sys, "argv", ["client", str(tmp_path / "a.png"), "a", "--url", url])
    for url in ("127.0.0.1:8000", "file:///etc"):
        ask(url)
        assert module.main() == 2
        assert (
            capsys.readouterr().err == f"error: url: expected one that begins with http:// or https://, got {url!r}\n"
        )
    ask(proxy.url)
    proxy.answers.append((200, {}, json.dumps({"results": []}).encode()))
    assert module.main() == 0
