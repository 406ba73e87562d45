"""What `alto_jax.evaluate` runs: segmentation, questions in words, and the mask tokenizer alone."""

from collections.abc import Callable
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax import layers, metrics
from alto_jax.batch import MaskBatch, PromptBatch
from alto_jax.config import ConfigError
from alto_jax.data import benchmarks, images, transforms
from alto_jax.data.examples import mask_example
from alto_jax.data.reading import Reading
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.data.source import Records
from alto_jax.evaluate import questions, results
from alto_jax.evaluate.options import EvaluateOptions
from alto_jax.layers import apply_module
from alto_jax.mllm import text as words
from alto_jax.mllm.alto_llm import ALToLLM, ModelConfig, segment
from alto_jax.mllm.generate import GenerateConfig, bucket_length, generate
from alto_jax.mllm.language_model import LanguageModel
from alto_jax.parallel import distributed, sharding
from alto_jax.stages.tokenizer import mask_iou, tokenizer_apply
from alto_jax.tokenizer.alto import ALTo

_NO_TARGET_TOKENS = 2  # As the reference: the answer to "Does the image contain …?" is Yes or No.


class Task(Protocol):
    """A benchmark as the runner sees it.

    Attributes:
      name: of its result file and row.
      family, benchmark: for the tables.
      options: everything that its results depend on, beside the checkpoint.
    """

    name: str
    family: str
    benchmark: str
    options: dict[str, Any]

    def __len__(self) -> int: ...

    def example(self, index: int) -> dict[str, Any]:
        """A sample ready for the device, on the host; {"line": result} if it needs none."""

    def blank(self) -> dict[str, Any]:
        """An example to fill a batch with."""

    def run(self, examples: list[dict], mesh: Any) -> tuple[list[dict], int]:
        """Result lines of a batch, and how many tokens were generated."""

    def headline(self, lines: list[dict]) -> dict[str, float]:
        """Numbers for the progress line."""

    def summary(self, lines: list[dict]) -> dict[str, Any]:
        """The numbers of the tables, from all lines."""


def make_tasks(options: EvaluateOptions, cfg: ModelConfig, params: dict, text: Any, system: str | None) -> list[Task]:
    """The tasks of the command line, their data opened; errors come before anything is computed.

    "all" stands for every benchmark whose files are there (with a mask tokenizer alone: its reconstruction of their
    masks); what is left out is printed with the reason.
    """
    answerer = None if text is None else Answerer(cfg, params, text, system)
    names = list(options.benchmarks)
    optional = set()
    if "all" in names:
        with_masks = [n for n, b in benchmarks.BENCHMARKS.items() if b.family in (*benchmarks.MASK_FAMILIES, "scenes")]
        every = [f"tokenizer_{name}" for name in with_masks] if answerer is None else list(benchmarks.BENCHMARKS)
        optional = set(every) - set(names)
        names = [each for name in names for each in (every if name == "all" else [name])]
    tasks: list[Task] = []
    reconstruct: dict[str, Any] = {}
    make_reconstruction = lambda name, source: Reconstruction(cfg, params, name, source, reconstruct)
    for name in dict.fromkeys(names):
        try:
            tasks += _tasks_of(name, options, answerer, make_reconstruction)
        except ValueError as error:
            if name not in optional:
                raise
            print(f"[{name}] left out: {error}")
    if not tasks:
        raise ConfigError("--benchmark: expected at least one name")
    return tasks


def _tasks_of(
    name: str, options: EvaluateOptions, answerer: "Answerer | None", reconstruction: Callable[[str, Records], Task]
) -> list[Task]:
    """The tasks of one benchmark."""
    if name.startswith("tokenizer_"):
        return [reconstruction(name, _mask_source(name.removeprefix("tokenizer_"), options))]
    found = benchmarks.benchmark(name)
    if answerer is None:
        raise ConfigError(f"--benchmark: {name} needs a whole model (stage 2 or 3); for a mask tokenizer alone: "
                          f"tokenizer_{name}")  # fmt: skip
    if found.family in questions.MAX_NEW_TOKENS:
        asked = questions.open_questions(found.family, found.split, options.data, options.images, _reading(options))
        return [QuestionTask(answerer, found, _first(asked, options.limit))]
    source = _referring_source(name, options)
    modes = ("adaptive", "fixed") if options.length == "both" else (options.length,)
    return [SegmentationTask(answerer, found, source, mode, options) for mode in modes]


def _referring_source(name: str, options: EvaluateOptions) -> Records:
    if name == "scenes":
        return _first(benchmarks.SceneReferring(options.scenes), options.limit)
    opened = benchmarks.open_benchmark(
        name, options.data, protocol=options.protocol, images=options.images, reading=_reading(options)
    )
    return _first(opened, options.limit)


