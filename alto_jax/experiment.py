"""The configuration of a run: what a file in `configs/` returns, as frozen dataclasses that validate."""

import dataclasses
import json
import re
from typing import Any, Literal

from alto_jax.config import ConfigError, build, local_path, require
from alto_jax.data.composition import ScenesConfig
from alto_jax.data.lessons import LessonConfig
from alto_jax.data.masks import AUTO, parse_rule
from alto_jax.data.prepared import check_root
from alto_jax.data.reading import Exif
from alto_jax.data.sa1b_folder import MAX_TARGETS
from alto_jax.data.scenes import ChatConfig, MaskConfig
from alto_jax.data.tiles import most_slots
from alto_jax.lora.adapters import LoraConfig
from alto_jax.losses.grpo import GrpoLossConfig
from alto_jax.losses.reconstruction import ReconstructionLossConfig
from alto_jax.losses.tokens import MaskLossConfig
from alto_jax.mllm.alto_llm import ModelConfig
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.parallel.sharding import MeshConfig
from alto_jax.rewards import RewardConfig
from alto_jax.storage.bucket import checked

STAGE_NAMES = ("stage0", "stage1", "stage1_5", "stage2", "stage3")
SUPERVISED_AT_ONCE = 64  # A mask of 32 tokens and a sentence around it.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the samples come from.

    source: "scenes" (built in), "sa1b" (a folder of SA-1B images and annotations; stages 1 and 1.5), "sa1b_chats" (the
    same as requests by boxes; stages 2 and 3), "jsonl" (a stage-2/3 meta file), "prepared" (what alto_jax.data.prepare
    wrote), "referring" (training splits of RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and ReasonSeg; stages 2 and 3),
    "comprehension" (the first three, answered with boxes; stages 0 and 2) or "mixture" (a JSON of these with weights).
    root: the folder; meta: the meta file ("jsonl"), the data sets with commas between ("referring", "comprehension"),
    the JSON file ("mixture").
    scenes, scene_masks, scene_chats, scene_lessons (stage 0): what the built-in data looks like. max_length: tokens of
    a row (stages 0, 2) or prompt (stage 3). max_masks: masks of a conversation. max_targets: most objects whose boxes a
    request of "sa1b_chats" names. system: system prompt; None: without.
    base_vocab_size: size of the tokenizer that is trained on the built-in data when the start checkpoint
    brings none. max_bad_fraction: share of the records that may be unreadable; they are logged and passed over, more
    are an error. length_buckets: a stage-2 batch is cut to the shortest of these lengths that its rows fit in (one
    program each; one process only), () keeps max_length. pack_samples: up to so many conversations share a row of
    stage 2 (1: each has its own); train.batch_size then counts rows, max_masks still the masks of a conversation.
    use_caches: take SAM features and mask tokens from prepared data sets that have them. num_threads: threads that
    read (0: one for each core of the machine, at most 16). num_workers: processes that read in their place, for steps
    that want more than threads of one process can give (0: none, -1: one for each core but two). memory_gb: examples
    are kept, up to so many GB a process, and given again in later epochs as they were. allow_changed: go on from a
    checkpoint of another data set, at the same place of its order. validation_fraction: share of the images, by a hash
    of their names (data/split.py), that training leaves out and evaluation takes (0: none; the built-in data hold out
    shapes of their own). replay: share of the conversations of stage 2 that are built-in ones in place of the source's
    (scenes, scene_chats), so that what a model knows of them is not lost; evaluated on its own as "replay/…".
    max_tiles (stages 0, 2): images of conversations that have no mask and name no <ref> or <box> are cut to up to so
    many tiles, and a thumbnail, see data/tiles.py (1: one tile, the whole image). max_images: images of a conversation
    at most; one of more is passed over.
    exif: EXIF orientation of images: "stored" (annotations are of the pixels as stored),
    "upright" (images and their masks are turned) or "masks_upright" (images are turned, masks were drawn on the upright
    image), see data/reading.py. mask_rule: which values of a mask file are foreground, see data/masks.py.
    """

    source: Literal["scenes", "sa1b", "sa1b_chats", "jsonl", "prepared", "referring", "comprehension", "mixture"] = (
        "scenes"
    )
    root: str = ""
    meta: str = ""
    scenes: ScenesConfig = ScenesConfig()
    scene_masks: MaskConfig = MaskConfig()
    scene_chats: ChatConfig = ChatConfig()
    scene_lessons: LessonConfig = LessonConfig()
    max_length: int = 1024
    max_masks: int = 1
    max_targets: int = MAX_TARGETS
    system: str | None = None
    base_vocab_size: int = 512
    num_threads: int = 0
    num_workers: int = 0
    memory_gb: float = 0.0
    max_bad_fraction: float = 0.001
    length_buckets: tuple[int, ...] = ()
    pack_samples: int = 1
    max_tiles: int = 1
    max_images: int = 1
    use_caches: bool = True
    allow_changed: bool = False
    validation_fraction: float = 0.0
    replay: float = 0.0
    exif: Exif = "stored"
    mask_rule: str = AUTO

    def __post_init__(self) -> None:
        _require_place(self.source, self.root, self.meta, "data")
        parse_rule(self.mask_rule)
        fits = self.validation_fraction == 0 or (self.source != "scenes" and 0 < self.validation_fraction < 1)
        expected = "0 with source 'scenes'" if self.source == "scenes" else "at least 0 and below 1"
        require(fits, "validation_fraction", self.validation_fraction, expected)
        fits = self.replay == 0 or (self.source != "scenes" and 0 < self.replay < 1)
        require(fits, "replay", self.replay, expected)
        require(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "0..1")
        for name, least in {"num_threads": 0, "num_workers": -1, "memory_gb": 0, "pack_samples": 1, "max_length": 8,
                            "max_masks": 1, "max_targets": 1, "max_tiles": 1, "max_images": 1}.items():  # fmt: skip
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        fits = all(8 <= length <= self.max_length for length in self.length_buckets)
        require(fits, "length_buckets", self.length_buckets, f"lengths in 8..{self.max_length}")
        one = self.pack_samples == 1 or not self.length_buckets
        require(one, "length_buckets", self.length_buckets, f"() with pack_samples {self.pack_samples}")
        for name in ("max_tiles", "max_images"):
            fits = self.pack_samples == 1 or getattr(self, name) == 1
            expected = f"1 with pack_samples {self.pack_samples}, as packed rows have no tiles"
            require(fits, name, getattr(self, name), expected)

    @property
    def tile_slots(self) -> int:
        """The most tiles of a row, N of ChatBatch; 0 where rows have one image of one tile, without that axis."""
        return most_slots(self.max_tiles, self.max_images) if max(self.max_tiles, self.max_images) > 1 else 0


def _require_place(source: str, root: str, meta: str, group: str) -> None:
    """Raises ConfigError if a source of `config.{group}` lacks its root or meta, or has a URL that it cannot use."""
    check_root(source, root, "root")
    local_path(meta, "meta")
    is_sa1b = source in ("sa1b", "sa1b_chats")
    require(not is_sa1b or bool(root), "root", root, f"the SA-1B folder (--config.{group}.root=DIR)")
    require(source != "jsonl" or bool(meta), "meta", meta, f"the meta file (--config.{group}.meta=FILE)")
    if source in ("prepared", "referring", "comprehension"):
        require(bool(root), "root", root, f"the data folder of source {source!r}")
    if source in ("referring", "comprehension", "mixture"):
        require(bool(meta), "meta", meta, "data set names (referring, comprehension) or a JSON file (mixture)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: steps (updates), batch_size (global; stage 3: prompts), log_every and checkpoint_every (in updates).

    accumulate: micro-batches of an update, one after the other; the same gradient with less memory.
    checkpoint_minutes: also saved when so many minutes have passed since the last save (0: never).
    checkpoint_local_every: after so many updates the state is also kept on each machine, in ALTO_LOCAL (0: never); see
    `alto_jax.checkpoint.nearby`. checkpoint_one_reader: where a run goes on, one of the processes that hold the same
    parts of the state reads them, and the others get them over the devices' links.
    keep_checkpoints: the newest so many are kept, and beside them the keep_best whose best_metric (a name in
    metrics.jsonl, such as "loss", as last logged, or "eval/giou", of that update) is best by best_mode.
    max_restarts: starts in a row that may die without a new checkpoint before the next is refused (0: no limit).
    max_bad_steps: the run ends with an error after so many skipped updates in a row. spike_sigmas: also skip updates
    whose loss is so many standard deviations above the mean of the last ones (0: off); see `alto_jax.train.step`.
    profile_steps: updates that are traced into WORKDIR/profile, from the third one on (0: none).
    patience: the run ends after so many evaluations in a row (every eval.every updates) whose best_metric is no better
    than the best before, and in any case with the parameters of the best (0: it ends at its last update, with those).
    writers: metrics also go to "wandb", "mlflow" or both ("wandb,mlflow"); "": to the run's directory alone.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    log_every: int = 50
    checkpoint_every: int = 500
    checkpoint_minutes: float = 0.0
    checkpoint_local_every: int = 0
    checkpoint_one_reader: bool = False
    max_restarts: int = 20
    keep_checkpoints: int = 2
    keep_best: int = 0
    best_metric: str = "loss"
    best_mode: Literal["min", "max"] = "min"
    max_bad_steps: int = 10
    spike_sigmas: float = 0.0
    profile_steps: int = 0
    patience: int = 0
    writers: str = ""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.log_every >= 1, "log_every", self.log_every, "at least 1")
        require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "at least 1")
        divides = self.accumulate >= 1 and self.batch_size % self.accumulate == 0
        require(divides, "accumulate", self.accumulate, f"a divisor of batch_size {self.batch_size}")
        for name in ("checkpoint_minutes", "checkpoint_local_every", "max_restarts", "keep_best", "spike_sigmas",
                     "profile_steps", "patience"):  # fmt: skip
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(self.max_bad_steps >= 1, "max_bad_steps", self.max_bad_steps, "at least 1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation in training: every so many updates (0: only at the end), on num_samples, batch_size at once.

    at_start: also before the first update; the end then prints both beside each other.

    source, root, meta: a data set of its own, as in `data` ("referring": also other splits, such as refcoco_val); "":
    the images that `data.validation_fraction` keeps from training, else the shapes that the built-in data keep from it,
    else the training data themselves, and then the metrics are named "eval_train/…" instead of "eval/…".
    token_counts: numbers of leading tokens at which the tokenizer's IoU is reported. max_new_tokens: longest
    answer of the MLLM.
    """

    every: int = 0
    num_samples: int = 256
    batch_size: int = 32
    token_counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    max_new_tokens: int = 64
    source: Literal[
        "", "scenes", "sa1b", "sa1b_chats", "jsonl", "prepared", "referring", "comprehension", "mixture"
    ] = ""
    root: str = ""
    meta: str = ""
    at_start: bool = False

    def __post_init__(self) -> None:
        _require_place(self.source, self.root, self.meta, "eval")
        for name in ("root", "meta"):
            value = getattr(self, name)
            require(bool(self.source) or not value, name, value, "empty without eval.source")
        require(self.num_samples >= 0, "num_samples", self.num_samples, "at least 0")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


