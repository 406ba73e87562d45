"""The service under load: `python benchmarks/serve.py [--clients 32] [--seconds 120]`.

Starts `python -m alto_jax.serve` five times, one after the other: with its batches and one by one (one mask at a time),
both also without images that stay encoded, and with batches and bad requests in between. All are asked the same mix of
phrases, several phrases, boxes and streams about built-in pictures; the bad requests are those of
tests/serve/bad_requests.py. Each answer is compared with what the model says when asked directly, in this process,
beforehand; each refusal with the status and code that it is owed. The memory of the server is read from its metrics. At
the end of each: SIGTERM, with a request of every client in flight. Writes benchmarks/results/serve.md.
"""

import argparse
import base64
import collections
import dataclasses
import datetime
import http.client
import io
import itertools
import json
import os
import pathlib
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.serve.bad_requests import Bad, bad_requests  # noqa: E402

BATCHED, SINGLE, MIXED = "batched", "one by one", "batched, with bad requests"
BATCHED_UNSEEN, SINGLE_UNSEEN = "batched, no image kept", "one by one, no image kept"
ONE_BY_ONE = ("--batch_sizes=1", "--batches_at_once=1")
PICTURES = 32  # one for each client; the service keeps as many encoded
BAD_SHARE = 0.25
CODES_APART = 2  # of an answer's codes, the most that may differ by rounding alone


@dataclasses.dataclass(frozen=True)
class Good:
    """A request with its answer: path, body, and for each mask its codes and its pixels bool[H, W]."""

    path: str
    body: bytes = dataclasses.field(repr=False)
    codes: list[list[int]]
    masks: list[np.ndarray] = dataclasses.field(repr=False)


def good_requests(checkpoint: str, seed: int) -> list[Good]:
    """Requests about built-in pictures with the model's own answers, no two pictures or answers alike."""
    import alto_jax
    from alto_jax.demo import frames

    model, rng, found = alto_jax.load(checkpoint), random.Random(seed), []
    names = "the red apple,the cup,the balloon,the broom,the large tree,the blue car,the dog on the left,the cat".split(
        ","
    )
    for index, (picture, phrase, written) in enumerate(frames.examples(PICTURES)):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=90)
        array = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))
        encoded, text = model.encode_image(array), base64.b64encode(buffer.getvalue()).decode()
        box = [[float(number) for number in written.split(",")]] if written else [[20, 30, 200, 220]]
        several = rng.sample(names, 4)
        ways = [
            ("/v1/segment", {"phrase": phrase or names[index % len(names)]}),
            ("/v1/segment", {"boxes": box, "length": rng.choice([4, 8, "adaptive"])}),
            ("/v1/segment", {"phrases": several[: 2 + index % 3]}),
            ("/v1/segment", {"phrase": names[(index + 3) % len(names)], "end_bias": rng.choice([-1.0, 1.0, 2.0])}),
        ]
        if index % 2:
            ways.append(("/v1/segment/stream", {"phrase": names[(index + 5) % len(names)], "length": 6}))
        for path, asked in ways:
            options = {name: asked[name] for name in ("length", "end_bias") if name in asked}
            if "boxes" in asked:
                answers = [model.segment(encoded, boxes=asked["boxes"], **options)]
            else:
                answers = [
                    model.segment(encoded, one, **options) for one in asked.get("phrases", [asked.get("phrase")])
                ]
            body = json.dumps({"image": text, "returns": ["rle", "codes"], **asked}).encode()
            found.append(Good(path, body, [one.codes for one in answers], [one.mask for one in answers]))
    return found


