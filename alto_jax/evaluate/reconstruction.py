"""The mask tokenizer alone: how well masks come back from their tokens, at every length and at the predicted one."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.batch import MaskBatch
from alto_jax.data.examples import mask_example
from alto_jax.data.source import Records
from alto_jax.evaluate.device import Answers, Programs
from alto_jax.mllm.alto_llm import ModelConfig
from alto_jax.stages.tokenizer import mask_iou, tokenizer_apply
from alto_jax.tokenizer.alto import ALTo


class Reconstruction:
    """IoU at every length and at the predicted one, at the tokenizer's own resolution, with image features and with
    these withheld (paper, Table 7 and Figure 8). Samples without a target are passed over."""

    family = "tokenizer"

    def __init__(
        self,
        cfg: ModelConfig,
        params: dict,
        name: str,
        source: Records,
        read: dict[str, Any],
        programs: Programs,
        counts: Sequence[int] = (),
    ):
        """`read`: how the source is read, and how far, for the options. counts: numbers of leading tokens at which IoU
        is taken, with image features alone; (): every number, also without them."""
        self._counts = tuple(counts)
        self._cfg, self._params, self.source = cfg.tokenizer, {"tokenizer": params["tokenizer"]}, source
        self.name = self.benchmark = name
        self.options = {
            "mask_size": cfg.tokenizer.mask_size,
            "image_size": cfg.tokenizer.image_size,
            "num_latent_tokens": cfg.tokenizer.num_latent_tokens,
            **read,
        }
        self._programs = programs

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int) -> dict[str, Any]:
        """A sample ready for the device; {"line": …} for one without a target."""
        record = self.source[index]
        named = {"key": record["key"], "image_name": record.get("image_name", record["key"])}
        if "phrase" in record and not record["mask"].any():
            return {"line": {"key": named["key"], "skipped": "no target"}}
        image, mask = mask_example(record, self._cfg.image_size, self._cfg.mask_size)
        return named | {"image": image, "mask": mask}

    def blank(self) -> dict[str, Any]:
        """An example to fill a batch with."""
        size = self._cfg
        image = np.zeros((size.image_size, size.image_size, 3), np.uint8)
        mask = np.ones((size.mask_size, size.mask_size), np.float32)
        return {"key": "", "image_name": "", "image": image, "mask": mask}

    def answer(self, examples: list[dict]) -> Answers:
        """IoUs of a batch."""
        batch = MaskBatch(image=np.stack([e["image"] for e in examples]), mask=np.stack([e["mask"] for e in examples]))
        return self._programs("reconstruct", self._reconstruct, self._params, batch)

    def line(self, example: dict[str, Any], answers: Answers, row: int) -> dict[str, Any]:
        """The result of a sample."""
        found = answers.found
        line = {"key": example["key"], "image": example["image_name"], "length": int(found["length"][row])}
        for name in ("iou", "iou_plain"):
            if name in found:
                line[name] = found[name][row, :-1].tolist()
                line[name.replace("iou", "iou_adaptive")] = float(found[name][row, -1])
        return line

    def headline(self, lines: list[dict]) -> dict[str, float]:
        """Numbers for the progress line."""
        good = [line["iou"][-1] for line in lines if "iou" in line]
        return {"giou of batch": float(np.mean(good))} if good else {}

    def _reconstruct(self, params: dict, batch: MaskBatch) -> dict[str, jax.Array]:
        """iou [B, L + 1] at 1..L tokens (or `counts`) and at the predicted number; iou_plain without image features."""
        apply = tokenizer_apply(ALTo(self._cfg), params)
        encoded = apply(batch.mask, method="encode")
        codes, length = apply(encoded.z, method="quantize").codes, apply(encoded, method="predict_length").num_kept
        counts = jnp.array(self._counts or range(1, self._cfg.num_latent_tokens + 1))
        lengths = jnp.concatenate([jnp.broadcast_to(counts[:, None], (len(counts), len(length))), length[None]])
        found = {"length": length}
        for name, features in (("iou", apply(batch.image, method="image_features")), ("iou_plain", None)):
            if features is None and (name == "iou" or (self._counts and "iou" in found)):
                continue
            decode = lambda k, f=features: mask_iou(apply(codes, k, f, method="decode_codes"), batch.mask)
            found[name] = jax.lax.map(decode, lengths).T
        return {"iou" if name == "iou_plain" and "iou" not in found else name: v for name, v in found.items()}
