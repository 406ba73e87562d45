"""What the paper's recipe reads: every data set with its files, numbers, origin and licence, as far as they are known.

The numbers are those that publishers and catalogues state; None is a number that no source at hand states. Sources:
  TFDS      README of tensorflow_datasets' `ref_coco` (referents and images by split), catalogue of `segment_anything`
  FlagEval  flageval.baai.ac.cn, "RefCOCO, RefCOCO+, RefCOCOg" (expressions of RefCOCO by split)
  LISA      README of dvlab-research/LISA (images of ReasonSeg)
  VQAv2     evalscope's page of VQAv2 (questions of val); COCO 2014: 82,783 and 40,504 images (cocodataset.org)
  POPE      VLMEvalKit's leaderboard: 8,910 in the three files, of which `random` lacks 90
  MME       2,374 questions in 14 categories (VLMEvalKit and others who scored all of it)
  cards     Hugging Face cards of moondream/refcoco-m and yayafengzi/Mask_Perception
"""

from collections.abc import Mapping
import dataclasses

from alto_jax.data import mask_perception, refcoco_m
from alto_jax.data.reason_seg import FOLDERS

Counts = Mapping[str, int]
_COCO_TERMS = "annotations CC BY 4.0; images: Flickr's terms"


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set of the recipe.

    Attributes:
      name: as the doctor's table names it.
      kind: how it is read, one of inspection.KINDS.
      places: where it may lie, below the data folder; the first one is where it is missed.
      needed: stages and tables that read it.
      counts: unit → how many there should be.
      origin: where it comes from. licence: as its publisher states it.
      optional: the recipe can do without.
    """

    name: str
    kind: str
    places: tuple[str, ...]
    needed: str
    counts: Counts
    origin: str
    licence: str
    optional: bool = False


def _splits(unit: str, **counts: int) -> Counts:
    return {f"{split} {unit}": count for split, count in counts.items()}


_REFER = "https://github.com/lichengunc/refer (its server is gone; the links of dvlab-research/LISA's README work)"
_REFER_COUNTS: Mapping[str, Counts] = {
    "refcoco": {
        **_splits("expressions", train=120_624, val=10_834, testA=5_657, testB=5_095),  # FlagEval
        **_splits("referents", train=42_404, val=3_811, testA=1_975, testB=1_810),  # TFDS, like all below
        **_splits("images", train=16_994, val=1_500, testA=750, testB=750),
    },
    "refcoco+": {
        **_splits("referents", train=42_278, val=3_805, testA=1_975, testB=1_798),
        **_splits("images", train=16_992, val=1_500, testA=750, testB=750),
    },
    "refcocog": {
        **_splits("referents", train=42_226, val=2_573, test=5_023),
        **_splits("images", train=21_899, val=1_300, test=2_600),
    },
}


def _refer(name: str, table: str) -> list[DataSet]:
    by = "umd" if name == "refcocog" else "unc"
    found = DataSet(
        name, "refer", (f"{name}/refs({by}).p",), f"stages 2, 3; {table}", _REFER_COUNTS[name], _REFER, "not stated"
    )
    instances = DataSet(
        f"{name} instances", "instances", (f"{name}/instances.json",), found.needed, {}, _REFER, _COCO_TERMS
    )
    return [found, instances]


def _parts(split: str) -> DataSet:
    return DataSet(
        f"refcocom {split}", "refcocom", (f"refcocom/annotations/{split}.json", f"RefCOCOm/annotations/{split}.json"),
        "table 5", {}, "https://github.com/Rubics-Xuan/MRES", "not stated",
    )  # fmt: skip


def _open_vocabulary(name: str, images: str, licence: str) -> DataSet:
    places = (f"open_vocab/{name}.jsonl", f"{name}.jsonl")
    origin = f"{images}; python -m alto_jax.data.open_vocab {name} makes the file"
    return DataSet(name, "open_vocab", places, "table 6", {}, origin, licence)


def _pope(split: str, count: int) -> DataSet:
    places = tuple(f"{folder}coco_pope_{split}.json" for folder in ("pope/", "pope/coco/", ""))
    return DataSet(
        f"pope {split}", "pope", places, "POPE", {"questions": count}, "https://github.com/AoiDragon/POPE", "MIT"
    )


RECIPE: tuple[DataSet, ...] = (
    DataSet(
        "SA-1B", "sa1b", ("sa1b", "SA-1B", "sa-1b", "SA1B", "sam1b"), "stages 1, 1.5, 2, 3; table 7, figures 4, 7",
        {"images": 11_185_362}, "https://ai.meta.com/datasets/segment-anything-downloads",
        "SA-1B Dataset Research License",
    ),
    DataSet(
        "COCO train2014", "images", ("train2014",), "stages 2, 3; tables 2 to 5", {"images": 82_783},
        "http://images.cocodataset.org/zips/train2014.zip", _COCO_TERMS,
    ),
    DataSet(
        "COCO val2014", "images", ("val2014",), "POPE, VQAv2", {"images": 40_504},
        "http://images.cocodataset.org/zips/val2014.zip", _COCO_TERMS,
    ),
    *(found for name in ("refcoco", "refcoco+", "refcocog") for found in _refer(name, "table 4")),
    DataSet(
        "grefcoco", "refer", ("grefcoco/grefs(unc).json",), "stages 2, 3; tables 2, 3", {},
        "https://github.com/henghuiding/gRefCOCO", "not stated",
    ),
    DataSet(
        "grefcoco instances", "instances", ("grefcoco/instances.json",), "stages 2, 3; tables 2, 3", {},
        "https://github.com/henghuiding/gRefCOCO", _COCO_TERMS,
    ),
    *(_parts(f"{split}_{part}") for split in ("val", "testA", "testB") for part in ("part_only", "object_part")),
    *(DataSet(
        f"reasonseg {split}", "reason_seg", tuple(f"{folder}/{split}" for folder in FOLDERS),
        needed, {"images": count}, "https://github.com/dvlab-research/LISA", "not stated", optional=True,
    ) for split, needed, count in (("train", "stage 2", 239), ("val", "ReasonSeg", 200), ("test", "ReasonSeg", 779))),
    DataSet(
        "refcoco-m", "refcoco_m", refcoco_m.FOLDERS, "RefCOCO with exact masks",
        {"images": 1_190, "referents": 2_080, "expressions": 5_598}, "https://huggingface.co/datasets/moondream/refcoco-m",
        "MIT", optional=True,
    ),
    DataSet(
        "mask perception", "mask_perception", tuple(f"{f}/mask_perception.json" for f in mask_perception.FOLDERS),
        "mask perception", {}, "https://huggingface.co/datasets/yayafengzi/Mask_Perception", "Apache 2.0",
        optional=True,
    ),
    _open_vocabulary("a150", "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                     "non-commercial research (ADE20K's terms)"),
    _open_vocabulary("pc59", "https://cs.stanford.edu/~roozbeh/pascal-context, images of VOC 2010", "not stated"),
    _open_vocabulary("pas20", "http://host.robots.ox.ac.uk/pascal/VOC/voc2012", "images: Flickr's terms"),
    *(_pope(split, count) for split, count in (("random", 2_910), ("popular", 3_000), ("adversarial", 3_000))),
    DataSet(
        "vqav2 questions", "vqa_questions", ("vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
                                             "VQAv2/v2_OpenEnded_mscoco_val2014_questions.json"),
        "VQAv2", {"questions": 214_354}, "https://visualqa.org/download.html", "CC BY 4.0",
    ),
    DataSet(
        "vqav2 annotations", "vqa_annotations", ("vqav2/v2_mscoco_val2014_annotations.json",
                                                 "VQAv2/v2_mscoco_val2014_annotations.json"),
        "VQAv2", {"answers": 214_354}, "https://visualqa.org/download.html", "CC BY 4.0",
    ),
    DataSet(
        "mme", "mme", ("mme", "MME", "MME_Benchmark_release_version"), "MME", {"questions": 2_374, "categories": 14},
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models", "research only, not to be redistributed",
    ),
    DataSet(
        "conversations", "conversations", ("meta.json",), "stage 2: text, questions about pictures, dialogues", {},
        "your own: which ones the paper took is not stated", "that of what you take", optional=True,
    ),
)  # fmt: skip
