"""Questions with a short answer in words: POPE, VQAv2 and MME, read and scored as the reference does.

Also the scores of referring comprehension (data/comprehension.py) and mask perception (data/mask_perception.py).

In: the published files. Out: random access to QuestionRecords {"key", "image", "question", "label", "category"}
(label: a word, or VQAv2's ten answers), and scores of the given answers.

The question is followed by "Answer the question using a single word or phrase." in the first three.
"""

from collections.abc import Mapping, Sequence
import logging
import os
import pathlib
import re
from typing import Any

import numpy as np

from alto_jax import metrics
from alto_jax.data import bad_data, coco, files
from alto_jax.data.fingerprint import Fingerprint
from alto_jax.data.reading import AS_STORED, Reading
from alto_jax.data.split import image_name
from alto_jax.evaluate import choices
from alto_jax.mllm import boxes
from alto_jax.mllm.text import BOX, BOX_END

_log = logging.getLogger(__name__)
SUFFIX = " Answer the question using a single word or phrase."
TILED = ("pope", "vqav2", "mme")  # Families whose images may be in tiles: their questions name no <ref> or <box>.
MAX_NEW_TOKENS = {"pope": 10, "vqav2": 10, "mme": 10, "rec": 100}
BOX_THRESHOLDS = (0.5, 0.7, 0.9)
# Where MME's categories may lie: the folder that is published, in folders of the usual names or in the data folder.
_MME_INNER = ("MME_Benchmark_release_version/", "MME_Benchmark_release_version/MME_Benchmark/", "MME_Benchmark/", "")
MME_FOLDERS = tuple(outer + inner for outer in ("mme/", "MME/", "") for inner in _MME_INNER)
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


Entry = tuple[str, str, pathlib.Path, str, Any, str]  # where, key, image file, question, label, category


