"""What a model answers about the built-in scenes, beside what needs no looking; the command is scenes.py.

Kinds of requests, all about scenes that training never showed:

    names    an object among up to three, by a name that training knew
    unseen   a shape that training never showed, by place and colour ("the red thing on the left")
    box      an object by its box
    boxes    two to eight objects by their boxes

Beside the answers stand the mask from no codes at all, the best constant answer (one sequence of codes for every
request, chosen on training scenes), and what the mask tokenizer makes of the true masks. IoU is taken at the mask
tokenizer's resolution.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np

from alto_jax.batch import PromptBatch
from alto_jax.checkpoint import loading
from alto_jax.config import ConfigError
from alto_jax.data import pipeline, transforms
from alto_jax.data.composition import Scene, ScenesConfig, mask_complexity
from alto_jax.data.scenes import ChatConfig, SceneChats
from alto_jax.layers import apply_module, told_precision
from alto_jax.mllm.alto_llm import ALToLLM, ModelConfig, segment
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.mllm.text import SpecialIds
from alto_jax.parallel.at_once import batches_at_once, in_order
from alto_jax.tokenizer.alto import ALTo

VOCABULARY = 40  # names that alto-tiny is taught, see configs/stage2.py
_SCENES = {"image_size": 128, "min_size": 0.25, "max_size": 0.6, "shapes": "train", "vocabulary": VOCABULARY}
_ONE = {"multi_fraction": 0.0, "question_fraction": 0.0, "adaptive_only": True}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "names": (_SCENES | {"max_objects": 3}, _ONE),
    "unseen": (_SCENES | {"max_objects": 3, "shapes": "split", "vocabulary": None}, _ONE | {"unnamed_fraction": 1.0}),
    "box": (_SCENES | {"max_objects": 4}, _ONE | {"box_fraction": 1.0, "max_boxes": 1}),
    "boxes": (
        _SCENES | {"min_objects": 2, "max_objects": 8, "min_size": 0.15, "max_size": 0.4},
        _ONE | {"box_fraction": 1.0, "min_boxes": 2, "max_boxes": 8},
    ),
}
CANDIDATES = 48  # training scenes at most that constant answers are taken from and tried on


@dataclasses.dataclass(frozen=True)
class Sample:
    """One request: iou and length of the answer, whether it is well formed, its codes, its mask bool[H, W] (empty
    unless well formed), whether that overlaps the right object more than any other (None: several are right), IoU of
    the baselines, how many objects are meant, and the complexity of the mask."""

    iou: float
    length: int
    valid: bool
    codes: tuple[int, ...]
    mask: np.ndarray = dataclasses.field(repr=False)
    right: bool | None
    no_codes: float
    constant: float
    tokenizer: float
    tokenizer_full: float
    tokenizer_length: int
    num_targets: int
    complexity: float


class SceneEvaluation:
    """A model's answers about scenes."""

    def __init__(
        self, model: loading.LoadedModel, *, batch_size: int = 32, adaptive: bool = True, end_bias: float = 0.0
    ):
        """Takes a model with a language model, opened by `loading.load_model`.

        Args:
          model: the checkpoint.
          batch_size: requests at once.
          adaptive: ask for adaptive length; False: for all mask tokens.
          end_bias: added to the logit of the mask's end.

        Raises:
          ConfigError: a mask tokenizer alone.
        """
        if model.text is None:
            raise ConfigError(f"--checkpoint={model.directory}: a mask tokenizer alone; expected a run of stage 2 or 3")
        self._model, self._batch_size, self._adaptive = model, batch_size, adaptive
        self._answer, self._tokenize, self._decode = _programs(model.cfg, model.text.ids, end_bias)

    def run(self, kind: str, num_scenes: int, constant: tuple[np.ndarray, int] | None = None) -> list[Sample]:
        """The samples of one of KINDS; `constant`: the best constant answer, if `best_constant` has found it before."""
        fixed_codes, fixed_length = self.best_constant(kind, num_scenes) if constant is None else constant
        samples: list[Sample] = []
        for scenes, batch, found in self._batches(kind, "validation", num_scenes):
            target = np.asarray(batch.mask) > 0.5
            masks = np.asarray(found["logits"]) > 0
            valid, length, codes = (np.asarray(found[name]) for name in ("valid", "length", "codes"))
            own_codes, own_length = self._tokenize(self._model.params, batch.mask)
            full = self._decoded(own_codes, codes.shape[1], found, target)
            own = self._decoded(own_codes, own_length, found, target)
            empty = self._decoded(codes, 0, found, target)
            fixed = self._decoded(fixed_codes, fixed_length, found, target)
            iou = np.where(valid, _iou(masks, target), 0.0)
            for row, (scene, targets) in enumerate(scenes):
                samples.append(
                    Sample(
                        iou=float(iou[row]),
                        length=int(length[row]),
                        valid=bool(valid[row]),
                        codes=tuple(codes[row, : length[row]].tolist()),
                        mask=masks[row] & bool(valid[row]),
                        right=None
                        if len(targets) != 1
                        else bool(valid[row]) and _is_right(masks[row], scene, targets[0]),
                        no_codes=float(empty[row]),
                        constant=float(fixed[row]),
                        tokenizer=float(own[row]),
                        tokenizer_full=float(full[row]),
                        tokenizer_length=int(own_length[row]),
                        num_targets=len(targets),
                        complexity=mask_complexity(target[row]),
                    )
                )
        return samples

    def _decoded(self, codes: Any, length: Any, found: dict, target: np.ndarray) -> np.ndarray:
        """IoU of the masks of codes [L] or [B, L] and lengths with targets bool[B, H, W]."""
        rows, count = len(target), self._model.cfg.tokenizer.num_latent_tokens
        codes, length = np.broadcast_to(codes, (rows, count)), np.broadcast_to(length, rows).astype(np.int32)
        return _iou(np.asarray(self._decode(self._model.params, codes, length, found["features"])), target)

    def _batches(self, kind: str, split: str, count: int) -> Iterator[tuple[list, PromptBatch, dict]]:
        """Scenes with the objects that are meant, their requests, and the answers."""
        for scenes, batch in scene_prompts(self._model, kind, split, count, self._batch_size, adaptive=self._adaptive):
            rows = len(batch.prompt_ids)
            # Note: one program whatever the number of rows of the last batch.
            filled = jax.tree.map(lambda a: filled_rows(a, self._batch_size), batch)
            found = {name: value[:rows] for name, value in self._answer(self._model.params, filled).items()}
            yield scenes, batch, found

    def best_constant(self, kind: str, num_scenes: int = CANDIDATES) -> tuple[np.ndarray, int]:
        """The codes and length that fit training scenes best, of the answers to them and their tokenised masks; of
        CANDIDATES training scenes, or `num_scenes` if those that are evaluated are fewer."""
        training = list(self._batches(kind, "train", min(CANDIDATES, num_scenes)))
        candidates: list[tuple[np.ndarray, int]] = []
        for _, batch, found in training:
            own = self._tokenize(self._model.params, batch.mask)
            answers = found["codes"], found["length"]
            for codes, length in (answers, own):
                candidates += [(c, int(n)) for c, n in zip(np.asarray(codes), np.asarray(length)) if n > 0]
        best = np.zeros(len(candidates))
        for _, batch, found in training:
            target = np.asarray(batch.mask) > 0.5
            for number, (codes, length) in enumerate(candidates):
                best[number] += self._decoded(codes, length, found, target).sum()
        return candidates[int(best.argmax())]


