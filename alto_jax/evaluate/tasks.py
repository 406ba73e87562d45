"""What `alto_jax.evaluate` runs: segmentation and questions in words (the mask tokenizer alone: reconstruction.py)."""

from collections import Counter
from collections.abc import Callable
import re
from typing import Any, Protocol

import numpy as np

from alto_jax import metrics
from alto_jax.config import ConfigError
from alto_jax.data import benchmarks, mask_perception, rle
from alto_jax.data.fingerprint import fingerprint_of
from alto_jax.data.prepared import Prepared
from alto_jax.data.reading import Reading
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.data.source import Records
from alto_jax.evaluate import questions
from alto_jax.evaluate.answerer import Answerer
from alto_jax.evaluate.device import Answers, Programs
from alto_jax.evaluate.options import EvaluateOptions, length_modes
from alto_jax.evaluate.perception import PerceptionTask
from alto_jax.evaluate.reconstruction import Reconstruction
from alto_jax.mllm import text as words
from alto_jax.mllm.alto_llm import ModelConfig
from alto_jax.mllm.generate import GenerateConfig

_NO_TARGET_TOKENS = 2  # As the reference: the answer to "Does the image contain …?" is Yes or No.


class Task(Protocol):
    """A benchmark as the runner sees it.

    Attributes:
      name: of its result file and row.
      family, benchmark: for the tables.
      options: everything that its results depend on, beside checkpoint and data.
      source: its records, as far as they are evaluated.
    """

    name: str
    family: str
    benchmark: str
    options: dict[str, Any]
    source: Records

    def __len__(self) -> int: ...

    def example(self, index: int) -> dict[str, Any]:
        """A sample ready for the device, on the host; {"line": result} if it needs none."""

    def blank(self) -> dict[str, Any]:
        """An example to fill a batch with."""

    def answer(self, examples: list[dict]) -> Answers:
        """What the device says to a batch."""

    def line(self, example: dict[str, Any], answers: Answers, row: int) -> dict[str, Any]:
        """The result line of the example in a row; may run in a thread."""

    def headline(self, lines: list[dict]) -> dict[str, float]:
        """Numbers for the progress line."""


def header_of(task: Task) -> dict[str, Any]:
    """What the results of a task depend on, beside the checkpoint and the batch size."""
    source = task.source
    inner, count = (source.whole, len(source)) if isinstance(source, Limited) else (source, len(source))
    left_out = Counter(bad["kind"] for bad in inner.left_out(count)) if isinstance(inner, Prepared) else {}
    return {
        "task": task.name,
        "family": task.family,
        "benchmark": task.benchmark,
        "samples": len(task),
        "data": fingerprint_of(inner),
        "left_out": dict(sorted(left_out.items())),
        **task.options,
    }


def make_tasks(
    options: EvaluateOptions, cfg: ModelConfig, params: dict, text: Any, system: str | None, programs: Programs
) -> list[Task]:
    """The tasks of the command line, their data opened; errors come before anything is computed.

    "all" stands for every benchmark whose files are there (with a mask tokenizer alone: its reconstruction of their
    masks); what is left out is printed with the reason.
    """
    answerer = None if text is None else Answerer(cfg, params, text, system, programs)
    names = list(options.benchmarks)
    optional = set()
    if "all" in names:
        with_masks = [n for n, b in benchmarks.BENCHMARKS.items() if b.family in (*benchmarks.MASK_FAMILIES, "scenes")]
        every = [f"tokenizer_{name}" for name in with_masks] if answerer is None else list(benchmarks.BENCHMARKS)
        optional = set(every) - set(names)
        names = [each for name in names for each in (every if name == "all" else [name])]
    tasks: list[Task] = []
    reconstruction = lambda name, source, read: Reconstruction(cfg, params, name, source, read, programs)
    for name in dict.fromkeys(names):
        try:
            tasks += _tasks_of(name, options, answerer, reconstruction)
        except ValueError as error:
            if name not in optional:
                raise
            print(f"[{name}] left out: {error}")
    if not tasks:
        raise ConfigError("--benchmark: expected at least one name")
    return tasks


