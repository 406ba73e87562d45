"""Damaged images, masks, segmentations, EXIF blocks and annotation files through the project's readers.

    python -m tests.fuzz_readers [--count 20000] [--seed 0] [--only KIND,…] [--keep DIR]

Each case takes a good input, damages it by a function of (seed, case) (tests/fuzz_inputs.py), and reads it as training,
evaluation and `prepare --check` do. It passes if the reader gives arrays of the documented types, or one ValueError
on one line. The cases run in a process of their own; a case that ends it (or takes longer than a minute) is named, as
is peak memory of 2 GiB or more. Exit code 1 if anything failed. --keep writes the inputs of cases that failed.
"""

import argparse
from collections import Counter
import faulthandler
import io
import json
import logging
import pathlib
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

import numpy as np
from PIL import Image, features
import pyarrow
from pyarrow import parquet

from alto_jax.data import bad_data, images, masks, rle
from alto_jax.data.comprehension import BoxQuestions, Comprehension
from alto_jax.data.conversations import Conversations
from alto_jax.data.mask_perception import open_mask_perception
from alto_jax.data.open_vocab import OpenVocab
from alto_jax.data.reading import EXIF, Reading
from alto_jax.data.reason_seg import open_reason_seg
from alto_jax.data.refcoco import open_psalm, open_refcocom, open_refer
from alto_jax.data.refcoco_m import open_refcoco_m
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.data.sa1b_chats import Sa1bTargets
from tests.fuzz_inputs import (
    FORMATS,
    HEIGHT,
    WIDTH,
    box,
    counts_of,
    damage,
    encode,
    exif_block,
    polygons_of,
    twist,
    write_json,
)  # fmt: skip

MEMORY = 2 * 2**30  # bytes at peak
SECONDS = 60  # a case
NAMES = (  # one of them stands in every message
    "input", "entry", "a.jpg", "m.png", "chat.jsonl", "odd.json", "sa_1", "refs(unc)", "instances.json", "psalm.json",
    "val_part_only", "open.jsonl", "files/sa:", "q_1.json", "validation-0", "mask_perception.json",
)  # fmt: skip
LARGE_EVERY = 1000  # cases; one of them reads a file of nearly MAX_PIXELS
RULES = ("auto", "auto", "nonzero", ">127", "equals:1,5", "ignore:255", "alpha", "colour:ff0000")


