"""Answers about the built-in scenes with the dials of a request: how long masks are, what that costs and gives."""

from collections.abc import Mapping, Sequence
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.checkpoint import loading
from alto_jax.config import ConfigError
from alto_jax.evaluate.scene_answers import filled_rows, scene_prompts
from alto_jax.layers import apply_module, told_precision
from alto_jax.mllm.alto_llm import ALToLLM, segment
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.tokenizer.alto import ALTo

_WIDTHS = 64  # of prompts


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers to N requests: pixels of both masks in common and in all, tokens (0: not well formed), each [N]."""

    shared: np.ndarray
    union: np.ndarray
    length: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        """float[N]; 1 where both masks are empty."""
        return np.where(self.union > 0, self.shared / np.maximum(self.union, 1), 1.0)

    def plain(self) -> dict[str, list]:
        """As JSON has it."""
        return {field.name: np.asarray(getattr(self, field.name)).tolist() for field in dataclasses.fields(self)}

    @classmethod
    def of(cls, plain: Mapping[str, list]) -> "Answers":
        """What `plain` gave."""
        return cls(**{name: np.array(values) for name, values in plain.items()})

    def row(self) -> dict[str, float]:
        """gIoU, cIoU, mean and standard deviation of the lengths."""
        return {
            "giou": float(self.iou.mean()),
            "ciou": float(self.shared.sum() / max(self.union.sum(), 1)),
            "tokens": float(self.length.mean()),
            "std_tokens": float(self.length.std()),
        }


class Requests:
    """The requests of some kinds, drawn once, and one program that answers them whatever the parameters and dials."""

    def __init__(self, model: loading.LoadedModel, kinds: Sequence[str], count: int, *, batch_size: int = 32):
        """Takes a model with a language model.

        Args:
          model: the checkpoint; its sizes and vocabulary alone are used.
          kinds: of `scene_answers.KINDS`.
          count: requests of each kind.
          batch_size: requests at once.

        Raises:
          ConfigError: a mask tokenizer alone.
        """
        if model.text is None:
            raise ConfigError(f"--checkpoint={model.directory}: a mask tokenizer alone; expected a run of stage 2 or 3")
        size, self._batch_size = model.cfg.tokenizer.num_latent_tokens, min(batch_size, count)
        self._base = GenerateConfig(max_new_tokens=size + 24, grammar=True, max_length=size)
        self._batches: dict[tuple[str, bool], list[Any]] = {}
        self._compiled: set[tuple[str, bool]] = set()
        for kind in kinds:
            for adaptive in (True, False):
                parts = scene_prompts(model, kind, "validation", count, self._batch_size, adaptive=adaptive)
                self._batches[kind, adaptive] = _without_padding([batch for _, batch in parts])

        @jax.jit
        def answer(params: dict, batch: Any, controls: Any) -> tuple:
            given = batch, self._base.static(), model.text.ids, jax.random.key(0), None, controls
            with told_precision(model.cfg.matmul_precision):
                found = segment(model.cfg, params, *given)
            masks, target = (found.mask_logits > 0) & found.valid[:, None, None], batch.mask > 0.5
            return (masks & target).sum((1, 2)), (masks | target).sum((1, 2)), found.length * found.valid

        @jax.jit
        def cut(params: dict, batch: Any, controls: Any, counts: jax.Array) -> tuple:
            given = batch, self._base.static(), model.text.ids, jax.random.key(0), None, controls
            with told_precision(model.cfg.matmul_precision):
                answered = segment(model.cfg, params, *given)
            image = batch.image, batch.pixel_image
            features = apply_module(ALToLLM(model.cfg), params, *image, method="image_features")

            def decoded(count: jax.Array) -> tuple:
                length = count * answered.valid
                given = answered.codes, length, features
                logits = apply_module(ALTo(model.cfg.tokenizer), params["tokenizer"], *given, method="decode_codes")
                masks, target = (logits > 0) & answered.valid[:, None, None], batch.mask > 0.5
                return (masks & target).sum((1, 2)), (masks | target).sum((1, 2)), length

            return jax.lax.map(decoded, counts)

        self._answer, self._cut = answer, cut

    def ask(
        self, params: Mapping[str, Any], kind: str, *, adaptive: bool = True, change: Any = None, **dials: Any
    ) -> Answers:
        """Greedy answers, always well formed.

        Args:
          params: of a model of these sizes.
          kind: of requests.
          adaptive: ask for adaptive length; False: by the prompts for all mask tokens.
          change: batch → the batch that is asked in its place; None: as it is.
          **dials: fields of `GenerateConfig`: forced_length, end_logit_bias.
        """
        controls = dataclasses.replace(self._base, **dials).controls()
        parts = []
        for batch in self._batches[kind, adaptive]:
            rows = len(batch.prompt_ids)
            filled = self._filled(batch if change is None else change(batch))
            parts.append([np.asarray(value)[:rows] for value in self._answer(params, filled, controls)])
        return Answers(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def first_tokens(self, params: Mapping[str, Any], kind: str, counts: Sequence[int]) -> dict[int, Answers]:
        """Answers to the prompts for all mask tokens, cut to their first `counts` tokens: what an exact length gives,
        since a code does not know how many follow."""
        controls = dataclasses.replace(self._base, forced_length=self._base.max_length).controls()
        parts = []
        for batch in self._batches[kind, False]:
            found = self._cut(params, self._filled(batch), controls, jnp.asarray(counts))
            parts.append([np.asarray(value)[:, : len(batch.prompt_ids)] for value in found])
        found = (np.concatenate(column, 1) for column in zip(*parts, strict=True))
        return {count: Answers(*row) for count, *row in zip(counts, *found, strict=True)}

    def cpu_seconds(self, params: Mapping[str, Any], kind: str, *, adaptive: bool = True, **dials: Any) -> float:
        """CPU seconds of an answer of the first batch, compiled; not touched by what else runs on the machine."""
        controls = dataclasses.replace(self._base, **dials).controls()
        filled = self._filled(self._batches[kind, adaptive][0])
        if (kind, adaptive) not in self._compiled:
            jax.block_until_ready(self._answer(params, filled, controls))
            self._compiled.add((kind, adaptive))
        began = time.process_time()
        jax.block_until_ready(self._answer(params, filled, controls))
        return (time.process_time() - began) / self._batch_size

    def _filled(self, batch: Any) -> Any:
        """Note: one program whatever the number of rows of the last batch."""
        return jax.tree.map(lambda a: filled_rows(a, self._batch_size), batch)


def _without_padding(batches: list[Any]) -> list[Any]:
    """Prompt batches without what is padding on the left of all prompts, in steps of `_WIDTHS`: few programs."""
    width = max(int(np.asarray(batch.prompt_mask).sum(1).max()) for batch in batches)
    start = max(0, np.asarray(batches[0].prompt_mask).shape[1] + -width // _WIDTHS * _WIDTHS)
    cut = lambda batch: {name: np.asarray(getattr(batch, name))[:, start:] for name in ("prompt_ids", "prompt_mask")}
    return [dataclasses.replace(batch, **cut(batch)) for batch in batches]