class Questions:
    """Random access to QuestionRecords of checked entries (where, key, image file, question, label, category)."""

    def __init__(self, entries: Sequence[Entry], reading: Reading = AS_STORED):
        if not entries:
            raise ValueError("questions: none in this data set")
        self._entries, self._reading = entries, reading

    def __len__(self) -> int:
        return len(self._entries)

    def fingerprint(self) -> str:
        """What the questions are, see fingerprint.py."""
        found = Fingerprint()
        found.values([(key, question, label) for _, key, _, question, label, _ in self._entries])
        found.sizes(coco.find_image(file) for file in dict.fromkeys(entry[2] for entry in self._entries))
        return str(found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where, key, file, question, label, category = self._entries[index]
        try:
            image = self._reading.photo(coco.find_image(file)).image
        except ValueError as error:
            raise bad_data.at(where, error) from error
        # Note: MME has files of the same name in several categories.
        name = key.rpartition("/")[0] if key.startswith("mme/") else image_name(file)
        named = {"key": key, "image": image, "image_name": name}
        return named | {"question": question + SUFFIX, "label": label, "category": category}


def open_questions(
    family: str,
    split: str,
    root: str | os.PathLike,
    images: str | os.PathLike | None = None,
    reading: Reading = AS_STORED,
) -> Questions:
    """Opens "pope", "vqav2" or "mme" below the data folder; ValueError says what was expected where.

    `reading`: of the images (EXIF).
    """
    root = pathlib.Path(root)
    if family == "mme":
        return Questions(_open_mme(_mme_folder(root)), reading)
    folder = pathlib.Path(images) if images is not None else files.find(root, coco.VAL_FOLDERS, "COCO val2014 images")
    entries = _open_pope(root, split, folder) if family == "pope" else _open_vqav2(root, folder)
    return Questions(entries, reading)


def _open_pope(root: pathlib.Path, split: str, images: pathlib.Path) -> list[Entry]:
    name = f"coco_pope_{split}.json"
    file = files.find(root, (f"pope/{name}", f"pope/coco/{name}", name), f"POPE {split}")
    entries = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            entry = bad_data.parse_json(line, where)
            label = {"yes": "yes", "no": "no"}[entry["label"]]
            key, question = f"pope/{split}/{entry['question_id']}", str(entry["text"])
            entries.append((where, key, images / entry["image"], question, label, split))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: expected question_id, image, text, label yes or no: {error!r}") from error
    return entries


def _open_vqav2(root: pathlib.Path, images: pathlib.Path) -> list[Entry]:
    folder = files.find(root, ("vqav2", "VQAv2"), "VQAv2")
    file = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    questions = files.load_json(file, dict)
    answers = files.load_json(folder / "v2_mscoco_val2014_annotations.json", dict)
    entries = []
    try:
        given = {a["question_id"]: a for a in answers["annotations"]}
        for number, entry in enumerate(questions["questions"]):
            image = images / f"COCO_val2014_{entry['image_id']:012d}.jpg"
            annotation = given[entry["question_id"]]
            label = [str(a["answer"]) for a in annotation["answers"]]
            where, key = f"{file} question {number}", f"vqav2/{entry['question_id']}"
            entries.append((where, key, image, str(entry["question"]), label, annotation.get("answer_type", "")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected questions and annotations with question_id, image_id, answers: {error!r}"
        ) from error
    return entries


def _mme_folder(root: pathlib.Path) -> pathlib.Path:
    """The folder of MME's categories; ValueError says where it was looked for."""
    for folder in MME_FOLDERS:
        if any((root / folder / category).is_dir() for category in (*PERCEPTION, *COGNITION)):
            return root / folder
    raise ValueError(
        f"MME: expected existence/, count/ … in one of {', '.join(f or './' for f in MME_FOLDERS)} of {root}"
    )


def _open_mme(root: pathlib.Path) -> list[Entry]:
    """MME: in each category an image and a text file of the same stem, lines "question<tab>Yes|No".

    They lie beside each other, or in images/ and questions_answers_YN/, as published.
    """
    entries, missing = [], []
    for category in (*PERCEPTION, *COGNITION):
        folder = root / category
        found = sorted([*folder.glob("*.txt"), *folder.glob("questions_answers_YN/*.txt")])
        texts = [file for file in found if not file.name.startswith(".")]
        missing += [] if texts else [category]
        for file in texts:
            places = (folder, folder / "images")
            candidates = [p / f"{file.stem}{suffix}" for p in places for suffix in (".jpg", ".png", ".jpeg", ".JPG")]
            image = next((c for c in candidates if c.is_file()), candidates[0])
            for number, line in enumerate(file.read_text("utf-8-sig", errors="replace").splitlines(), 1):
                if not line.strip():
                    continue
                question, _, label = line.rpartition("\t")
                where = f"{file} line {number}"
                if label.strip().lower() not in ("yes", "no") or not question:
                    raise ValueError(f"{where}: expected question<tab>Yes or No, got {line!r:.60}")
                key = f"mme/{category}/{file.stem}/{number}"
                entries.append((where, key, image, question.strip(), label.strip().lower(), category))
    if not entries:
        raise ValueError(f"{root}: expected folders such as existence/ with *.txt; none is there")
    if missing:
        _log.warning("%s: no questions of %s: the sums of MME are without them", root, ", ".join(missing))
    return entries


# --- scores -----------------------------------------------------------------------------------------


def score(
    family: str, answers: Sequence[str], labels: Sequence[Any], keys: Sequence[str], categories: Sequence[str]
) -> dict[str, Any]:
    """Scores of a data set by its own rules.

    Args:
      family: "pope", "vqav2", "mme", "rec" or "mask_perception".
      answers: what the model said.
      labels, keys, categories: of the QuestionRecords.
    """
    if family == "pope":
        return pope_scores(answers, labels)
    if family == "mme":
        return mme_scores(answers, labels, keys, categories)
    if family == "mask_perception":
        return {"accuracy": float(np.mean([choices.is_right(a, g) for a, g in zip(answers, labels)]))}
    if family == "rec":
        ious = np.array([first_box_iou(a, g) for a, g in zip(answers, labels)])
        found = {f"box_precision@{k}": float(np.mean(ious >= k)) for k in BOX_THRESHOLDS}
        return found | {"box_iou": float(np.mean(ious))}
    return {"vqa_accuracy": float(np.mean([vqa_accuracy(a, g) for a, g in zip(answers, labels)]))}


def pope_answer(answer: str) -> str:
    """POPE's reading of an answer: its first sentence, without commas, is "no" if it has No, not or no."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in ("No", "not", "no")) else "yes"


def pope_scores(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of "yes"."""
    said = np.array([pope_answer(a) == "yes" for a in answers])
    true = np.array([label == "yes" for label in labels])
    precision, recall, f1 = _precision_recall_f1(said, true)
    accuracy = float(np.mean(said == true))
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes_rate": float(said.mean())}


def _precision_recall_f1(said: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """Of bool[N]; 0 where there is nothing to divide by."""
    hits = float(np.sum(said & true))
    precision, recall = hits / max(said.sum(), 1), hits / max(true.sum(), 1)
    return float(precision), float(recall), float(2 * precision * recall / (precision + recall)) if hits else 0.0


def mme_answer(answer: str) -> str:
    """MME's reading of an answer: "yes" or "no" if that stands in its first four characters, else ""."""
    start = answer.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "")


def mme_scores(
    answers: Sequence[str], labels: Sequence[str], keys: Sequence[str], categories: Sequence[str]
) -> dict[str, Any]:
    """MME: accuracy over questions plus accuracy over images with all questions right, each in percent, by category."""
    by_category: dict[str, dict[str, list[bool]]] = {}
    for answer, label, key, category in zip(answers, labels, keys, categories):
        right = mme_answer(answer) == label
        by_category.setdefault(category, {}).setdefault(key.rsplit("/", 1)[0], []).append(right)
    scores = {}
    for category, images in by_category.items():
        accuracy = np.mean([right for image in images.values() for right in image])
        scores[category] = float(100 * (accuracy + np.mean([all(image) for image in images.values()])))
    total = lambda names: float(sum(scores.get(name, 0.0) for name in names))
    return {"perception": total(PERCEPTION), "cognition": total(COGNITION), "categories": scores}


def first_box_iou(answer: str, label: Sequence[float]) -> float:
    """IoU of the first box of an answer with (x1, y1, x2, y2) in 0..1; 0.0 if it has none, with or without <box>."""
    plain = answer[answer.find("[") : answer.rfind("]") + 1]
    found = boxes.parse_boxes(answer) or boxes.parse_boxes(f"{BOX}[{plain}]{BOX_END}")
    return boxes.box_iou(found[0], label) if found else 0.0


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """VQA accuracy of one answer: mean over leaving one person out of min(1, matches / 3)."""
    answer = normalise_answer(answer)
    people = [normalise_answer(g) for g in given]
    matches = np.array([person == answer for person in people])
    return float(np.mean(np.minimum(1.0, (matches.sum() - matches) / 3.0)))


_NUMBERS = dict(
    zip("none zero one two three four five six seven eight nine ten".split(), "0 0 1 2 3 4 5 6 7 8 9 10".split())
)
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've "
    "somebody'd somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd "
    "something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're "
    "they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've "
    "who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll "
    "y'all'd've you'd you'd've you'll you're you've "
).split()
_SPELLED_OUT = {word.replace("'", ""): word for word in _CONTRACTIONS}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalise_answer(answer: str) -> str:
    """EvalAI's normal form: punctuation, number words, articles and contractions made alike."""
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    out = answer = answer.replace("\n", " ").replace("\t", " ").strip()
    for mark in _PUNCTUATION:
        if f"{mark} " in answer or f" {mark}" in answer:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_NUMBERS.get(word, word) for word in out.split()]
    return " ".join(_SPELLED_OUT.get(word, word) for word in words if word not in _ARTICLES)


