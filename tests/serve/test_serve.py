"""The service, asked over real connections: answers, faults, limits, time, and its end."""

import base64
import contextlib
import io
import json
import re
import signal
import threading
import time
import types

import numpy as np
from PIL import Image
import pytest

import alto_jax
from alto_jax.config import ConfigError
from alto_jax.data import rle
from alto_jax.inference.decoding import Decoding
from alto_jax.serve import __main__ as command
from alto_jax.serve import limits as bounds
from alto_jax.serve.app import Service
from alto_jax.serve.batcher import Batcher, choose
from alto_jax.serve.client import Client, ServiceError
from alto_jax.serve.engine import Engine, batch_size
from alto_jax.serve.metrics import compilations
from alto_jax.serve.server import Server
from tests.serve.bad_requests import asked, bad_requests, form, http, image_file
from tests.serve.serving import KEY, LIMITS, ask, connect, read, serving, wait_until


@pytest.fixture(scope="module")
def served(debug_model):
    model = alto_jax.load(debug_model.path)
    with serving(Engine(model, (1, 4), (64,), cached_images=4), LIMITS) as found:
        found.model = model
        yield found


def masks(answer):
    """The masks of a response, by phrase."""
    return {one["phrase"]: rle.decode(one["rle"], *answer["size"], "test") for one in answer["results"]}


def direct(served, photo, phrases, **options):
    """The model's own answers, one call each: these run what the service has compiled."""
    array = np.asarray(Image.open(io.BytesIO(photo)))
    return [served.model.segment(array, phrase, **options) for phrase in phrases]


def metric(found, name, **labels):
    return found.service.metrics.registry.get_sample_value(name, labels)


