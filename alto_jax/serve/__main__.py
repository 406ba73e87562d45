"""The HTTP service.

    python -m alto_jax.serve [--checkpoint alto-tiny] [--host 127.0.0.1] [--port 8000]

Needs `pip install 'alto_jax[serve]'`. Answers POST /v1/segment; see docs/serve.md. SIGTERM lets it finish what it has
accepted, and end with 0.
"""

import argparse
import dataclasses
import ipaddress
import logging
import os
import re
import socket
import sys

from alto_jax import cli
from alto_jax.config import ConfigError
from alto_jax.serve.limits import Limits, read_keys


def parse_ascending(option: str, text: str, example: str, step: int = 1) -> tuple[int, ...]:
    """The value of a flag that lists ascending multiples of `step`, as in "1,4,16".

    Raises:
      ConfigError: something else.
    """
    if re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        values = tuple(int(part) for part in text.split(","))
        if values[0] > 0 and values == tuple(sorted(set(values))) and not any(value % step for value in values):
            return values
    of = f"multiples of {step}" if step > 1 else "numbers"
    raise ConfigError(f"{option}={text}: expected ascending {of} above 0, such as {example}")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
      ConfigError: the host is not known, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(found[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
    except OSError as error:
        raise ConfigError(f"--host={host} --port={port}: {error}") from error
    return listener


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m alto_jax.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="alto-tiny", metavar="DIR", help="a run's directory (stage 2 or 3)")
    parser.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
    parser.add_argument("--name", help="of the model, in answers (default: the checkpoint's last part)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--batch_sizes", default="1,4,16", help="programs are compiled for these; 1: one by one")
    parser.add_argument(
        "--question_buckets",
        default="40,64,128",
        help="tokens that questions are padded to; programs are compiled for these, the last is the most",
    )
    parser.add_argument("--window_ms", type=float, default=5.0, metavar="MS", help="that a mask waits for company")
    parser.add_argument("--batches_at_once", type=int, metavar="N",
                        help="that are computed at the same time (default: 2 on a CPU, else 1)")  # fmt: skip
    parser.add_argument("--cached_images", type=int, default=64, metavar="N", help="that stay encoded")
    parser.add_argument("--threads", type=int, metavar="N", help="that decode images (default: processors, at most 4)")
    parser.add_argument("--api_key_file", metavar="FILE", help="keys, one a line (default: ALTO_API_KEY, or none)")
    parser.add_argument("--cors_origin", action="append", default=[], metavar="ORIGIN",
                        help="browsers may ask from there; may be repeated (default: none)")  # fmt: skip
    parser.add_argument("--access_log", action="store_true", help="a line for each request")
    for field in dataclasses.fields(Limits):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, metavar="N",
                            help=f"{field.metadata['help']} (default: %(default)s)")  # fmt: skip
    options = parser.parse_args()
    limits = Limits(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Limits)})
    sizes = parse_ascending("--batch_sizes", options.batch_sizes, "1,4,16")
    if sizes[0] != 1:
        raise ConfigError(f"--batch_sizes={options.batch_sizes}: expected 1 as the first")
    widths = parse_ascending("--question_buckets", options.question_buckets, "40,64,128", step=8)
    keys = read_keys(options.api_key_file)
    if not 0 <= options.port < 65536:
        raise ConfigError(f"--port={options.port}: expected 0..65535")
    if not 0 <= options.window_ms <= 10_000:
        raise ConfigError(f"--window_ms={options.window_ms}: expected 0..10000")
    if not 0 <= options.cached_images <= 1 << 16:
        raise ConfigError(f"--cached_images={options.cached_images}: expected 0..65536")
    if options.batches_at_once is not None and not 1 <= options.batches_at_once <= 16:
        raise ConfigError(f"--batches_at_once={options.batches_at_once}: expected 1..16")
    if options.threads is not None and not 1 <= options.threads <= 256:
        raise ConfigError(f"--threads={options.threads}: expected 1..256")
    with listen(options.host, options.port) as listener:
        return _serve(options, limits, (sizes, widths), keys, listener)


def _serve(
    options: argparse.Namespace,
    limits: Limits,
    programs: tuple[tuple[int, ...], tuple[int, ...]],
    keys: tuple[bytes, ...],
    listener: socket.socket,
) -> int:
    """Loads, listens, compiles, answers, until a signal."""
    try:
        from alto_jax.serve.app import Service  # late: --help needs no JAX
        from alto_jax.serve.server import Server
    except ImportError as error:
        raise ConfigError(f"the service needs FastAPI: pip install 'alto_jax[serve]' ({error})") from error
    from alto_jax.inference import segmenter  # late: as above
    from alto_jax.parallel.at_once import batches_at_once
    from alto_jax.serve.batcher import Batcher
    from alto_jax.serve.engine import Engine

    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("alto_jax.serve").setLevel(logging.INFO)
    model = segmenter.load(options.checkpoint, options.step)
    if not isinstance(model, segmenter.Segmenter):
        raise ConfigError(f"--checkpoint={options.checkpoint}: a mask tokenizer alone; expected a run of stage 2 or 3")
    engine = Engine(model, *programs, options.cached_images)
    at_once = options.batches_at_once or batches_at_once(2)
    batcher = Batcher(engine, limits.max_queue, options.window_ms / 1000, at_once)
    host, port = listener.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def on_state(state: str) -> None:
        if state == "ready":
            cli.tell(f"ready at {where}")
        else:
            server.should_exit = True

    name = options.name or os.path.basename(os.path.normpath(options.checkpoint))
    service = Service(batcher, name, limits, keys=keys, cors=tuple(options.cors_origin), threads=options.threads,
                      on_state=on_state)  # fmt: skip
    server = Server(service.app, service.guard, limits, access_log=options.access_log)
    cli.tell(f"{name} at {where}: compiling; /readyz tells when it takes requests")
    if not keys and not ipaddress.ip_address(host).is_loopback:
        cli.tell("note: no API key is set, and the host can be reached from other machines")
    server.run(sockets=[listener])
    if batcher.failure:
        cli.tell(f"error: {batcher.failure}")
    if server.lost:
        cli.tell(f"error: --drain_seconds={limits.drain_seconds:g} were over, {server.lost} requests were not answered")
    code = 1 if server.lost else 2 if batcher.failure else 0
    if batcher.is_alive:  # Note: it compiles; a thread can't be ended, and would keep the process.
        sys.stderr.flush()
        os._exit(code)
    return code


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