@functools.cache
def _programs(cfg: ModelConfig, ids: SpecialIds, end_bias: float) -> tuple[Callable, Callable, Callable]:
    """The answers to a batch, the codes and lengths of masks, the masks of codes; traced once for all checkpoints."""
    size = cfg.tokenizer
    generate = GenerateConfig(max_new_tokens=size.num_latent_tokens + 24, end_logit_bias=end_bias)

    def answer(params: dict, batch: PromptBatch) -> dict[str, jax.Array]:
        with told_precision(cfg.matmul_precision):
            found = segment(cfg, params, batch, generate, ids, jax.random.key(0))
        features = apply_module(ALToLLM(cfg), params, batch.image, batch.pixel_image, method="image_features")
        return {"logits": found.mask_logits, "valid": found.valid, "length": found.length, "codes": found.codes,
                "features": features}  # fmt: skip

    def tokenize(params: dict, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        encoded = apply_module(ALTo(size), params["tokenizer"], mask, method="encode")
        codes = apply_module(ALTo(size), params["tokenizer"], encoded.z, method="quantize").codes
        return codes, apply_module(ALTo(size), params["tokenizer"], encoded, method="predict_length").num_kept

    def decode(params: dict, codes: jax.Array, length: jax.Array, features: Any) -> jax.Array:
        return apply_module(ALTo(size), params["tokenizer"], codes, length, features, method="decode_codes") > 0

    return jax.jit(answer), jax.jit(tokenize), jax.jit(decode)


def scene_prompts(
    model: loading.LoadedModel, kind: str, split: str, count: int, batch_size: int, *, adaptive: bool = True
) -> Iterator[tuple[list[tuple[Scene, list[int]]], PromptBatch]]:
    """Batches of requests of one of KINDS about `count` scenes of a split, with each scene and the objects meant.

    Args:
      model: the checkpoint that is asked.
      kind, split, count: which scenes.
      batch_size: requests at once; the last batch may have fewer.
      adaptive: ask for adaptive length; False: for all mask tokens.
    """
    scene_options, chat_options = KINDS[kind]
    config = ScenesConfig(**scene_options, split=split, num_scenes=count)
    if split == "train" and config.shapes == "split":
        config = dataclasses.replace(config, shapes="train")
    chats = ChatConfig(**chat_options)
    chats = dataclasses.replace(chats, adaptive_only=adaptive, adaptive_fraction=float(adaptive))
    source, cfg = SceneChats(config, chats), model.cfg
    assert model.text is not None  # Note: callers refuse a mask tokenizer alone.
    batches = pipeline.prompt_batches(
        source,
        model.text,
        vision_size=cfg.need_vision().image_size,
        image_size=cfg.tokenizer.image_size,
        mask_size=cfg.tokenizer.mask_size,
        num_image_tokens=cfg.num_image_tokens,
        max_prompt_length=cfg.num_image_tokens + 256,
        system=model.meta["data"]["system"],
        templates="first" if adaptive else "keep",
        batch_size=batch_size,
        seed=0,
        num_epochs=1,
        shuffle=False,
        drop_remainder=False,
    )
    done = 0
    for batch in batches:
        rows = len(batch.prompt_ids)
        drawn = [source.with_scene(i) for i in range(done, done + rows)]
        yield [(scene, scene.targets(record["masks"][0])) for scene, record in drawn], batch
        done += rows


def filled_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` rows: those given, the last one again and again behind them."""
    rows = np.asarray(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), axis=0)])


def _is_right(mask: np.ndarray, scene: Scene, target: int) -> bool:
    """Whether a predicted mask shares more pixels with the target than with any other object."""
    height, width = mask.shape
    shared = [
        float((transforms.soft_mask(o.mask.view(np.uint8) * np.uint8(255), height) * mask).sum()) for o in scene.objects
    ]
    others = [s for i, s in enumerate(shared) if i != target]
    return shared[target] > max(others, default=0.0)


def _iou(masks: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """IoU [B] of bool[B, H, W]; 1 where both are empty."""
    shared = (masks & targets).sum((1, 2))
    union = (masks | targets).sum((1, 2))
    return np.where(union > 0, shared / np.maximum(union, 1), 1.0)


def summarize(samples: Sequence[Sample]) -> dict[str, float]:
    """The row of a table: means over samples; lengths of well-formed answers alone."""
    mean = lambda name: float(np.mean([getattr(s, name) for s in samples]))
    lengths = [s.length for s in samples if s.valid]
    right = [s.right for s in samples if s.right is not None]
    row = {
        "giou": mean("iou"),
        "best_constant": mean("constant"),
        "no_codes": mean("no_codes"),
        "tokenizer": mean("tokenizer"),
        "tokenizer_32": mean("tokenizer_full"),
        "well_formed": mean("valid"),
        "distinct": len({s.codes for s in samples}) / len(samples),
        "mean_length": float(np.mean(lengths)) if lengths else 0.0,
        "std_length": float(np.std(lengths)) if lengths else 0.0,
        "samples": float(len(samples)),
    }
    return row | ({"right_object": float(np.mean(right))} if right else {})


def compare(samples: Sequence[Sample], others: Sequence[Sample]) -> dict[str, float]:
    """How far one model's answers are those of another to the same requests: means of the share of codes that differ,
    position by position up to the longer answer's end, of equal answers, and of the IoU of the two masks."""
    pairs = list(zip(samples, others, strict=True))
    changed = 0
    for one, other in pairs:
        changed += sum(a != b for a, b in itertools.zip_longest(one.codes, other.codes))
    masks, other_masks = (np.stack([sample.mask for sample in found]) for found in (samples, others))
    return {
        "changed_codes": changed / max(sum(max(len(a.codes), len(b.codes)) for a, b in pairs), 1),
        "equal_answers": float(np.mean([a.codes == b.codes for a, b in pairs])),
        "iou_of_both": float(np.mean(_iou(masks, other_masks))),
        "other_giou": float(np.mean([b.iou for _, b in pairs])),
    }


def evaluate_scenes(
    model: loading.LoadedModel,
    kinds: Sequence[str] = tuple(KINDS),
    num_scenes: int = 256,
    *,
    beside: loading.LoadedModel | None = None,
    constants: Mapping[str, tuple[np.ndarray, int]] | None = None,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """`summarize` of each kind of requests, and `compare` with the answers of another model, `beside`; options as of
    `SceneEvaluation`. `constants`: the best constant answers, if they have been found before."""
    evaluation, other = (None if m is None else SceneEvaluation(m, **options) for m in (model, beside))
    assert evaluation is not None

    def row(kind: str) -> dict[str, float]:
        constant = constants[kind] if constants else evaluation.best_constant(kind, num_scenes)
        samples = evaluation.run(kind, num_scenes, constant)
        found = {} if other is None else compare(samples, other.run(kind, num_scenes, constant))
        return summarize(samples) | found

    rows = in_order((functools.partial(row, kind) for kind in kinds), batches_at_once())
    return dict(zip(kinds, rows, strict=True))


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row if name != "samples"))
    lines = [f"| requests | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for kind, row in rows.items():
        cells = [
            f"{row[name]:.1f}" if "length" in name else f"{row[name]:.3f}" if name in row else "" for name in names
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)