def test_no_request_compiles(served):
    """What came before was the warm-up; after it, requests of all sizes run on its programs."""
    before, client = compilations(), Client(served.url)
    assert before > 5
    for count in range(1, 9):
        client.segment(image_file(50 + count, size=(40 + count, 90)), phrases=list("abcdefgh")[:count], length=count)
    client.segment(image_file(60), phrase="the red apple on the left")
    client.segment(image_file(61), boxes=[[1, 2, 20, 30]], length="full", end_bias=-3, returns=["png", "overlay"])
    assert len(list(client.stream(image_file(62), phrase="a", length=6))) == 7
    asking = [threading.Thread(target=client.segment, args=(image_file(i),), kwargs={"phrase": "a"}) for i in range(6)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert compilations() == before


def test_answers_are_those_of_the_model(served):
    client, photo = Client(served.url), image_file(1)
    array = np.asarray(Image.open(io.BytesIO(photo)))
    forms = ["rle", "png", "overlay", "codes", "score"]
    answer = client.segment(photo, phrases=["the red apple", "the small cup"], returns=forms, length=5)
    own = direct(served, photo, ["the red apple", "the small cup"], length=5)
    assert (answer["model"], answer["size"], answer["seconds"] > 0) == ("debug", [40, 50], True)
    for one, expected, phrase in zip(answer["results"], own, ["the red apple", "the small cup"], strict=True):
        assert one["phrase"] == phrase and one["codes"] == expected.codes and one["length"] == 5
        assert one["text"] == expected.text and one["score"] == pytest.approx(expected.score, rel=1e-4)
        decoded = {name: np.asarray(Image.open(io.BytesIO(base64.b64decode(one[name])))) for name in ("png", "overlay")}
        np.testing.assert_array_equal(decoded["png"] > 0, expected.mask)
        np.testing.assert_array_equal(decoded["overlay"], expected.overlay(array))
        np.testing.assert_array_equal(masks(answer)[phrase], expected.mask)
    # A box, all tokens, another form of answer; and the same as a form.
    [box] = client.segment(photo, boxes=[[3, 4, 30, 35]], length="full", returns=["codes"])["results"]
    assert box["codes"] == served.model.segment(array, boxes=[(3, 4, 30, 35)], length="full").codes
    assert (box["rle"], box["score"], box["phrase"]) == (None, None, None)
    parts = [("image", photo), ("boxes", "[[3, 4, 30, 35]]"), ("length", "full"), ("returns", "codes")]
    sent = http(form([*parts, ("end_bias", "0")]), "multipart/form-data; boundary=boundary-of-a-form")
    status, _, body = ask(served.port, sent)
    assert status == 200 and json.loads(body)["results"] == [box]
    # The bias is of the request that asks for it, whatever else is in its batch.
    short = client.segment(photo, phrase="the red apple", end_bias=50)["results"][0]
    assert short["codes"] == served.model.segment(array, "the red apple", end_bias=50.0).codes and short["length"] == 1


def test_stream_grows_to_the_answer(served):
    photo = image_file(2)
    array = np.asarray(Image.open(io.BytesIO(photo)))
    *growing, (last, answer) = Client(served.url).stream(photo, phrases=["the red apple", "the small cup"], length=3)
    growing.sort(key=lambda event: event[1]["result"])  # those of one batch come together
    own = direct(served, photo, ["the red apple", "the small cup"], length=3)
    assert last == "answer" and [one["codes"] for one in answer["results"]] == [one.codes for one in own]
    assert [(name, event["result"], event["index"]) for name, event in growing] == [
        ("token", result, index) for result in (0, 1) for index in (1, 2, 3)
    ]
    for result in (0, 1):
        events = [event for _, event in growing if event["result"] == result]
        assert [event["code"] for event in events] == own[result].codes
        shown = [np.zeros((40, 50), bool), *(rle.decode(event["rle"], 40, 50, "test") for event in events)]
        np.testing.assert_array_equal(shown[1:], served.model.growth(array, own[result]))
        changes = [float((a != b).mean()) for a, b in zip(shown, shown[1:])]
        assert [event["change"] for event in events] == pytest.approx(changes, abs=1e-6)


def test_tokens_come_while_the_model_writes(served, monkeypatch):
    """The model writes a token only after the client has the one before; what fails then is told in the stream."""
    photo, got, steps, fails = image_file(9), threading.Semaphore(0), [], []
    advance = Decoding.advance

    def after_the_client(self, count=1):
        assert got.acquire(timeout=20)
        if fails:
            raise RuntimeError("a fault of the device")
        steps.append(count)
        advance(self, count)

    monkeypatch.setattr(Decoding, "advance", after_the_client)
    names = []
    for name, event in Client(served.url).stream(photo, phrase="a", length=3):
        assert name == "answer" or len(steps) == event["index"] - 1
        names.append(name)
        got.release()
    assert names == ["token", "token", "token", "answer"] and steps == [1, 1, 1]

    fails.append(True)
    events = Client(served.url).stream(photo, phrase="a", length=3)
    assert next(events)[0] == "token"
    got.release(5)
    with pytest.raises(ServiceError, match="failed to answer") as told:
        list(events)
    assert told.value.code == "internal"
    wait_until(lambda: served.batcher.depth == 0)


def test_a_stream_that_nobody_reads_gives_its_places_back(served, monkeypatch):
    hold, held = threading.Event(), threading.Event()
    advance = Decoding.advance

    def slowly(self, count=1):
        held.set()
        assert hold.wait(20)
        advance(self, count)

    monkeypatch.setattr(Decoding, "advance", slowly)
    with connect(served.port) as gone:
        body = asked(image_file(8), length=3)
        gone.sendall(http(body, path="/v1/segment/stream"))
        assert held.wait(20) and served.batcher.depth == 1
        while b"event: token" not in gone.recv(65536):
            pass
        assert served.service.guard.bodies.held == len(body)  # its picture counts as long as it is there
    wait_until(lambda: served.batcher.depth == served.service.guard.bodies.held == 0)  # while the model still computes
    hold.set()
    assert Client(served.url).segment(image_file(8), phrase="a")["results"]


def test_everyone_gets_their_own_answer(served):
    """Twelve ask at once, about different pictures and in different ways; some of them share batches."""
    ways = [{"phrase": "the green tree"}, {"phrases": ["the small cup", "the red apple"]}, {"boxes": [[2, 3, 33, 37]]}]
    requests = [(image_file(10 + index), ways[index % 3], (2, 5, "adaptive")[index // 3 % 3]) for index in range(12)]
    expected, answers = [], {}
    for photo, way, length in requests:
        phrases = way.get("phrases") or [way.get("phrase", "")]
        found = direct(served, photo, phrases, boxes=way.get("boxes"), length=length)
        expected.append([one.mask for one in found])
    assert len({mask.tobytes() for found in expected for mask in found}) > 12  # else a wrong pairing would not show
    before = metric(served, "alto_batch_masks_count"), metric(served, "alto_batch_masks_sum")
    go = threading.Barrier(len(requests))

    def one(index):
        photo, way, length = requests[index]
        go.wait()
        answers[index] = Client(served.url).segment(photo, **way, length=length, returns=["rle"], retries=9)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, found in enumerate(expected):
        got = [rle.decode(one["rle"], 40, 50, "test") for one in answers[index]["results"]]
        np.testing.assert_array_equal(got, found)
    batches = metric(served, "alto_batch_masks_count") - before[0]
    assert metric(served, "alto_batch_masks_sum") - before[1] == 16 and batches < 16


BAD = list(bad_requests(200_000, 60, 8, 2, mask_tokens=8))


def test_there_are_many_bad_requests():
    assert len(BAD) >= 60 and len({bad.name for bad in BAD}) == len(BAD)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_request(served, bad):
    status, headers, body = ask(served.port, bad.raw)
    told = json.loads(body)["error"]
    assert (status, told["code"], told["field"]) == (bad.status, bad.code, bad.field), told
    assert status == bounds.FAULTS[bad.code][0] and headers["content-type"] == "application/json"
    assert 10 < len(told["message"]) < 400 and told["message"].isprintable()
    assert "Traceback" not in told["message"] and served.batcher.is_alive


def test_a_slow_client_is_told_so(served):
    """Slowloris: headers, or a body, a byte at a time; and a client that says nothing at all."""
    request = http(asked(image_file()))
    head = request.index(b"\r\n\r\n") + 4
    connections = {}
    for name, first in (("headers", 20), ("body", head + 9), ("silent", 0)):
        connections[name] = connect(served.port)
        connections[name].sendall(request[:first])
    began = time.monotonic()
    for step in range(8):  # longer than a limit from byte to byte would wait
        for name, first in (("headers", 20), ("body", head + 9)):
            with contextlib.suppress(OSError):
                connections[name].sendall(request[first + step : first + step + 1])
        time.sleep(0.1)
    for connection in connections.values():
        status, _, body = read(connection)
        assert status == 408 and json.loads(body)["error"]["code"] == "slow_client"
        connection.close()
    assert time.monotonic() - began < 5
    wait_until(lambda: served.service.guard.bodies.held == 0)


def test_a_client_that_goes_away_is_not_computed(served, monkeypatch):
    hold, held = threading.Event(), threading.Event()
    answer = served.batcher.engine.answer

    def slowly(*args):
        held.set()
        assert hold.wait(20)
        return answer(*args)

    monkeypatch.setattr(served.batcher.engine, "answer", slowly)
    dropped, computed = metric(served, "alto_dropped_masks_total"), metric(served, "alto_masks_total")
    first = threading.Thread(target=ask, args=(served.port, http(asked(image_file(3)))))
    first.start()
    assert held.wait(20)
    with connect(served.port) as gone:
        gone.sendall(http(asked(image_file(4), phrase=None, phrases=["a", "b"])))
        # Note: places are held before the picture is read; only what is in the queue can be dropped from it.
        wait_until(lambda: served.batcher.depth == 3 and len(served.batcher._waiting) == 2)
    wait_until(lambda: served.batcher.depth == 1)  # its places are free as soon as it has gone
    hold.set()
    first.join()
    wait_until(lambda: metric(served, "alto_dropped_masks_total") == dropped + 2)
    assert metric(served, "alto_masks_total") == computed + 1


def test_full_queue_time_and_failures(served, monkeypatch):
    """What waits is bounded (503), and in time (504, and then dropped); a batch that fails is one request's fault."""
    hold = threading.Event()
    answer, calls = served.batcher.engine.answer, []

    def slowly(*args):
        calls.append(len(args[1]))
        assert hold.wait(20)
        return answer(*args)

    monkeypatch.setattr(served.batcher.engine, "answer", slowly)
    limits = types.SimpleNamespace(**{**vars(LIMITS), "request_seconds": 1.0})
    monkeypatch.setattr(served.service, "limits", limits)
    before, results = metric(served, "alto_dropped_masks_total"), []
    eight = http(asked(image_file(5), phrase=None, phrases=list("abcdefgh")))
    threads = [threading.Thread(target=lambda: results.append(ask(served.port, eight))) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: served.batcher.depth == 24)
    with pytest.raises(ServiceError, match="24 masks wait, at most 24 may") as refused:
        Client(served.url).segment(image_file(6), phrase="a")
    assert refused.value.status == 503 and refused.value.code == "busy" and refused.value.retry_after >= 1
    for thread in threads:
        thread.join()
    assert [(status, json.loads(body)["error"]["code"]) for status, _, body in results] == [(504, "timeout")] * 3
    hold.set()
    wait_until(lambda: metric(served, "alto_dropped_masks_total") == before + 20)
    assert calls == [4]  # the batch that ran when the time was over; the rest was not computed
    monkeypatch.setattr(served.service, "limits", LIMITS)

    def fails(encoded, questions):
        if any(question.settings.generate.forced_length == 7 for question in questions):
            raise RuntimeError("a fault of the device")
        return answer(encoded, questions)

    monkeypatch.setattr(served.batcher.engine, "answer", fails)
    lengths, results = (3, 7, 4), {}
    ask_one = lambda length: results.update({length: ask(served.port, http(asked(image_file(7), length=length)))})
    threads = [threading.Thread(target=ask_one, args=(length,)) for length in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {length: found[0] for length, found in results.items()} == {3: 200, 7: 500, 4: 200}
    assert json.loads(results[7][2])["error"]["code"] == "internal" and b"device" not in results[7][2]
    assert json.loads(results[4][2])["results"][0]["length"] == 4


def test_too_much_at_once(served, monkeypatch):
    """Bodies together, and connections, are bounded."""
    monkeypatch.setattr(served.service.guard.bodies, "held", LIMITS.max_buffered_bytes - 10)
    status, headers, body = ask(served.port, http(asked(image_file())))
    assert (status, json.loads(body)["error"]["code"], headers["retry-after"]) == (503, "busy", "1")
    assert served.service.guard.bodies.held == LIMITS.max_buffered_bytes - 10
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS.max_connections):
            stack.enter_context(connect(served.port))
        wait_until(lambda: len(served.server.server_state.connections) >= LIMITS.max_connections)
        status, _, body = read(stack.enter_context(connect(served.port)))
        assert status == 503 and "32 connections are open" in json.loads(body)["error"]["message"]
    wait_until(lambda: not served.server.server_state.connections)


def test_connections_are_kept_and_take_one_request_after_another(served):
    request = http(asked(image_file(8)), connection="keep-alive")
    with connect(served.port) as connection:
        connection.sendall(request + http(b"{", connection="keep-alive") + http(asked(image_file(8))))  # pipelined
        content = b""
        while chunk := connection.recv(65536):
            content += chunk
    assert re.findall(rb"HTTP/1.1 (\d+)", content) == [b"200", b"400", b"200"]


def test_what_the_service_tells_of_itself(served):
    client = Client(served.url)
    assert client.is_ready() and ask(served.port, http(b"", None, "/healthz", "GET"))[0] == 200
    told = client.model()
    assert (told["mask_tokens"], told["batch_sizes"], told["limits"]["max_queue"]) == (8, [1, 4], 24)
    client.segment(image_file(), phrase="a")
    status, headers, body = ask(served.port, http(b"", None, "/metrics", "GET"))
    text = body.decode()
    assert status == 200 and headers["content-type"].startswith("text/plain")
    names = (r'requests_total\{path="/v1/segment",status="200"\} [1-9]', r"queue_depth 0.0", r"_bytes [1-9]",
             r'batch_masks_bucket\{le="4.0"\} [1-9]', r'seconds_bucket\{le="0.5",path="/v1/segment"\}',
             r"requests_in_flight 0.0")  # fmt: skip
    for name in names:
        assert re.search(name, text), name
    schema = json.loads(ask(served.port, http(b"", None, "/openapi.json", "GET"))[2])
    post = schema["paths"]["/v1/segment"]["post"]
    assert set(post["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert {"200", "400", "401", "408", "413", "415", "422", "503", "504"} <= set(post["responses"])
    request = schema["components"]["schemas"]["SegmentRequest"]
    assert request["examples"] and {"image", "phrase", "phrases", "boxes", "length"} <= set(request["properties"])
    assert not re.findall(r'"\$ref": "#/\$defs', json.dumps(schema))
    # No origin but its own may ask from a browser.
    status, headers, _ = ask(served.port, http(b"", None, "/readyz", "GET", origin="http://elsewhere"))
    assert status == 200 and "access-control-allow-origin" not in headers


def test_keys_origins_and_a_warm_up_that_takes_time(served, monkeypatch):
    """A service of its own on the same programs: closed without the key, open to one origin, not ready at once."""
    warm = threading.Event()
    engine = Engine(served.model, (1,), (64,))
    monkeypatch.setattr(engine, "warm_up", lambda tell: warm.wait(20))
    batcher = Batcher(engine, 8, window=0.0)
    service = Service(batcher, "debug", LIMITS, keys=(b"another-key-of-it", KEY.encode()), cors=("http://here",))
    server, listener = Server(service.app, service.guard, LIMITS), command.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url, photo = f"http://127.0.0.1:{port}", image_file()
    wait_until(lambda: server.started)
    assert not Client(url).is_ready() and ask(port, http(b"", None, "/healthz", "GET"))[0] == 200
    for key in (None, "", "wrong", KEY[:-1], KEY + "x"):
        with pytest.raises(ServiceError, match="expected a valid API key") as refused:
            Client(url, key).segment(photo, phrase="a")
        assert (refused.value.status, refused.value.code) == (401, "unauthorized")
    assert ask(port, http(b"", None, "/metrics", "GET"))[0] == 401
    with pytest.raises(ServiceError, match="being compiled") as refused:
        Client(url, KEY).segment(photo, phrase="a")
    assert refused.value.status == 503 and refused.value.retry_after
    warm.set()
    wait_until(lambda: Client(url).is_ready())
    assert Client(url, KEY).segment(photo, phrase="a")["results"]
    status, headers, _ = ask(port, http(asked(photo), x_api_key=KEY, origin="http://here"))
    assert status == 200 and headers["access-control-allow-origin"] == "http://here"
    status, headers, _ = ask(port, http(b"{", origin="http://here"))
    assert status == 401 and headers["access-control-allow-origin"] == "http://here"
    server.handle_exit(signal.SIGTERM, None)
    thread.join(20)
    assert not thread.is_alive()


def test_a_length_that_no_question_fits_into_is_named(served):
    with pytest.raises(
        ConfigError, match=r"--question_buckets=8,64: expected at least \d\d, the tokens of the shortest"
    ):
        Engine(served.model, (1,), (8, 64))


def test_a_service_that_ends_while_it_compiles_is_never_ready():
    begun, go, told = threading.Event(), threading.Event(), []
    warm_up = lambda tell: (begun.set(), go.wait(20))
    batcher = Batcher(types.SimpleNamespace(warm_up=warm_up, sizes=(1,)), 8, window=0.0)
    batcher.start(told.append)
    assert begun.wait(20)
    threading.Timer(0.05, go.set).start()
    assert batcher.stop(20) and told == [] and batcher.state == "stopped"


def test_batches():
    assert [batch_size(n, (1, 4, 16)) for n in (1, 2, 3, 4, 5, 8, 9, 16, 40)] == [1, 1, 4, 4, 4, 4, 16, 16, 16]
    row = lambda width, name: types.SimpleNamespace(question=types.SimpleNamespace(width=width), name=name)
    waiting = [row(64, "a"), row(32, "b"), row(64, "c"), row(128, "d"), row(64, "e"), row(32, "f")]
    names = lambda rows: "".join(one.name for one in rows)
    assert names(choose(waiting, (1, 4))) == "aceb"  # the oldest's bucket, then shorter ones where there is room
    assert names(choose(waiting[1:], (1, 4))) == "b" and names(choose(waiting, (1,))) == "a"
