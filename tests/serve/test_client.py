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
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            server.asked.append(self.requestline.rsplit(" ", 1)[0])
            self.send_error(405)

        def do_POST(self):
            server.asked.append(self.requestline.rsplit(" ", 1)[0])
            self.close_connection = True
            self.rfile.read(int(self.headers["content-length"]))
            status, headers, body = server.answers.pop(0)
            self.send_response(status)
            length = {} if "Transfer-Encoding" in headers else {"Content-Length": len(body)}
            for name, value in {**length, **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *ignored):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.asked, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
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


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_that_is_cut_off(proxy, status):
    proxy.answers.append((status, {"Content-Length": 500}, b'{"results": '))
    with pytest.raises(ServiceError, match="the response ended before its end") as refused:
        Client(proxy.url).segment(b"x", phrase="a")
    assert (refused.value.code, refused.value.status) == ("cut_off", status)


@pytest.mark.parametrize("end", [b"", b'50\r\nevent: answer\ndata: {"a"'])
def test_a_stream_that_is_cut_off(proxy, end):
    event = b'event: token\ndata: {"index": 1}\n\n'
    proxy.answers.append((200, {"Transfer-Encoding": "chunked"}, b"%x\r\n%s\r\n" % (len(event), event) + end))
    events = Client(proxy.url).stream(b"x", phrase="a")
    assert next(events) == ("token", {"index": 1})
    with pytest.raises(ServiceError, match="the stream ended before its answer") as refused:
        next(events)
    assert refused.value.code == "cut_off"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_service_that_has_moved_is_named_and_not_shown_the_key(proxy, status):
    where = f"{proxy.url}/elsewhere"
    proxy.answers.append((status, {"Location": where}, b""))
    with pytest.raises(ServiceError, match=f"HTTP status {status}: it is at {where}; give that as the url") as refused:
        Client(proxy.url, "a-key-of-some-length").segment(b"x", phrase="a")
    assert (refused.value.code, proxy.asked) == ("moved", ["POST /v1/segment"])


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