def _mask_source(name: str, options: EvaluateOptions) -> Records:
    if name == "sa1b":
        return _first(Sa1bMasks(options.data, train=False, reading=_reading(options)), options.limit)
    return _referring_source(name, options)


def _reading(options: EvaluateOptions) -> Reading:
    """How raw files are read; what is not the default is logged."""
    return Reading(options.exif, options.mask_rule).announce()


def _first(source: Records, limit: int) -> Records:
    return _First(source, limit) if limit else source


class _First:
    """The first n records of a source."""

    def __init__(self, source: Records, limit: int):
        self._source, self._limit = source, limit
        self.no_target = getattr(source, "no_target", False)

    def __len__(self) -> int:
        return min(self._limit, len(self._source))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]


class Answerer:
    """Prompts in, compiled once a shape: answers with masks, or in words."""

    def __init__(self, cfg: ModelConfig, params: dict, text: Any, system: str | None):
        self.cfg, self.params, self.text, self.system = cfg, params, text, system
        self._functions: dict[Any, Any] = {}

    def example(self, record: dict[str, Any], *, prefix: str = "", **questions: str) -> dict[str, Any]:
        """Images and prompt ids (a list a question) of a record; `prefix` begins the answer to the "prompt"."""
        image, size = record["image"], self.cfg
        images.check_size(image, f"of record {record['key']}")
        example = {"image": transforms.squash(image, size.need_vision().image_size), "key": record["key"]}
        example["pixel_image"] = transforms.squash(record.get("pixel_image", image), size.tokenizer.image_size)
        for name, question in questions.items():
            begin = prefix if name == "prompt" else ""
            example[name] = words.render_prompt(
                self.text, question, size.num_image_tokens, system=self.system, answer_prefix=begin
            )
        return example

    def batch(self, examples: list[dict], name: str, mesh: Any) -> PromptBatch:
        """The prompts `name` of examples, left padded to a common length, on the devices."""
        longest = max(len(e[name]) for e in examples)
        length = bucket_length(max(distributed.gather(longest)))  # Note: all processes must come to the same shape.
        pad, size = self.text.ids.pad, self.cfg.tokenizer.mask_size
        batch = PromptBatch(
            image=np.stack([e["image"] for e in examples]),
            pixel_image=np.stack([e["pixel_image"] for e in examples]),
            prompt_ids=np.array([[pad] * (length - len(e[name])) + e[name] for e in examples], np.int32),
            prompt_mask=np.array([np.arange(length) >= length - len(e[name]) for e in examples]),
            mask=np.zeros((len(examples), size, size), np.float32),
        )
        return sharding.put_batch(batch, mesh, sharding.batch_share(mesh).batch_size(len(examples)), "--batch-size")

    def segment(self, batch: PromptBatch, config: GenerateConfig, mesh: Any) -> dict[str, np.ndarray]:
        """Of this process's rows: probability [B, h, w], length and valid of the first mask, num_masks, ids, mask."""

        def run(params: dict, batch: PromptBatch) -> dict[str, jax.Array]:
            found = segment(self.cfg, params, batch, config, self.text.ids, jax.random.key(0))
            return {
                "probability": jax.nn.sigmoid(found.mask_logits),
                "ids": found.generated.ids,
                "mask": found.generated.mask,
                "length": found.length,
                "valid": found.valid,
                "num_masks": found.masks.num_masks,
            }

        return _local(self._compiled(("segment", config), run, mesh)(self.params, batch), mesh)

    def answer(self, batch: PromptBatch, config: GenerateConfig, mesh: Any) -> dict[str, np.ndarray]:
        """Ids and mask of answers in words."""

        def run(params: dict, batch: PromptBatch) -> dict[str, jax.Array]:
            model = ALToLLM(self.cfg)
            tokens = apply_module(model, params, batch.image, method="image_tokens")
            inputs = apply_module(model, params, batch.prompt_ids, tokens, self.text.ids.img_context, method="embed")
            language = LanguageModel(self.cfg.need_language_model()), params["language_model"]
            found = generate(*language, inputs, batch.prompt_mask, config, self.text.ids, jax.random.key(0))
            return {"ids": found.ids, "mask": found.mask}

        return _local(self._compiled(("answer", config), run, mesh)(self.params, batch), mesh)

    def words(self, found: dict[str, np.ndarray], row: int) -> str:
        """The answer of a row as text."""
        return words.answer_text(self.text, found["ids"][row][found["mask"][row]].tolist())

    def _compiled(self, key: Any, function: Any, mesh: Any) -> Any:
        if key not in self._functions:
            self._functions[key] = _compiled(self.cfg, function, mesh)
        return self._functions[key]


