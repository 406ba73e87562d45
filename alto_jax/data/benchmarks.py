"""The benchmarks by name: what they are called, which files they expect, how they are opened.

`open_benchmark("refcoco_val", root)` gives a source of ReferringRecords (refcoco.py), whatever the format.
"""

from collections.abc import Callable
import dataclasses
import os
import pathlib
from typing import Any, cast

from alto_jax.data import comprehension, files, reason_seg, refcoco, refcoco_m
from alto_jax.data.fingerprint import Fingerprint
from alto_jax.data.open_vocab import OpenVocab
from alto_jax.data.prepared import Prepared
from alto_jax.data.reading import AS_STORED, Reading
from alto_jax.data.sa1b_chats import validation_targets
from alto_jax.data.sa1b_folder import find_folder
from alto_jax.data.scenes import ChatConfig, SceneChats, ScenesConfig
from alto_jax.data.source import Records
from alto_jax.mllm import text


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One column of a table: its family (the table), data set, split, and what is expected on disk."""

    name: str
    family: str
    dataset: str
    split: str
    expects: str


def _referring() -> dict[str, Benchmark]:
    found = {}
    splits = {"refcoco": ("val", "testA", "testB"), "refcoco+": ("val", "testA", "testB"), "refcocog": ("val", "test"),
              "grefcoco": ("val", "testA", "testB")}  # fmt: skip
    for dataset, names in splits.items():
        family = "grefcoco" if dataset == "grefcoco" else "refcoco"
        raw = "grefs(unc).json" if dataset == "grefcoco" else f"refs({'umd' if dataset == 'refcocog' else 'unc'}).p"
        for split in names:
            name = f"{dataset}_{split}"
            expects = f"{dataset}/{raw} + {dataset}/instances.json, or {refcoco.psalm_files(dataset, split)[0]}"
            found[name] = Benchmark(name, family, dataset, split, f"{expects}; COCO train2014 images")
    for part in ("part_only", "object_part"):
        for split in ("val", "testA", "testB"):
            name = f"refcocom_{split}_{part}"
            expects = f"refcocom/annotations/{split}_{part}.json, refcocom/masks/*.png; COCO train2014 images"
            found[name] = Benchmark(name, "refcocom", "refcocom", f"{split}_{part}", expects)
    return found


def _others() -> dict[str, Benchmark]:
    built = "open_vocab/{0}.jsonl (python -m alto_jax.data.open_vocab makes it)"
    found = {name: Benchmark(name, "open_vocab", name, "val", built.format(name)) for name in ("a150", "pc59", "pas20")}
    for split in ("random", "popular", "adversarial"):
        expects = f"pope/coco_pope_{split}.json; COCO val2014 images"
        found[f"pope_{split}"] = Benchmark(f"pope_{split}", "pope", "pope", split, expects)
    expects = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json, vqav2/v2_mscoco_val2014_annotations.json; COCO val2014"
    found["vqav2_val"] = Benchmark("vqav2_val", "vqav2", "vqav2", "val", expects)
    found["mme"] = Benchmark(
        "mme",
        "mme",
        "mme",
        "test",
        "mme/{category}/*.txt with its image beside it, or as published: "
        "mme/MME_Benchmark_release_version/{category}/images, questions_answers_YN",
    )
    name, expects = "multi_target_sa1b_val", "sa1b/ with sa_*.json beside sa_*.jpg, in folders of any depth"
    found[name] = Benchmark(
        name, "multi_target_sa1b", "sa1b", "val", f"{expects}; those of the validation list are read"
    )
    for split in ("val", "test"):
        expects = f"{reason_seg.FOLDERS[1]}/{split}/*.json with *.jpg beside"
        found[f"reasonseg_{split}"] = Benchmark(f"reasonseg_{split}", "reasonseg", "reasonseg", split, expects)
    expects = f"{refcoco_m.FOLDERS[0]}/validation-*.parquet; COCO train2014 images"
    found["refcoco-m_val"] = Benchmark("refcoco-m_val", "refcoco-m", "refcoco-m", "val", expects)
    for name, one in _referring().items():
        if one.dataset in comprehension.DATASETS:
            found[f"rec_{name}"] = Benchmark(f"rec_{name}", "rec", one.dataset, one.split, one.expects)
    expects = "mask_perception/mask_perception.json with its masks beside; COCO train2014 images"
    found["mask_perception"] = Benchmark("mask_perception", "mask_perception", "mask_perception", "test", expects)
    found["scenes"] = Benchmark("scenes", "scenes", "scenes", "validation", "nothing: the built-in held-out shapes")
    return found


BENCHMARKS: dict[str, Benchmark] = _referring() | _others()


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name; ValueError lists them all."""
    if name not in BENCHMARKS:
        raise ValueError(f"--benchmark: unknown {name!r}; expected all, or some of {', '.join(BENCHMARKS)}, or "
                         "tokenizer_NAME with such a name or sa1b")  # fmt: skip
    return BENCHMARKS[name]