class Cases:
    """Good inputs in a folder, and the cases that damage and read them."""

    def __init__(self, folder: pathlib.Path):
        self.folder, rng = folder, np.random.default_rng(0)
        self.formats = {n: m for n, m in FORMATS.items() if n != "AVIF" or features.check("avif")}
        self.good = {
            (n, m, k): encode(rng, n, m, k) for n, ms in self.formats.items() for m in ms for k in (False, True)
        }
        for place in (
            "images",
            "data/refcoco",
            "data/grefcoco",
            "data/refcocom/annotations",
            "data/refcocom/masks",
            "data/ReasonSeg/val",
            "data/refcoco-m/data",
            "data/mask_perception",
            "sa",
        ):
            (folder / place).mkdir(parents=True)
        for name in ("images/a.jpg", "sa/sa_1.jpg", "data/ReasonSeg/val/q_1.jpg"):
            Image.new("RGB", (WIDTH, HEIGHT), (90, 30, 30)).save(folder / name, quality=90)
        for name in ("images/m.png", "data/refcocom/masks/7.png", "data/mask_perception/m.png"):
            Image.fromarray(box()).save(folder / name)
        self.segmentation = {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT - 480, 480]}
        turns = [{"from": "human", "value": "<image>\nSegment <ref>it</ref>."}, {"from": "gpt", "value": "No"}]
        self.line = {"image": "images/a.jpg", "mask": ["images/m.png"], "conversations": turns}
        (folder / "meta.json").write_text(json.dumps({"x": {"root": ".", "annotation": "chat.jsonl"}}))
        self.kinds = [name.removeprefix("case_") for name in dir(self) if name.startswith("case_")]

    def run(self, kind: str, rng: np.random.Generator) -> str:
        """Runs a case: "read" or "refused"; AssertionError and all that readers must not raise come through."""
        try:
            getattr(self, kind if kind == "large" else f"case_{kind}")(rng)
        except ValueError as error:
            assert not isinstance(error, UnicodeError), f"a bare {error!r}"
            message = str(error).replace("a\nb", "")  # a name of the inputs
            assert "\n" not in message and any(name in message for name in NAMES), f"names nothing: {error!r}"
            assert bad_data.kind_of(error) in bad_data.KINDS, f"no kind: {error!r}"
            return "refused"
        return "read"

    def _image(self, rng: np.random.Generator, is_mask: bool, name: str = "input") -> pathlib.Path:
        keys = [key for key in self.good if key[2] == is_mask]
        data = self.good[keys[int(rng.integers(len(keys)))]]
        path = self.folder / "images" / name
        path.write_bytes(damage(rng, data))
        return path

    def case_image(self, rng: np.random.Generator) -> None:
        """A damaged image file, in each frame."""
        photo = Reading(exif=EXIF[int(rng.integers(3))]).photo(self._image(rng, False))
        assert photo.image.dtype == np.uint8 and photo.image.ndim == 3 and photo.image.shape[2] == 3

    def case_upright(self, rng: np.random.Generator) -> None:
        """A damaged image file as `predict` reads it."""
        assert images.as_array(self._image(rng, False)).dtype == np.uint8

    def case_mask(self, rng: np.random.Generator) -> None:
        """A damaged mask file, by a rule, beside a good image."""
        reading = Reading(EXIF[int(rng.integers(3))], RULES[int(rng.integers(len(RULES)))])
        path = self._image(rng, True)
        if rng.random() < 0.5:
            mask = masks.open_mask(path, reading.mask_rule)
        else:
            mask = reading.photo(self.folder / "images" / "a.jpg").mask(path)
        assert mask.dtype == np.uint8 and mask.ndim == 2 and set(np.unique(mask)) <= {0, 255} and mask.any()

    def case_labels(self, rng: np.random.Generator) -> None:
        """A damaged label map."""
        assert images.open_labels(self._image(rng, True)).dtype == np.int32

    def case_exif(self, rng: np.random.Generator) -> None:
        """A good image with an EXIF block of nonsense: its pixels can be read in any case."""
        name = str(rng.choice(["JPEG", "PNG", "WEBP"]))
        buffer = io.BytesIO()
        Image.new("RGB", (WIDTH, HEIGHT)).save(buffer, name, exif=b"Exif\0\0" + exif_block(rng))
        path = self.folder / "images" / "input"
        path.write_bytes(buffer.getvalue())
        stored = Reading().photo(path)
        assert stored.image.shape == (HEIGHT, WIDTH, 3) and 1 <= stored.orientation <= 8
        assert images.as_array(path).size == stored.image.size

    def case_runs(self, rng: np.random.Generator) -> None:
        """Damaged run lengths."""
        code = {"size": [HEIGHT, WIDTH], "counts": counts_of(rng)}
        code = code if rng.random() < 0.7 else twist(rng, code)
        assert rle.decode(code, HEIGHT, WIDTH, "entry").shape == (HEIGHT, WIDTH)

    def case_polygons(self, rng: np.random.Generator) -> None:
        """Polygons with wild coordinates."""
        assert rle.decode(polygons_of(rng), HEIGHT, WIDTH, "entry").shape == (HEIGHT, WIDTH)

    def case_conversations(self, rng: np.random.Generator) -> None:
        """A damaged line of a JSONL, and now and then of its meta file."""
        write_json(rng, self.folder / "chat.jsonl", self.line, lines=True)
        meta = self.folder / "meta.json"
        if rng.random() < 0.2:
            meta = self.folder / "odd.json"
            write_json(
                rng, meta, {"x": {"root": ".", "annotation": "chat.jsonl", "repeat_time": 1, "mask_rule": "auto"}}
            )
        source = Conversations(meta)
        list(source.texts())
        self._read(source)

    def case_sa1b(self, rng: np.random.Generator) -> None:
        """A damaged annotation file of SA-1B."""
        info = {"image_id": 1, "height": HEIGHT, "width": WIDTH, "file_name": "sa_1.jpg"}
        segmentation = self.segmentation if rng.random() < 0.5 else {**self.segmentation, "counts": counts_of(rng)}
        annotation = {"area": 480, "segmentation": segmentation}
        write_json(rng, self.folder / "sa" / "sa_1.json", {"image": info, "annotations": [annotation] * 2})
        make = Sa1bMasks if rng.random() < 0.5 else Sa1bTargets
        source = make(self.folder / "sa", train=bool(rng.random() < 0.5))
        for error in source.problems(0):
            assert isinstance(error, ValueError)
        self._read(source)

    def case_refer(self, rng: np.random.Generator) -> None:
        """Damaged files of RefCOCO and gRefCOCO."""
        root, general = self.folder / "data", bool(rng.random() < 0.5)
        dataset = "grefcoco" if general else "refcoco"
        segmentation = polygons_of(rng) if rng.random() < 0.3 else self.segmentation
        image = {"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}
        annotation = {"id": 7, "image_id": 1, "iscrowd": 0, "segmentation": segmentation, "bbox": [2, 3, 9.5, 8]}
        instances = {"images": [image], "annotations": [annotation]}
        sentences = [{"sent": "it", "raw": "it", "tokens": ["it"], "sent_id": 1}]
        refs = [{"ref_id": 1, "image_id": 1, "ann_id": [7] if general else 7, "split": "val", "sentences": sentences}]
        which = int(rng.integers(3))
        if which == 0:
            write_json(rng, root / dataset / "instances.json", instances)
        else:
            (root / dataset / "instances.json").write_text(json.dumps(instances))
        refs = twist(rng, refs) if which == 1 else refs
        data = json.dumps(refs).encode() if general else pickle.dumps(refs, protocol=2)
        data = damage(rng, data) if which == 2 else data
        (root / dataset / ("grefs(unc).json" if general else "refs(unc).p")).write_bytes(data)
        protocol = "joined" if rng.random() < 0.5 else "per_sentence"
        source = open_refer(root, dataset, "val", images=self.folder / "images", protocol=protocol)
        self._read(source)
        if not general and protocol == "per_sentence":
            assert all(0 <= c <= 1.1 for c in BoxQuestions(Comprehension(source), "it")[0]["label"])

    def case_psalm(self, rng: np.random.Generator) -> None:
        """A damaged PSALM-converted JSON."""
        info = {"file_name": "a.jpg", "height": HEIGHT, "width": WIDTH, "id": 1}
        anns = [{"segmentation": self.segmentation, "iscrowd": 0}]
        entry = {"image_info": info, "new_img_id": 1, "instruction": [{"sent": "it"}], "anns": anns}
        write_json(rng, self.folder / "psalm.json", [entry])
        self._read(open_psalm(self.folder / "psalm.json", "x/val", root=self.folder, images=self.folder / "images"))

    def case_parts(self, rng: np.random.Generator) -> None:
        """A damaged annotation file of RefCOCOm."""
        entry = {"img_name": "a.jpg", "segment_id": "7", "sentences": ["it"]}
        write_json(rng, self.folder / "data" / "refcocom" / "annotations" / "val_part_only.json", [entry])
        self._read(open_refcocom(self.folder / "data", "val_part_only", images=self.folder / "images"))

    def case_reason_seg(self, rng: np.random.Generator) -> None:
        """A damaged annotation file of ReasonSeg."""
        shapes = [{"label": label, "points": [[2, 3], [20.5, 4], [9, 20]]} for label in ("target", "ignore", "flag")]
        content = {"text": ["what is it?"], "is_sentence": True, "shapes": shapes[: 1 + int(rng.integers(3))]}
        write_json(rng, self.folder / "data" / "ReasonSeg" / "val" / "q_1.json", content)
        self._read(open_reason_seg(self.folder / "data", "val"))

    def case_refcoco_m(self, rng: np.random.Generator) -> None:
        """A damaged Parquet file of RefCOCO-M, or a whole one with a damaged mask."""
        mask = rle.encode(box() > 0) if rng.random() < 0.5 else {"size": [HEIGHT, WIDTH], "counts": "1&x"}
        samples = [{"id": 1, "sentences": ["it"], "mask": mask}]
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist([{"file_name": "a.jpg", "samples": samples}]), buffer)
        data = damage(rng, buffer.getvalue()) if rng.random() < 0.5 else buffer.getvalue()
        (self.folder / "data" / "refcoco-m" / "data" / "validation-0.parquet").write_bytes(data)
        self._read(open_refcoco_m(self.folder / "data", images=self.folder / "images"))

    def case_mask_perception(self, rng: np.random.Generator) -> None:
        """A damaged list of questions about masks."""
        asked = "What is <|mt_start|><|mt_3|><|mt_end|>? A. a cat B. a dog"
        entry = {"image": "x/a.jpg", "mask": "m.png", "question": asked, "answer": "A. a cat"}
        write_json(rng, self.folder / "data" / "mask_perception" / "mask_perception.json", [entry])
        self._read(open_mask_perception(self.folder / "data", self.folder / "images"))

    def case_open_vocab(self, rng: np.random.Generator) -> None:
        """A damaged line of an open-vocabulary set."""
        line = {"image": "images/a.jpg", "mask": "images/m.png", "ignore": "images/m.png", "description": ["it"]}
        write_json(rng, self.folder / "open.jsonl", line, lines=True)
        self._read(OpenVocab(self.folder / "open.jsonl"))

    def large(self, rng: np.random.Generator) -> None:
        """A good file of nearly as many pixels as may be read: memory is measured, not only damage."""
        mode = str(rng.choice(["RGB", "RGBA", "L", "P", "I;16", "LA"]))
        path, side = self.folder / "images" / "input", int(images.MAX_PIXELS**0.5)
        image = Image.new(mode, (side, side))
        image.paste(1 if mode in ("L", "P", "I;16") else (255,) * len(mode), (100, 100, 900, 500))
        image.save(path, "PNG", compress_level=1)
        del image
        if rng.random() < 0.5:
            assert Reading("upright").photo(path).image.shape == (side, side, 3)
        else:
            assert masks.open_mask(path, "nonzero").shape == (side, side)

    def _read(self, source: Any) -> None:
        """Every record, as training and evaluation do; the last refusal is raised."""
        refused = None
        for index in range(min(len(source), 3)):
            try:
                record = source[index]
            except ValueError as error:
                refused = error
                continue
            image, found = record["image"], record["masks"] if "masks" in record else [record["mask"]]
            assert image is None or (image.dtype == np.uint8 and image.ndim == 3)
            assert all(mask.dtype == np.uint8 and mask.shape == image.shape[:2] for mask in found)
        if refused is not None:
            raise refused