def summarise_questions(family: str, lines: Sequence[Mapping[str, Any]], *, resamples: int = 1000) -> dict[str, Any]:
    """Scores of a result file's samples, with bootstrap 95 % intervals (over images) of the headline ones."""
    good = [line for line in lines if "error" not in line]
    if not good:
        raise ValueError(f"none of the {len(lines)} samples could be read, such as: {lines[0]['error']}")
    columns = [[line[k] for line in good] for k in ("answer", "label", "key", "category")]
    result = score(family, *columns) | {"num_samples": len(good), "num_skipped": len(lines) - len(good)}
    answers, labels = columns[:2]
    if family == "vqav2":
        right, name = [vqa_accuracy(a, g) for a, g in zip(answers, labels)], "vqa_accuracy"
    elif family == "rec":
        right, name = [first_box_iou(a, g) >= 0.5 for a, g in zip(answers, labels)], "box_precision@0.5"
    elif family == "mask_perception":
        right, name = [choices.is_right(a, g) for a, g in zip(answers, labels)], "accuracy"
    elif family == "pope":
        right, name = [pope_answer(a) == g for a, g in zip(answers, labels)], "accuracy"
    else:
        right, name = [mme_answer(a) == g for a, g in zip(answers, labels)], "question_accuracy"
        result[name] = float(np.mean(right))
    images = [line.get("image", line["key"]) for line in good]
    interval = lambda *arguments: list(metrics.bootstrap_ci(*arguments, num_resamples=resamples, groups=images))
    result["intervals"] = {name: interval(np.mean, np.array(right, float))}
    if family == "pope":
        said = np.array([pope_answer(a) == "yes" for a in answers])
        true = np.array([label == "yes" for label in labels])
        for number, name in enumerate(("precision", "recall", "f1")):
            result["intervals"][name] = interval(lambda s, t, n=number: _precision_recall_f1(s, t)[n], said, true)
    return result