def open_benchmark(
    name: str,
    root: str | os.PathLike,
    *,
    protocol: refcoco.Protocol = "joined",
    images: str | os.PathLike | None = None,
    reading: Reading = AS_STORED,
) -> Records:
    """A source of ReferringRecords.

    Args:
      name: one of BENCHMARKS with masks.
      root: the data folder, or a data set that `alto_jax.data.prepare` wrote of this benchmark and protocol.
      protocol: see refcoco.py; open-vocabulary sets have one phrase a sample, whatever it is.
      images: folder of the COCO images, if it is not one of coco.IMAGE_FOLDERS below `root`.
      reading: of images (EXIF) and mask files; a prepared data set was read when it was made.

    Raises:
      ValueError: unknown name, or files that are missing: the message says what was expected where.
    """
    found, root = benchmark(name), pathlib.Path(root)
    if (root / "manifest.json").is_file():
        return Prepared(root, expect=f"{name}.{protocol}")
    if not root.is_dir():
        raise ValueError(f"--data: {root} does not exist; {name} expects there: {found.expects}")
    if found.family not in _OPENERS:
        raise ValueError(f"--benchmark: {name} has no masks")
    return _OPENERS[found.family](found, root, protocol, images, reading)


class SceneReferring:
    """The built-in held-out scenes as ReferringRecords."""

    no_target = False

    def __init__(self, count: int, image_size: int = 128):
        config = ScenesConfig(image_size=image_size, num_scenes=count, split="validation")
        self._chats = SceneChats(config, ChatConfig(adaptive_only=True))
        self._config = config

    def __len__(self) -> int:
        return len(self._chats)

    def fingerprint(self) -> str:
        """What the samples are, see fingerprint.py."""
        found = Fingerprint()
        found.values(self._config)
        return str(found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._chats[index]
        phrase = text.find_reference(record["conversations"][0]["value"])
        assert phrase is not None  # Note: with adaptive_only every record asks for a mask.
        phrase = phrase.removeprefix(text.REF).removesuffix(text.REF_END)
        shared = {name: record[name] for name in ("key", "image", "image_name")}
        return shared | {"mask": record["masks"][0], "phrase": phrase}


TRAINING = ("refcoco", "refcoco+", "refcocog", "grefcoco", "reasonseg")  # Data sets with a training split.


def train_split(
    dataset: str,
    root: str | os.PathLike,
    *,
    protocol: refcoco.Protocol = "per_sentence",
    images: Any = None,
    reading: Reading = AS_STORED,
) -> refcoco.Referring:
    """The training split of refcoco, refcoco+, refcocog, grefcoco (PSALM-converted or as published) or reasonseg."""
    found = Benchmark(dataset, dataset, dataset, "train", "")
    return _open_referring(found, pathlib.Path(root), protocol, images, reading)


def _open_referring(
    found: Benchmark, root: pathlib.Path, protocol: Any, images: Any, reading: Reading
) -> refcoco.Referring:
    if found.dataset == "reasonseg":
        return reason_seg.open_reason_seg(root, found.split, protocol=protocol, reading=reading)
    general = found.dataset == "grefcoco"
    converted = [root / file for file in refcoco.psalm_files(found.dataset, found.split) if (root / file).is_file()]
    if converted:
        name = f"{found.dataset}/{found.split}"
        return refcoco.open_psalm(converted[0], name, root=root, images=images, protocol=protocol, no_target=general,
                                  reading=reading)  # fmt: skip
    dataset = cast(refcoco.Dataset, found.dataset)
    return refcoco.open_refer(root, dataset, found.split, images=images, protocol=protocol, reading=reading)


def _open_refcocom(
    found: Benchmark, root: pathlib.Path, protocol: Any, images: Any, reading: Reading
) -> refcoco.Referring:
    return refcoco.open_refcocom(root, found.split, images=images, protocol=protocol, reading=reading)


def _open_vocab(found: Benchmark, root: pathlib.Path, protocol: Any, images: Any, reading: Reading) -> Records:
    file = files.find(root, (f"open_vocab/{found.name}.jsonl", f"{found.name}.jsonl"), found.name)
    return OpenVocab(file, reading=reading)


def _open_refcoco_m(
    found: Benchmark, root: pathlib.Path, protocol: Any, images: Any, reading: Reading
) -> refcoco.Referring:
    return refcoco_m.open_refcoco_m(root, images=images, protocol=protocol, reading=reading)


def open_boxes(
    name: str, root: str | os.PathLike, *, images: str | os.PathLike | None = None, reading: Reading = AS_STORED
) -> comprehension.BoxQuestions:
    """The questions of a benchmark of referring comprehension ("rec_refcoco_val"); arguments as `open_benchmark`."""
    found, root = benchmark(name), pathlib.Path(root)
    if not root.is_dir():
        raise ValueError(f"--data: {root} does not exist; {name} expects there: {found.expects}")
    source = _open_referring(found, root, "per_sentence", images, reading)
    return comprehension.BoxQuestions(comprehension.Comprehension(source), f"{found.dataset}_{found.split}")


def _open_sa1b(found: Benchmark, root: pathlib.Path, protocol: Any, images: Any, reading: Reading) -> Records:
    return validation_targets(find_folder(root), reading=reading)


_OPENERS: dict[str, Callable[..., Records]] = {
    "refcoco": _open_referring,
    "grefcoco": _open_referring,
    "reasonseg": _open_referring,
    "refcoco-m": _open_refcoco_m,
    "refcocom": _open_refcocom,
    "open_vocab": _open_vocab,
    "multi_target_sa1b": _open_sa1b,
}
MASK_FAMILIES = tuple(_OPENERS)