def run_cases(
    count: int, seed: int, only: list[str], folder: pathlib.Path, keep: pathlib.Path | None
) -> dict[str, Any]:
    """Runs the cases in this process; the number of the running one stands in `folder`/now."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_DATA, (2 * MEMORY, 2 * MEMORY))
    logging.disable(logging.CRITICAL)
    cases = Cases(folder / "files")
    kinds = only or cases.kinds
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    peak, peak_case = 0, ""
    with open(folder / "now", "wb", buffering=0) as now:
        for number in range(count):
            kind = "large" if number % LARGE_EVERY == LARGE_EVERY - 1 else kinds[number % len(kinds)]
            now.seek(0)
            now.write(f"case {number} ({kind}) ".encode())
            signal.alarm(SECONDS)  # Note: its default action ends the process, wherever it hangs.
            try:
                outcome = cases.run(kind, np.random.default_rng((seed, number)))
            except Exception:
                outcome = "failed"
                failures.append(f"case {number} ({kind}): {traceback.format_exc()}")
                if keep is not None:
                    shutil.copytree(cases.folder, keep / str(number), dirs_exist_ok=True)
            outcomes[f"{kind} {outcome}"] += 1
            if (now_peak := peak_memory()) > peak:
                peak, peak_case = now_peak, f"case {number} ({kind})"
    signal.alarm(0)
    found = {"outcomes": dict(sorted(outcomes.items())), "failures": failures}
    return found | {"peak_bytes": peak, "peak_case": peak_case}


def peak_memory() -> int:
    """Most bytes that this process held; getrusage begins with the peak of the process that started it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def fuzz(count: int, seed: int, only: list[str], keep: pathlib.Path | None = None) -> dict[str, Any]:
    """Runs the cases in a process of their own, which may not take more than twice the memory allowed.

    Returns:
      {"outcomes": number of each "kind outcome", "failures": texts, "peak_bytes"}.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.fuzz_readers", "--count", str(count), "--seed", str(seed)]
        command += ["--only", ",".join(only), "--child", folder, *(["--keep", str(keep)] if keep else [])]
        root = pathlib.Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            now = pathlib.Path(folder) / "now"
            place = now.read_text() if now.exists() else "the start"
            message = f"the process ended with {done.returncode} in {place}: {done.stderr[-3000:]}"
            return {"outcomes": {}, "failures": [message], "peak_bytes": 0}
        found = json.loads(done.stdout.splitlines()[-1])
    if found["peak_bytes"] >= MEMORY:
        peak = f"{found['peak_bytes'] / 2**30:.2f} GiB in {found['peak_case']}"
        found["failures"].append(f"peak memory {peak}, allowed is {MEMORY / 2**30:.0f}")
    return found


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_readers", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="KINDS")
    parser.add_argument("--keep", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    only = [kind for kind in options.only.split(",") if kind]
    if options.child is not None:
        print(json.dumps(run_cases(options.count, options.seed, only, options.child, options.keep)))
        return 0
    began = time.monotonic()
    found = fuzz(options.count, options.seed, only, options.keep)
    for text in found["failures"][:20]:
        print(text)
    for outcome, number in found["outcomes"].items():
        print(f"{outcome:24s}{number:7d}")
    seconds, peak = time.monotonic() - began, found["peak_bytes"] / 2**30
    print(f"{options.count} cases, {len(found['failures'])} failures, peak {peak:.2f} GiB, {seconds:.0f} s")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
