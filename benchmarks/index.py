"""What finding lines and files costs: `python -m benchmarks.index [--files 200000] [--lines 200000]`.

In one run, on the same synthetic folder and JSONL file: Python's own lists (a path for each file, two numbers for each
line: what the readers held before), an index found anew, and a kept one. Printed are seconds, and bytes that stay
allocated (tracemalloc; mapped files count as none) for each file or line.
"""

import argparse
from collections.abc import Callable
import json
import os
import pathlib
import shutil
import tempfile
import time
import tracemalloc
from typing import Any

from alto_jax.data.chat_lines import find_lines
from alto_jax.data.index import FileNames


def measure(name: str, count: int, make: Callable[[], Any]) -> None:
    """Prints what making it takes: seconds without, and bytes with, tracemalloc."""
    start = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - start
    del made
    tracemalloc.start()
    made = make()
    now, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del made
    print(f"{name:34s}{seconds:8.3f} s{now / count:9.1f} B each{most / count:9.1f} B at most")


def line_lists(file: pathlib.Path) -> tuple[list[int], list[int]]:
    """Offsets and numbers of the lines of a file, as lists."""
    offsets, numbers, position = [], [], 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                offsets.append(position)
                numbers.append(number)
            position += len(line)
    return offsets, numbers


def anew(make: Callable[[], Any]) -> Callable[[], Any]:
    """`make` with an empty cache folder."""

    def made() -> Any:
        shutil.rmtree(os.environ["ALTO_CACHE"], ignore_errors=True)
        return make()

    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--lines", type=int, default=200_000)
    args = parser.parse_args()
    work = pathlib.Path(tempfile.mkdtemp(prefix="alto_jax_bench_"))
    os.environ["ALTO_CACHE"] = str(work / "cache")
    try:
        root = work / "sa1b"
        for number in range(args.files):
            folder = root / f"sa_{number // 11_000:06d}"
            if number % 11_000 == 0:
                folder.mkdir(parents=True)
            os.close(os.open(folder / f"sa_{11_000_000 - number}.json", os.O_CREAT))
        for folder in (root, *root.iterdir()):
            os.utime(folder, (time.time() - 60,) * 2)
        line = json.dumps(
            {"image": "x" * 30, "mask": "y" * 30, "conversations": [{"from": "human", "value": "z" * 600}]}
        )
        (work / "chat.jsonl").write_text((line + "\n") * args.lines)
        names, lines = lambda: FileNames(root, "sa_", ".json"), lambda: find_lines(work / "chat.jsonl")
        measure("paths of files (as before)", args.files, lambda: sorted(root.rglob("sa_*.json")))
        measure("FileNames, listed", args.files, anew(names))
        measure("FileNames, kept", args.files, names)
        measure("lists of lines (as before)", args.lines, lambda: line_lists(work / "chat.jsonl"))
        measure("records, parsed and kept", args.lines, anew(lines))
        measure("records, of the kept index", args.lines, lines)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
