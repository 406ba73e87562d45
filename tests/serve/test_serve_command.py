"""The service as a command: its flags, its keys, and its end on SIGTERM."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from alto_jax import config
from alto_jax.serve import __main__ as command
from alto_jax.serve import limits as bounds
from alto_jax.serve.client import Client
from tests.conftest import ROOT
from tests.serve.bad_requests import asked, http, image_file
from tests.serve.serving import KEY, ask, connect, wait_until


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--port=99999"], "--port=99999: expected 0..65535"),
        (["--batch_sizes=4,1"], "--batch_sizes=4,1: expected ascending numbers above 0, such as 1,4,16"),
        (["--batch_sizes=2"], "--batch_sizes=2: expected 1 as the first"),
        (["--question_buckets=32,44"], "--question_buckets=32,44: expected ascending multiples of 8 above 0"),
        (["--window_ms=nan"], "--window_ms=nan: expected 0..10000"),
        (["--max_queue=0"], "--max_queue=0: expected a finite number above 0"),
        (["--max_queue=4"], "--max_queue=4: expected at least --max_phrases, 16"),
        (["--request_seconds=inf"], "--request_seconds=inf: "),
        (["--max_buffered_bytes=9"], "--max_buffered_bytes=9: expected at least --max_body_bytes"),
        (["--api_key_file=nowhere"], "--api_key_file=nowhere: "),
        (["--host=no.such.host.invalid"], "--host=no.such.host.invalid --port=8000: "),
        (["--threads=0"], "--threads=0: expected 1..256"),
    ],
)
def test_command_refuses(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve", *arguments])
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        command.main()


def test_keys_are_read(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n  another-key-of-it \n")
    assert bounds.read_keys(str(file)) == (KEY.encode(), b"another-key-of-it")
    for content, message in (
        ("\n", "no key"),
        ("short", "at least 16 visible ASCII"),
        ("a b" * 9, "visible ASCII"),
    ):
        file.write_text(content)
        with pytest.raises(config.ConfigError, match=message) as refused:
            bounds.read_keys(str(file))
        assert content.strip() == "" or content not in str(refused.value)
    monkeypatch.delenv("ALTO_API_KEY", raising=False)
    assert bounds.read_keys(None) == ()
    monkeypatch.setenv("ALTO_API_KEY", KEY)
    assert bounds.read_keys(None) == (KEY.encode(),)
    monkeypatch.setenv("ALTO_API_KEY", "")
    with pytest.raises(config.ConfigError, match="ALTO_API_KEY: expected keys"):
        bounds.read_keys(None)


def test_sigterm_finishes_what_was_accepted(debug_model):
    """The command itself: requests in the queue when the signal comes are answered, new ones are not, the exit is 0."""
    arguments = [f"--checkpoint={debug_model.path}", "--port=0", "--batch_sizes=1,4", "--question_buckets=64"]
    arguments += ["--name=debug", "--window_ms=600"]
    served = subprocess.Popen([sys.executable, "-m", "alto_jax.serve", *arguments], cwd=ROOT, stderr=subprocess.PIPE,
                              text=True, env=os.environ | {"ALTO_API_KEY": KEY})  # fmt: skip
    try:
        lines = []
        for line in served.stderr:
            lines.append(line)
            if line.startswith("ready at "):
                break
        assert lines[-1].startswith("ready at "), "".join(lines)
        url = lines[-1].split()[-1]
        client, answers = Client(url, KEY), []

        def results(seed):
            [found] = client.segment(image_file(seed), phrase="the red apple", length=4)["results"]
            return found["text"], found["rle"]["counts"]

        def one(seed):
            answers.append((seed, results(seed)))

        before = {seed: results(seed) for seed in range(3)}

        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        port = int(url.rsplit(":", 1)[1])
        get = lambda path: ask(port, http(b"", None, path, "GET", x_api_key=KEY))
        wait_until(lambda: b"alto_requests_in_flight 3.0" in get("/metrics")[2])
        served.send_signal(signal.SIGTERM)
        wait_until(lambda: get("/readyz")[0] == 503)
        status, headers, body = ask(port, http(asked(image_file()), x_api_key=KEY))
        assert (status, json.loads(body)["error"]["code"], headers["connection"]) == (503, "draining", "close")
        for thread in threads:
            thread.join(30)
        assert served.wait(30) == 0
        with pytest.raises(OSError):
            connect(port)
    finally:
        served.kill()
        served.stderr.close()
    # Three that were in flight, each answered as it had been before the signal came; and no two alike.
    assert sorted(answers) == sorted(before.items()) and len({answer for answer in before.values()}) == 3