def _tasks_of(
    name: str,
    options: EvaluateOptions,
    answerer: Answerer | None,
    reconstruction: Callable[[str, Records, dict[str, Any]], Task],
) -> list[Task]:
    """The tasks of one benchmark."""
    if name.startswith("tokenizer_"):
        return [reconstruction(name, *_limited(mask_source(name.removeprefix("tokenizer_"), options), options))]
    found = benchmarks.benchmark(name)
    if answerer is None:
        raise ConfigError(f"--benchmark: {name} needs a whole model (stage 2 or 3); for a mask tokenizer alone: "
                          f"tokenizer_{name}")  # fmt: skip
    modes, most = length_modes(options.length), answerer.cfg.tokenizer.num_latent_tokens
    for mode in modes:
        if mode.isdigit() and int(mode) > most:
            raise ConfigError(f"--length: expected at most {most} mask tokens, got {mode}")
    if found.family == "mask_perception":
        shown = mask_perception.open_mask_perception(options.data, options.images, _reading(options))
        return [PerceptionTask(answerer, found.name, *_limited(shown, options), mode) for mode in modes]
    if found.family in questions.MAX_NEW_TOKENS:
        max_tiles = options.max_tiles if found.family in questions.TILED else 1
        return [QuestionTask(answerer, found, *_limited(_questions(found, options), options), max_tiles)]
    source, read = _limited(mask_source(name, options), options)
    return [SegmentationTask(answerer, found, source, read, mode, options) for mode in modes]


def _questions(found: benchmarks.Benchmark, options: EvaluateOptions) -> Records:
    reading = _reading(options)
    if found.family == "rec":
        return benchmarks.open_boxes(found.name, options.data, images=options.images, reading=reading)
    return questions.open_questions(found.family, found.split, options.data, options.images, reading)


def mask_source(name: str, options: EvaluateOptions) -> Records:
    """The records of a benchmark with masks ("sa1b": of the SA-1B folder), all of them."""
    if name == "sa1b":
        return Sa1bMasks(options.data, train=False, reading=_reading(options))
    if name == "scenes":
        return benchmarks.SceneReferring(options.scenes)
    return benchmarks.open_benchmark(
        name, options.data, protocol=options.protocol, images=options.images, reading=_reading(options)
    )


def _reading(options: EvaluateOptions) -> Reading:
    """How raw files are read; what is not the default is logged."""
    return Reading(options.exif, options.mask_rule).announce()


def _limited(source: Records, options: EvaluateOptions) -> tuple[Records, dict[str, Any]]:
    """Which records are evaluated, and how they are read: the limit if it leaves some out (else 0), the rules."""
    limit = options.limit if 0 < options.limit < len(source) else 0
    read = {"limit": limit, "exif": options.exif, "mask_rule": options.mask_rule}
    return Limited(source, limit) if limit else source, read


class Limited:
    """The first n records of a source, which is `whole`."""

    def __init__(self, source: Records, limit: int):
        self.whole, self._limit = source, limit
        self.no_target = getattr(source, "no_target", False)

    def __len__(self) -> int:
        return min(self._limit, len(self.whole))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.whole[index]