@dataclasses.dataclass(frozen=True)
class TokenizerStageConfig:
    """Stages 1 and 1.5, with the weights of loss and the commitment_cost of latents that are far from their codes.

    keep_tokens: "random" draws the number of kept tokens uniformly from 1..L per mask, "adaptive" takes
    the length predictor's, "full" keeps all. unquantized_steps: updates at the start without
    quantisation. reseed_every: updates between re-seedings of dead codes (0: never), until
    reseed_until updates; reseed_threshold: a code is dead below this share of its fair use.
    length_loss_reaches_encoder: Compat: the reference lets gradients through what the length predictor reads, so that
    its loss moves the encoder (the golden gradients hold that part); False, in every configuration here: none do.
    withhold_image: share of the samples, drawn anew each update, whose image features are zero in the loss: a
    de-tokenizer that always has them learns to draw whatever looks like an object, and its codes carry nothing.
    """

    keep_tokens: Literal["random", "adaptive", "full"] = "random"
    loss: ReconstructionLossConfig = ReconstructionLossConfig()
    commitment_cost: float = 0.01
    unquantized_steps: int = 0
    reseed_every: int = 0
    reseed_until: int = 0
    reseed_threshold: float = 0.1
    length_loss_reaches_encoder: bool = True
    withhold_image: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.withhold_image <= 1, "withhold_image", self.withhold_image, "0..1")