def _compiled(cfg: ModelConfig, function: Any, mesh: Any) -> Any:
    """The jitted function, with the model's precision; every process gets the whole result."""

    def told(*args: Any) -> Any:
        with layers.told_precision(cfg.matmul_precision):
            return function(*args)

    return jax.jit(sharding.on_mesh(mesh, told), out_shardings=sharding.replicated(mesh))


def _local(found: dict[str, Any], mesh: Any) -> dict[str, np.ndarray]:
    """This process's part of arrays that every process holds whole."""
    share = sharding.batch_share(mesh)
    return {name: value[share.rows(len(value))] for name, value in jax.device_get(found).items()}


class SegmentationTask:
    """A benchmark of referring or open-vocabulary segmentation, by adaptive or fixed length."""

    def __init__(
        self, answerer: Answerer, found: benchmarks.Benchmark, source: Records, mode: str, options: EvaluateOptions
    ):
        self._answerer, self._source, self._adaptive = answerer, source, mode == "adaptive"
        self.family, self.benchmark = found.family, found.name
        self.name = f"{found.name}.{options.protocol}.{mode}"
        self._gate = bool(getattr(source, "no_target", False))
        self._reference = options.reference
        base = metrics.REFERENCE_PROTOCOL if options.reference else metrics.MaskProtocol()
        self._protocol = dataclasses.replace(base, min_pixels=options.min_pixels)
        self._max_length = answerer.cfg.tokenizer.num_latent_tokens
        longest = options.max_new_tokens or self._max_length + 32
        self._prefix = words.FORCED_ANSWER_PREFIX if options.forced_prefix else ""
        self._config = GenerateConfig(
            max_new_tokens=longest,
            grammar=options.grammar,
            max_length=self._max_length,
            stop_at_mask_end=options.forced_prefix,
        )
        self.options = {
            "mode": mode,
            "protocol": options.protocol,
            "scoring": "reference" if options.reference else "alto_jax",
            "min_pixels": options.min_pixels,
            "grammar": options.grammar,
            "forced_prefix": options.forced_prefix,
            "max_new_tokens": longest,
            "asks_for_target": self._gate,
        }

    def __len__(self) -> int:
        return len(self._source)

    def example(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        questions = {"prompt": words.question(record["phrase"], adaptive=self._adaptive)}
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
        image = np.zeros((8, 8, 3), np.uint8)
        questions = {name: "nothing" for name in ("prompt", "gate")}
        example = self._answerer.example({"key": "", "image": image}, prefix=self._prefix, **questions)
        return example | {"target": np.zeros((8, 8), bool), "ignore": None, "phrase": ""}

    def run(self, examples: list[dict], mesh: Any) -> tuple[list[dict], int]:
        answerer = self._answerer
        found = answerer.segment(answerer.batch(examples, "prompt", mesh), self._config, mesh)
        tokens, said_no = int(found["mask"].sum()), np.zeros(len(examples), bool)
        if self._gate:
            config = GenerateConfig(max_new_tokens=_NO_TARGET_TOKENS)
            gate = answerer.answer(answerer.batch(examples, "gate", mesh), config, mesh)
            tokens += int(gate["mask"].sum())
            said_no = np.array([answerer.words(gate, i).strip(" .").lower() == "no" for i in range(len(examples))])
        lines = []
        for i, example in enumerate(examples):
            prediction, target = metrics.apply_protocol(
                found["probability"][i], example["target"], example["ignore"], self._protocol
            )
            if said_no[i] or not (found["valid"][i] or self._reference):
                prediction = np.zeros_like(prediction)
            one = metrics.SegmentationMetrics()
            iou = one.add(prediction, target)
            line = {"key": example["key"], "phrase": example["phrase"], "answer": answerer.words(found, i)}
            line |= {"valid": bool(found["valid"][i]), "length": int(found["length"][i]), "iou": iou}
            line["num_masks"] = int(found["num_masks"][i])
            line |= {k: getattr(one, k)[0] for k in ("intersection", "union", "target_pixels", "predicted_pixels")}
            lines.append(line | {"boundary": one.boundary[0]} | ({"said_no": bool(said_no[i])} if self._gate else {}))
        return lines, tokens

    def headline(self, lines: list[dict]) -> dict[str, float]:
        good = [line["iou"] for line in lines if "iou" in line]
        return {"giou of batch": float(np.mean(good))} if good else {}

    def summary(self, lines: list[dict]) -> dict[str, Any]:
        return results.summarise_masks(lines, self._max_length)


class QuestionTask:
    """POPE, VQAv2 or MME."""

    def __init__(self, answerer: Answerer, found: benchmarks.Benchmark, source: Records):
        self._answerer, self._source = answerer, source
        self.family = found.family
        self.name = self.benchmark = found.name
        self._config = GenerateConfig(max_new_tokens=questions.MAX_NEW_TOKENS[found.family])
        self.options = {"max_new_tokens": self._config.max_new_tokens}

    def __len__(self) -> int:
        return len(self._source)

    def example(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        example = self._answerer.example(record, prompt=record["question"])
        return example | {"label": record["label"], "category": record["category"]}

    def blank(self) -> dict[str, Any]:
        record = {"key": "", "image": np.zeros((8, 8, 3), np.uint8)}
        return self._answerer.example(record, prompt="nothing") | {"label": "", "category": ""}

    def run(self, examples: list[dict], mesh: Any) -> tuple[list[dict], int]:
        found = self._answerer.answer(self._answerer.batch(examples, "prompt", mesh), self._config, mesh)
        lines = [
            {k: e[k] for k in ("key", "category", "label")} | {"answer": self._answerer.words(found, i)}
            for i, e in enumerate(examples)
        ]
        return lines, int(found["mask"].sum())

    def headline(self, lines: list[dict]) -> dict[str, float]:
        return {}

    def summary(self, lines: list[dict]) -> dict[str, Any]:
        return questions.summarise_questions(self.family, lines)


class Reconstruction:
    """The mask tokenizer alone, at its own resolution: IoU at every length and at the predicted one, with and without
    image features (paper, Table 7 and Figure 8). Samples without a target are passed over."""

    family = "tokenizer"

    def __init__(self, cfg: ModelConfig, params: dict, name: str, source: Records, compiled: dict[str, Any]):
        """`compiled` is shared by the tasks of one run, so that the program is compiled once."""
        self._model, self._cfg, self._params = cfg, cfg.tokenizer, {"tokenizer": params["tokenizer"]}
        self._source = source
        self.name = self.benchmark = name
        self.options = {"mask_size": cfg.tokenizer.mask_size, "image_size": cfg.tokenizer.image_size}
        self._compiled = compiled

    def __len__(self) -> int:
        return len(self._source)

    def example(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        if "phrase" in record and not record["mask"].any():
            return {"line": {"key": record["key"], "skipped": "no target"}}
        image, mask = mask_example(record, self._cfg.image_size, self._cfg.mask_size)
        return {"key": record["key"], "image": image, "mask": mask}

    def blank(self) -> dict[str, Any]:
        size = self._cfg
        image = np.zeros((size.image_size, size.image_size, 3), np.uint8)
        return {"key": "", "image": image, "mask": np.ones((size.mask_size, size.mask_size), np.float32)}

    def run(self, examples: list[dict], mesh: Any) -> tuple[list[dict], int]:
        if "reconstruct" not in self._compiled:
            self._compiled["reconstruct"] = _compiled(self._model, self._reconstruct, mesh)
        batch = MaskBatch(image=np.stack([e["image"] for e in examples]), mask=np.stack([e["mask"] for e in examples]))
        num_rows = sharding.batch_share(mesh).batch_size(len(examples))
        batch = sharding.put_batch(batch, mesh, num_rows, "--batch-size")
        found = _local(self._compiled["reconstruct"](self._params, batch), mesh)
        lines = []
        for i, example in enumerate(examples):
            line = {"key": example["key"], "length": int(found["length"][i])}
            for name in ("iou", "iou_plain"):
                if name in found:
                    line[name] = found[name][i, :-1].tolist()
                    line[name.replace("iou", "iou_adaptive")] = float(found[name][i, -1])
            lines.append(line)
        return lines, 0

    def _reconstruct(self, params: dict, batch: MaskBatch) -> dict[str, jax.Array]:
        """iou [B, L + 1] at 1..L tokens and at the predicted number; iou_plain without image features."""
        apply = tokenizer_apply(ALTo(self._cfg), params)
        encoded = apply(batch.mask, method="encode")
        codes, length = apply(encoded.z, method="quantize").codes, apply(encoded, method="predict_length").num_kept
        count = self._cfg.num_latent_tokens
        lengths = jnp.concatenate(
            [jnp.broadcast_to(jnp.arange(1, count + 1)[:, None], (count, len(length))), length[None]]
        )
        found = {"length": length}
        for name, features in (("iou", apply(batch.image, method="image_features")), ("iou_plain", None)):
            if features is None and name == "iou":
                continue
            decode = lambda k, f=features: mask_iou(apply(codes, k, f, method="decode_codes"), batch.mask)
            found[name] = jax.lax.map(decode, lengths).T
        return {"iou" if name == "iou_plain" and "iou" not in found else name: v for name, v in found.items()}

    def headline(self, lines: list[dict]) -> dict[str, float]:
        good = [line["iou"][-1] for line in lines if "iou" in line]
        return {"giou of batch": float(np.mean(good))} if good else {}

    def summary(self, lines: list[dict]) -> dict[str, Any]:
        return results.summarise_reconstruction(lines)