class SegmentationTask:
    """A benchmark of referring or open-vocabulary segmentation, by adaptive or fixed length, or by so many tokens."""

    def __init__(
        self,
        answerer: Answerer,
        found: benchmarks.Benchmark,
        source: Records,
        read: dict[str, Any],
        mode: str,
        options: EvaluateOptions,
    ):
        self._answerer, self.source, self._adaptive = answerer, source, mode == "adaptive"
        self.family, self.benchmark = found.family, found.name
        self.name = f"{found.name}.{options.protocol}.{mode}"
        self._gate = bool(getattr(source, "no_target", False))
        self._reference = options.reference
        self._protocol = metrics.REFERENCE_PROTOCOL if options.reference else metrics.MaskProtocol()
        max_length = answerer.cfg.tokenizer.num_latent_tokens
        longest = options.max_new_tokens or max_length + 32
        forced = int(mode) if mode.isdigit() else None
        self._prefix = words.FORCED_ANSWER_PREFIX if options.forced_prefix else ""
        self._config = GenerateConfig(
            max_new_tokens=longest,
            grammar=options.grammar or forced is not None,
            max_length=max_length,
            forced_length=forced,
            end_logit_bias=options.end_bias,
            stop_at_mask_end=options.forced_prefix,
        )
        self.options = {
            "mode": mode,
            "protocol": options.protocol,
            "scoring": "reference" if options.reference else "alto_jax",
            "min_pixels": options.min_pixels or 0,
            "grammar": self._config.grammar,
            "forced_prefix": options.forced_prefix,
            "end_bias": options.end_bias,
            "max_new_tokens": longest,
            "num_latent_tokens": max_length,
            "asks_for_target": self._gate,
            **read,
        }

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int) -> dict[str, Any]:
        """A sample ready for the device, with its target."""
        record = self.source[index]
        questions: dict[str, Any] = {"prompt": words.question(record["phrase"], adaptive=self._adaptive)}
        if self._gate:
            questions["gate"] = words.no_target_question(record["phrase"])
        example = self._answerer.example(record, prefix=self._prefix, **questions)
        ignore = record.get("ignore")
        return example | {
            "target": record["mask"] > 0,
            "ignore": None if ignore is None else ignore > 0,
            "phrase": record["phrase"],
        }

    def blank(self) -> dict[str, Any]:
        """An example to fill a batch with."""
        image = np.zeros((8, 8, 3), np.uint8)
        questions: dict[str, Any] = {name: "nothing" for name in ("prompt", "gate")}
        example = self._answerer.example({"key": "", "image": image}, prefix=self._prefix, **questions)
        return example | {"target": np.zeros((8, 8), bool), "ignore": None, "phrase": ""}

    def answer(self, examples: list[dict]) -> Answers:
        """The masks, and where there may be no target the answers to the question whether there is one."""
        answerer = self._answerer
        answers = answerer.segment(answerer.batch(examples, "prompt"), self._config)
        if not self._gate:
            return answers
        config = GenerateConfig(max_new_tokens=_NO_TARGET_TOKENS)
        gate = answerer.answer(answerer.batch(examples, "gate"), config)
        found = answers.found | {"gate_ids": gate.found["ids"], "gate_mask": gate.found["mask"]}
        return Answers(found, answers.tokens + gate.tokens, answers.seconds + gate.seconds)

    def line(self, example: dict[str, Any], answers: Answers, row: int) -> dict[str, Any]:
        """The result of a sample; the numbers are those before `min_pixels` (results.py applies it).

        "mask" is the predicted mask as COCO run lengths; None if the answer has none.
        """
        found, answerer = answers.found, self._answerer
        answer, valid, said_no = answerer.words(found, row), bool(found["valid"][row]), False
        if self._gate:
            gate = answerer.words({"ids": found["gate_ids"], "mask": found["gate_mask"]}, row)
            said_no = says_no(gate) or not valid and says_no(answer)
        target, mask = example["target"], None
        prediction = np.zeros_like(target)
        if not said_no and (valid or self._reference):
            height, width = target.shape
            upsample = self._protocol.upsample
            prediction = metrics.resize_probability(found["probability"][row], height, width, upsample) > 0.5
            mask = rle.encode(prediction)
        prediction, target = metrics.without_ignored(prediction, target, example["ignore"], self._protocol)
        one = metrics.SegmentationMetrics()
        malformed = not valid and not said_no and not prediction.any()
        iou = one.add(prediction, target, malformed=malformed)
        line = {"key": example["key"], "image": example["image_name"], "phrase": example["phrase"], "answer": answer}
        line |= {"valid": valid, "num_masks": int(found["num_masks"][row]), "said_no": said_no}
        line |= {"length": int(found["length"][row]), "iou": iou}
        line |= {k: getattr(one, k)[0] for k in ("intersection", "union", "target_pixels", "predicted_pixels")}
        return line | {"boundary": one.boundary[0], "mask": mask}

    def headline(self, lines: list[dict]) -> dict[str, float]:
        """Numbers for the progress line."""
        good = [line["iou"] for line in lines if "iou" in line]
        return {"giou of batch": float(np.mean(good))} if good else {}


def says_no(answer: str) -> bool:
    """Whether an answer says that there is no target: its first word is "No"."""
    found = re.match(r"\W*(\w+)", answer)
    return found is not None and found[1].lower() == words.NO.lower()


class QuestionTask:
    """POPE, VQAv2, MME or referring comprehension."""

    def __init__(
        self, answerer: Answerer, found: benchmarks.Benchmark, source: Records, read: dict[str, Any], max_tiles: int
    ):
        self._answerer, self.source, self._max_tiles = answerer, source, max_tiles
        self.family = found.family
        self.name = self.benchmark = found.name
        self._config = GenerateConfig(max_new_tokens=questions.MAX_NEW_TOKENS[found.family])
        self.options = {"max_new_tokens": self._config.max_new_tokens, **read}
        if max_tiles > 1:
            self.name += f".tiles{max_tiles}"
            self.options["max_tiles"] = max_tiles

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int) -> dict[str, Any]:
        """A question ready for the device, with its label."""
        record = self.source[index]
        example = self._answerer.example(record, max_tiles=self._max_tiles, prompt=record["question"])
        return example | {"label": record["label"], "category": record["category"]}

    def blank(self) -> dict[str, Any]:
        """An example to fill a batch with."""
        record = {"key": "", "image": np.zeros((8, 8, 3), np.uint8)}
        example = self._answerer.example(record, max_tiles=self._max_tiles, prompt="nothing")
        return example | {"label": "", "category": ""}

    def answer(self, examples: list[dict]) -> Answers:
        """The answers in words."""
        return self._answerer.answer(self._answerer.batch(examples, "prompt", self._max_tiles), self._config)

    def line(self, example: dict[str, Any], answers: Answers, row: int) -> dict[str, Any]:
        """The answer to a question."""
        line = {"key": example["key"], "image": example["image_name"]}
        line |= {k: example[k] for k in ("category", "label")}
        return line | {"answer": self._answerer.words(answers.found, row)}

    def headline(self, lines: list[dict]) -> dict[str, float]:
        """No numbers for the progress line."""
        return {}
