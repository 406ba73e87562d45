"""Seconds of the device, kept beside the results over restarts: at the run's batch, and one sample at a time.

A timing file is JSONL: a header (device, batch size, and a hash of the results' header), then a line a device call. It
is begun anew with another device or other results, and forgets the calls whose results were lost.
"""

from collections.abc import Mapping
import hashlib
import json
import pathlib
from typing import Any

from alto_jax.config import naming, write_whole


class TimingFile:
    """The times of one benchmark, in `NAME.timing.jsonl` beside `NAME.jsonl`."""

    def __init__(self, results: pathlib.Path, header: Mapping[str, Any], device: str, *, done: int):
        """Opens the file.

        Args:
          results: the result file; header: its header.
          device: what computes now.
          done: samples that are in the result file.
        """
        self._path = timing_path(results)
        identity = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode()).hexdigest()[:16]
        self._header = {"device": device, "batch_size": header["batch_size"], "results": identity}
        old, lines = read_timing(self._path)
        kept = [line for line in lines if line["start"] < done] if old == self._header else []
        text = "".join(json.dumps(line) + "\n" for line in [self._header, *kept])
        # Note: a line that a kill has cut short would swallow the next one.
        if not self._path.exists() or self._path.read_text() != text:
            write_whole(self._path, text)
        self._singles = {line["start"] for line in kept if line["samples"] == 1 and line.get("single")}

    def has_single(self, index: int) -> bool:
        """Whether a sample was timed by itself."""
        return index in self._singles

    def add(self, start: int, samples: int, tokens: float, seconds: float, *, single: bool = False) -> None:
        """Adds a call: its first sample, how many samples and tokens it had, and the device's seconds.

        `single`: each device had this one sample.
        """
        line = {"start": start, "samples": samples, "tokens": tokens, "seconds": round(seconds, 6), "single": single}
        with naming(self._path), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def timing_path(results: pathlib.Path) -> pathlib.Path:
    """The timing file of a result file."""
    return results.with_name(results.name.removesuffix(".jsonl") + ".timing.jsonl")


def read_timing(path: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and lines of a timing file; {} and [] if there is none that can be used."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut short by a kill
            continue
    if not found or "device" not in found[0]:
        return {}, []
    return found[0], [line for line in found[1:] if "start" in line and "seconds" in line]


def summarise_timing(path: pathlib.Path) -> dict[str, Any]:
    """What timing.json says of a benchmark: {"device", "batch_size", "batch": times, "single": times or None}.

    Times are {"samples", "seconds_per_sample", "tokens_per_second"}: of the run's batches (seconds of the call over its
    samples), and of samples one at a time (seconds from request to answer).
    """
    header, lines = read_timing(path)
    if not header:
        return {}
    found = {"device": header["device"], "batch_size": header["batch_size"]}
    for name in ("batch", "single"):
        mine = [line for line in lines if line.get("single", False) == (name == "single")]
        seconds, samples = sum(line["seconds"] for line in mine), sum(line["samples"] for line in mine)
        tokens = sum(line["tokens"] for line in mine)
        found[name] = {
            "samples": samples,
            "seconds_per_sample": seconds / samples,
            "tokens_per_second": tokens / seconds if tokens else None,
        } if samples and seconds else None  # fmt: skip
    return found