class Server:
    """A service as a process of its own."""

    def __init__(self, checkpoint: str, *flags: str):
        command = [sys.executable, "-m", "alto_jax.serve", f"--checkpoint={checkpoint}", "--port=0", *flags]
        began = time.monotonic()
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line)
            if line.startswith("ready at "):
                break
        else:
            raise RuntimeError("".join(self.log))
        self.warm_up = time.monotonic() - began
        self.port = int(self.log[-1].rsplit(":", 1)[1])
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def metrics(self) -> dict[str, float]:
        """The counters."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return {name: float(value) for name, value in re.findall(r"^(\w\S*) (\S+)$", text, re.MULTILINE)}


class Load:
    """Clients that ask, one request after another each, and check every answer."""

    def __init__(self, port: int, good: list[Good], bad: list[Bad]):
        self.port, self.good, self.bad = port, good, bad
        self.seconds: list[float] = []  # of good requests
        self.masks, self.exact, self.rounded = 0, 0, 0
        self.wrong: list[str] = []
        self.kinds: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[int] = collections.Counter()
        self._lock, self._next = threading.Lock(), itertools.count()

    def ask(self, connection: http.client.HTTPConnection, one: Good) -> None:
        """Asks, and checks the answer by its content."""
        began = time.monotonic()
        connection.request("POST", one.path, one.body, {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        seconds = time.monotonic() - began
        with self._lock:
            self.refused[response.status] += 1
        if response.status == 503:  # Note: it is busy; this is an answer, and is counted.
            time.sleep(float(response.headers["retry-after"]) / 10)
            return
        fault = f"status {response.status}: {content[:200]!r}" if response.status != 200 else self._check(one, content)
        with self._lock:
            if fault:
                self.wrong.append(fault)
            self.seconds.append(seconds)
            self.masks += len(one.codes)

    def _check(self, one: Good, content: bytes) -> str:
        """What is wrong with an answer; "" if it is that of this request."""
        if one.path.endswith("/stream"):
            events = [part.split(b"\ndata: ") for part in content.split(b"\n\n") if part]
            if [name for name, _ in events] != [b"event: token"] * len(one.codes[0]) + [b"event: answer"]:
                return f"a stream of {[name for name, _ in events]}"
            told = [json.loads(data)["code"] for _, data in events[:-1]]
            content = events[-1][1]
            if told != json.loads(content)["results"][0]["codes"]:
                return "a stream whose tokens are not those of its answer"
        results = json.loads(content)["results"]
        if len(results) != len(one.codes):
            return f"{len(results)} masks instead of {len(one.codes)}"
        for result, codes, mask in zip(results, one.codes, one.masks):
            if result["codes"] == codes:
                with self._lock:
                    self.exact += 1
                continue
            # Two tokens that are likely alike may change places with the batch's size, by the last bit of a float.
            from alto_jax.data import rle

            got = rle.decode(result["rle"], *mask.shape, "answer")
            union = (got | mask).sum()
            iou = float((got & mask).sum() / union) if union else 1.0
            apart = sum(a != b for a, b in itertools.zip_longest(result["codes"], codes))
            if iou < 0.9 and apart > CODES_APART:
                return f"the answer of another request: {apart} codes differ, IoU {iou:.2f}"
            with self._lock:
                self.rounded += 1
        return ""

    def send(self, one: Bad) -> None:
        """Sends a bad request, and checks what it is told."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            content = b""
            try:
                connection.sendall(one.raw)
            except OSError:
                pass
            try:
                while chunk := connection.recv(65536):
                    content += chunk
            except ConnectionResetError:
                pass
        head, _, body = content.partition(b"\r\n\r\n")
        try:
            status, code = int(head.split()[1]), json.loads(body)["error"]["code"]
        except (IndexError, ValueError, KeyError):
            status, code = 0, f"{content[:80]!r}"
        with self._lock:
            self.kinds[one.name] += 1
            if (status, code) != (one.status, one.code) and status != 503:
                self.wrong.append(f"{one.name}: {status} {code} instead of {one.status} {one.code}")

    def run(self, clients: int, seconds: float, seed: int, bad_share: float) -> None:
        """Keeps so many clients asking for so long."""
        end = time.monotonic() + seconds

        def client(number: int) -> None:
            rng = random.Random(seed * 1000 + number)
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            while time.monotonic() < end:
                try:
                    if rng.random() < bad_share:
                        self.send(self.bad[next(self._next) % len(self.bad)])
                    else:
                        self.ask(connection, rng.choice(self.good))
                except Exception as error:
                    with self._lock:
                        self.wrong.append(f"{type(error).__name__}: {error}")
                    connection.close()
            connection.close()

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def drain(server: Server, good: list[Good], clients: int) -> tuple[int, int, int, float, list[str]]:
    """SIGTERM with a request of every client in flight: (accepted, answered rightly, exit code, seconds, faults)."""
    load = Load(server.port, good, [])
    longest = sorted(good, key=lambda one: -len(one.codes))[:clients]

    def one(index: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        try:
            load.ask(connection, longest[index % len(longest)])
        except Exception as error:
            load.wrong.append(f"{type(error).__name__}: {error}")

    answered = lambda found: sum(v for k, v in found.items() if k.startswith('alto_requests_total{path="/v1/segment'))
    before = answered(server.metrics())
    threads = [threading.Thread(target=one, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    while True:
        found = server.metrics()
        flying = int(found["alto_requests_in_flight"])
        if flying + answered(found) - before >= clients or not any(thread.is_alive() for thread in threads):
            break
        time.sleep(0.002)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    code = server.process.wait(120)
    if code:
        load.wrong.append(f"the service ended with {code} after SIGTERM")
    return flying, load.refused[200] - int(answered(found) - before), code, time.monotonic() - began, load.wrong


def measure(
    options: argparse.Namespace, good: list[Good], flags: tuple[str, ...], seconds: float, bad_share: float
) -> dict:
    """One service under load."""
    server = Server(options.checkpoint, *flags, *options.flags)
    try:
        bad = list(bad_requests(16 << 20, 256, 16, 16, mask_tokens=32))
        Load(server.port, good, bad).run(options.clients, min(15.0, seconds / 4), 1, bad_share)  # after the warm-up
        load, memory, stop = Load(server.port, good, bad), [], threading.Event()

        def watch() -> None:
            while not stop.wait(1.0):
                memory.append(server.metrics()["process_resident_memory_bytes"] / 2**20)

        watcher = threading.Thread(target=watch)
        before, busy, began = server.metrics(), os.getloadavg()[0], time.monotonic()
        watcher.start()
        load.run(options.clients, seconds, 2, bad_share)
        took = time.monotonic() - began
        stop.set()
        watcher.join()
        after = server.metrics()
        change = lambda name: after[name] - before[name]
        drained = drain(server, good, options.clients)
        return {
            "warm-up": server.warm_up, "requests": len(load.seconds), "masks": load.masks, "took": took,
            "wrong": load.wrong, "exact": load.exact, "rounded": load.rounded, "kinds": load.kinds,
            "busy": load.refused[503],
            "latency": np.percentile(load.seconds, [50, 99]), "memory": memory,
            "batch": change("alto_batch_masks_sum") / max(change("alto_batch_masks_count"), 1),
            "model": change("alto_batch_seconds_sum") / took, "cpu": change("process_cpu_seconds_total") / took,
            "compiled": change("alto_programs_compiled"), "load": busy, "drained": drained,
        }  # fmt: skip
    finally:
        server.process.kill()
        if options.verbose:
            print("".join(server.log[-20:]))


def report(options: argparse.Namespace, modes: dict[str, dict], command: str) -> str:
    """The figures as Markdown."""
    import jax

    lines = [
        "# The service under load",
        "",
        f"`{command}`, on {len(os.sched_getaffinity(0))} CPU cores ({platform.machine()}), which the clients use too,",
        f"{datetime.date.today()}, jax {jax.__version__}, {options.checkpoint}. {options.clients} clients; each asks",
        "again as soon as it has its answer. Good requests: one phrase, 2 to 4 phrases, boxes, streams, about",
        f"{PICTURES} pictures of 384 x 384. Each answer is compared with the model's own, asked directly beforehand.",
        "",
        "| | seconds | masks/s | requests/s | p50 | p99 | masks a batch | wrong | memory, first → last quarter |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m in modes.items():
        quarter = max(len(m["memory"]) // 4, 1)
        first, last = np.median(m["memory"][:quarter]), np.median(m["memory"][-quarter:])
        asked = m["requests"] + sum(m["kinds"].values())
        lines.append(
            f"| {name} | {m['took']:.0f} | {m['masks'] / m['took']:.1f} | {m['requests'] / m['took']:.1f} | "
            f"{m['latency'][0]:.2f} s | {m['latency'][1]:.2f} s | {m['batch']:.1f} | {len(m['wrong'])} of {asked} | "
            f"{first:.0f} → {last:.0f} MiB ({last / first - 1:+.1%}) |"
        )
    if {BATCHED, SINGLE, BATCHED_UNSEEN, SINGLE_UNSEEN} <= modes.keys():
        rate = {name: m["masks"] / m["took"] for name, m in modes.items()}
        lines += [
            "",
            f"Batched throughput: **{rate[BATCHED] / rate[SINGLE]:.2f} x** one by one; with every image new, "
            f"**{rate[BATCHED_UNSEEN] / rate[SINGLE_UNSEEN]:.2f} x**;",
            f"batched with images kept against one by one with every image new: "
            f"{rate[BATCHED] / rate[SINGLE_UNSEEN]:.2f} x.",
            "",
        ]
    for name, m in modes.items():
        flying, answered, code, seconds, wrong = m["drained"]
        lines += [
            f"- {name}: {m['exact']} masks had the very codes of the direct call, {m['rounded']} differed by rounding.",
            f"  {sum(m['kinds'].values())} bad requests of {len(m['kinds'])} kinds, each told what it is owed; "
            f"{m['busy']} times busy (503).",
            f"  {m['compiled']:.0f} programs compiled after the warm-up of {m['warm-up']:.0f} s. The model computed "
            f"{m['model']:.0%} of the time;",
            f"  the server took {m['cpu']:.2f} cores; load of the machine before: {m['load']:.1f}.",
            f"  SIGTERM with {flying} requests in flight: {answered} of them answered, rightly, exit code {code} after "
            f"{seconds:.1f} s.",
            *(f"  - {fault}" for fault in [*m["wrong"][:5], *wrong[:5]]),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="alto-tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the mixed load; a third for the others")
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of the service")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/serve.md"))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    good = good_requests(options.checkpoint, seed=0)
    print(
        f"{len(good)} good requests with {sum(len(one.codes) for one in good)} masks are answered directly", flush=True
    )
    third = options.seconds / 3
    modes = {}
    for name, flags, seconds, share in (
        (BATCHED, (), third, 0.0),
        (SINGLE, ONE_BY_ONE, third, 0.0),
        (BATCHED_UNSEEN, ("--cached_images=0",), third, 0.0),
        (SINGLE_UNSEEN, (*ONE_BY_ONE, "--cached_images=0"), third, 0.0),
        (MIXED, (), options.seconds, BAD_SHARE),
    ):
        modes[name] = measure(options, good, flags, seconds, share)
        print(report(options, {name: modes[name]}, ""), flush=True)
    command = " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]])
    text = report(options, modes, command)
    pathlib.Path(options.out).write_text(text)
    faults = [fault for m in modes.values() for fault in m["wrong"] + m["drained"][4]]
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
