"""A table of a rollout's samples: image, prompt, answers, masks and rewards, as HTML and JSONL.

Written to `samples/STEP.html` and `samples/STEP.jsonl` of the run's directory, a file of each per step, so that a
run that resumes writes the same files again.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from alto_jax import metrics, report
from alto_jax.batch import Rollout
from alto_jax.config import write_whole
from alto_jax.experiment import ExperimentConfig
from alto_jax.layers import apply_module
from alto_jax.mllm import text as words
from alto_jax.mllm.alto_llm import ALToLLM
from alto_jax.mllm.mask_tokens import parse_masks
from alto_jax.parallel import distributed, sharding
from alto_jax.stages.stage import SampleWriter
from alto_jax.stages.tokenizer import tokenizer_apply
from alto_jax.tokenizer.alto import ALTo


def make_writer(config: ExperimentConfig, text: Any, mesh: jax.sharding.Mesh) -> SampleWriter:
    """`log_samples(params, rollout, step, directory)`: writes the first `grpo.log_samples` prompts of a rollout.

    Args:
      config: the run; text: its `TextTokenizer`; mesh: where the rollout is.
    """
    tokenizer, count = config.model.tokenizer, config.grpo.log_samples

    @distributed.meeting
    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    @functools.partial(sharding.on_mesh, mesh)
    def describe(params: dict, rollout: Rollout) -> tuple[Rollout, dict[str, jax.Array], jax.Array]:
        """The first prompts' part of the rollout, and its masks (decoded anew: a rollout does not keep them)."""
        first = jax.tree.map(lambda a: a[:count], dataclasses.replace(rollout, image_tokens=None))
        found = parse_masks(first.completion_ids, first.completion_mask, text.ids, tokenizer.num_latent_tokens)
        codes, length = found.codes[..., 0, :], found.length[..., 0]
        prompt, group = first.prompt, first.rewards.shape[1]
        features = apply_module(
            ALToLLM(config.model), params, prompt.image, prompt.pixel_image, prompt.features, method="image_features"
        )
        if features is not None:
            features = features.repeat(group, axis=0)
        flat = lambda a: a.reshape(-1, *a.shape[2:])
        logits = tokenizer_apply(ALTo(tokenizer), params)(flat(codes), flat(length), features, method="decode_codes")
        masks = (logits > 0).reshape(*length.shape, *logits.shape[1:]) & (length > 0)[..., None, None]
        return first, {"codes": codes, "length": length, "num_masks": found.num_masks}, masks

    def log_samples(params: dict, rollout: Rollout, step: int, directory: str | os.PathLike) -> None:
        policy = {name: value for name, value in params.items() if name != "reference"}
        first, parsed, masks = jax.device_get(describe(policy, rollout))
        if jax.process_index() == 0:
            _write(pathlib.Path(directory) / "samples", step, text, first, parsed, masks)

    return log_samples


def _write(folder: pathlib.Path, step: int, text: Any, rollout: Any, parsed: dict, masks: np.ndarray) -> None:
    """Writes both files from host arrays."""
    records, tables, cards = [], {}, {}
    for b, image in enumerate(rollout.prompt.image):
        prompt_ids = rollout.prompt.prompt_ids[b][rollout.prompt.prompt_mask[b]]
        prompt = text.decode([i for i in prompt_ids.tolist() if i != text.ids.img_context])
        target = metrics.resize_probability(rollout.prompt.mask[b], *image.shape[:2]) > 0.5
        rows, samples = [], []
        for g, ids in enumerate(rollout.completion_ids[b]):
            answer = words.answer_text(text, ids[rollout.completion_mask[b, g]].tolist())
            length = int(parsed["length"][b, g])
            row = {"answer": answer, "reward": float(rollout.rewards[b, g])}
            row |= {name: float(values[b, g]) for name, values in rollout.components.items()}
            # Note: the reward's own length is that of answers with exactly one mask.
            row |= {"advantage": float(rollout.advantages[b, g]), "length": length}
            row |= {"num_masks": int(parsed["num_masks"][b, g])}
            codes = parsed["codes"][b, g, :length].tolist()
            records.append({"step": step, "prompt_index": b, "sample": g, "prompt": prompt, **row, "codes": codes})
            rows.append(row)
            samples.append(
                report.ReportSample(
                    image=image,
                    prediction=metrics.resize_probability(masks[b, g].astype(np.float32), *image.shape[:2]) > 0.5,
                    text=f"{g + 1}. reward {row['reward']:.3f}: {answer}",
                    length=length,
                    max_length=parsed["codes"].shape[-1],
                    target=target,
                    codes=codes,
                )
            )
        tables[f"Prompt {b + 1}"] = rows
        cards[f"Prompt {b + 1}: {prompt}"] = samples
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_whole(folder / f"{step:06d}.jsonl", lines)
    report.write_report(folder / f"{step:06d}.html", f"Samples of step {step}", tables=tables, samples=cards)