@dataclasses.dataclass(frozen=True)
class SftStageConfig:
    """Stage 2. max_supervised: 0 scores every supervised token, however long an answer is: SUPERVISED_AT_ONCE of a
    conversation at a time, in as many turns as the longest answer of a batch needs. A number is a bound (in packed
    rows: on average), and a longer answer ends the run. mask_loss_weight: weight of the loss of the mask decoded from
    the soft tokens (0: not computed), mask_loss: its terms."""

    max_supervised: int = 0
    mask_loss_weight: float = 1.0
    mask_loss: MaskLossConfig = MaskLossConfig()

    def __post_init__(self) -> None:
        require(self.max_supervised >= 0, "max_supervised", self.max_supervised, "at least 0")
        require(self.mask_loss_weight >= 0, "mask_loss_weight", self.mask_loss_weight, "at least 0")

    @property
    def at_once(self) -> int:
        """Supervised tokens of a conversation whose logits exist at the same time."""
        return self.max_supervised or SUPERVISED_AT_ONCE


@dataclasses.dataclass(frozen=True)
class GrpoStageConfig:
    """Stage 3: how answers are sampled (generate), what they are worth (reward, advantage_normalization), and the loss.

    num_generations: G, completions per prompt. updates_per_rollout: optimizer steps on each rollout. minibatches: parts
    of a rollout (by prompts); each update takes the next one. max_rollouts: DAPO's dynamic sampling: groups
    whose rewards are all equal are replaced by those of fresh prompts, in up to so many rollouts an update (1: never).
    logits_at_once: tokens of each completion whose logits over the vocabulary exist at the same time (0: all).
    merge_adapters: a run of adapters samples from parameters with these added in, in the parameters' type.
    log_samples_every: updates between two tables of samples in the run's folder `samples` (0: never), of
    log_samples prompts.
    """

    num_generations: int = 12
    updates_per_rollout: int = 1
    minibatches: int = 1
    max_rollouts: int = 1
    logits_at_once: int = 16
    merge_adapters: bool = True
    log_samples_every: int = 0
    log_samples: int = 2
    advantage_normalization: Literal["paper", "reference", "none"] = "paper"
    generate: GenerateConfig = GenerateConfig(max_new_tokens=48, temperature=1.0, top_k=10)
    reward: RewardConfig = RewardConfig()
    loss: GrpoLossConfig = GrpoLossConfig()

    def __post_init__(self) -> None:
        require(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2")
        updates, parts = self.updates_per_rollout, self.minibatches
        require(updates >= 1, "updates_per_rollout", updates, "at least 1")
        require(parts >= 1 and updates % parts == 0, "minibatches", parts, f"a divisor of the {updates} updates")
        for name, least in (("log_samples_every", 0), ("log_samples", 1), ("logits_at_once", 0), ("max_rollouts", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        temperature = self.generate.temperature
        require(temperature > 0, "generate.temperature", temperature, "more than 0 to sample")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (b1, b2, eps, weight_decay) and its schedule: lr is the highest rate, after warmup_steps updates.

    schedule: "cosine" (one warm-up, then cosine to `final_ratio`), "constant" (no warm-up), or
    "reference" (the reference's stage 1, with its second warm-up). trainable, no_decay: regexes on
    parameter paths. clip_norm: global L2 norm of the gradient. ema_decay: moving average of the trained
    parameters (0: none), which evaluation, prediction and the next stage then take; the first updates count more,
    min(decay, (1 + n) / (10 + n)). param_dtype, frozen_dtype: type in which trained and frozen parameters are kept
    ("": the model's; gradients, optimizer state and average are float32 in any case). frozen_float32: regex of
    frozen parameters that keep their type, since the codes, lengths or pixels depend on every digit.
    """

    lr: float = 1e-5
    schedule: Literal["cosine", "constant", "reference"] = "cosine"
    warmup_steps: int = 1000
    final_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    trainable: str = ".*"
    no_decay: str = "^$"
    ema_decay: float = 0.0
    param_dtype: Literal["", "float32", "bfloat16"] = ""
    frozen_dtype: Literal["", "float32", "bfloat16"] = ""
    frozen_float32: str = "^tokenizer/(quantizer|length|pixel_decoder)/"

    def __post_init__(self) -> None:
        require(self.lr >= 0, "lr", self.lr, "at least 0")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        require(0 <= self.final_ratio <= 1, "final_ratio", self.final_ratio, "0..1")
        require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, "b1, b2", (self.b1, self.b2), "0 <= b < 1")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "more than 0")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "at least 0 and below 1")
        for name in ("trainable", "no_decay", "frozen_float32"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One stage's run: stage, model, seed of all random numbers, and a group of fields for each of data, optim, mesh,
    train, eval, tokenizer (stages 1, 1.5), sft (0, 2), grpo (3) and lora. init_from: directory of the run (or converted
    checkpoint) that it starts from. tokenizer_from: one that the mask tokenizer is taken from, if it is another one
    (a stage 2 from stage 0, which has none)."""

    stage: Literal["stage0", "stage1", "stage1_5", "stage2", "stage3"]
    model: ModelConfig
    seed: int = 0
    init_from: str = ""
    tokenizer_from: str = ""
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    tokenizer: TokenizerStageConfig = TokenizerStageConfig()
    sft: SftStageConfig = SftStageConfig()
    grpo: GrpoStageConfig = GrpoStageConfig()
    lora: LoraConfig = LoraConfig()

    def __post_init__(self) -> None:
        checked(self.init_from, "init_from")
        checked(self.tokenizer_from, "tokenizer_from")
        allowed = not self.tokenizer_from or self.stage in ("stage2", "stage3")
        require(allowed, "tokenizer_from", self.tokenizer_from, f"empty in {self.stage}")
        if self.lora.rank:
            require(self.stage in ("stage2", "stage3"), "lora.rank", self.lora.rank, f"0 in {self.stage}")
        if self.train.patience:
            self._require_best()
        if self.data.tile_slots:
            self._require_room_for_tiles()
        require(not self.data.replay or self.stage == "stage2", "data.replay", self.data.replay, "0 but in stage2")
        if self.train.accumulate > 1:
            whole = {"sft.mask_loss.dice_reduction": self.sft.mask_loss.dice_reduction == "batch",
                     "grpo.loss.objective": self.stage == "stage3" and self.grpo.loss.objective == "dapo"}  # fmt: skip
            for name in (name for name, is_whole in whole.items() if is_whole):
                raise ConfigError(f"train.accumulate: expected 1, since {name} looks at the batch as a whole")
        if self.stage == "stage0":
            require(self.sft.mask_loss_weight == 0, "sft.mask_loss_weight", self.sft.mask_loss_weight, "0 in stage0")
        if self.stage in ("stage0", "stage2", "stage3"):
            is_whole = self.model.language_model is not None
            require(is_whole, "model.language_model", None, f"the sizes that {self.stage} needs")
        if self.stage == "stage3":
            parts, rows = self.grpo.minibatches, self.train.batch_size
            require(rows % parts == 0, "grpo.minibatches", parts, f"a divisor of train.batch_size {rows}")

    def _require_room_for_tiles(self) -> None:
        """Raises ConfigError in a stage without tiles, or if the image tokens of a row fill it."""
        for name in ("max_tiles", "max_images"):
            value = getattr(self.data, name)
            require(value == 1 or self.stage in ("stage0", "stage2"), f"data.{name}", value, f"1 in {self.stage}")
        if self.model.vision is not None:
            tokens, slots = self.model.num_image_tokens, self.data.tile_slots
            expected = f"more than the {tokens * slots} image tokens of {slots} tiles (data.max_tiles, data.max_images)"
            require(self.data.max_length > tokens * slots, "data.max_length", self.data.max_length, expected)

    def _require_best(self) -> None:
        """Raises ConfigError if a run with patience would have no evaluation, or no checkpoint of the best one."""
        train, every = self.train, self.eval.every
        measured = train.best_metric.startswith("eval") and self.eval.num_samples
        require(bool(measured), "train.best_metric", train.best_metric, "an evaluation's, with train.patience")
        require(every > 0, "eval.every", every, "above 0 with train.patience")
        require(train.keep_best > 0, "train.keep_best", train.keep_best, "at least 1 with train.patience")
        saved = train.checkpoint_every > 0 and every % train.checkpoint_every == 0
        require(saved, "train.checkpoint_every", train.checkpoint_every, f"a divisor of eval.every {every}")
        updates = self.grpo.updates_per_rollout if self.stage == "stage3" else 1
        require(every % updates == 0, "eval.every", every, f"a multiple of grpo.updates_per_rollout {updates}")

    @property
    def trainable(self) -> str:
        """Regex of the trained parameters: `optim.trainable`, or the adapters alone if there are some."""
        return r"/lora_[ab]$" if self.lora.rank else self.optim.trainable


def make_experiment(values: Any) -> ExperimentConfig:
    """Builds the configuration from the values that `get_config` returned (with the command line's changes).

    Raises:
      ConfigError: naming the field and the value.
    """
    plain = json.loads(values.to_json_best_effort()) if hasattr(values, "to_json_best_effort") else values
    return build(ExperimentConfig, plain)
