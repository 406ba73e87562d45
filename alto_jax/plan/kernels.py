"""How fast the kernels of an accelerator are at each kind of work: what a step is expected to take, beside its bound.

The shares of the data sheet's rates were measured on one H100 (benchmarks/results/gpu.md says with what) and stand for
every device, until one of another kind is measured. What they leave out: waiting for data, and programs of many small
kernels, whose launches take longer than their work.
"""

from typing import Any

from alto_jax.experiment import ExperimentConfig
from alto_jax.parallel.devices import Device
from alto_jax.plan.roofline import LINKS, Work, has_flash
from alto_jax.train import flops

# Kind of work → (paths of the model's parts, share of the peak with a flash kernel, share with XLA's attention).
# From the forward passes of 12 images or prompts: "tokens12" without its tokens, "vit12", "sam12", "masks12".
KINDS = {
    "language": ("language_model", 0.66, 0.50),
    "vision": ("vision|projector", 0.41, 0.163),
    "sam": ("sam_encoder", 0.40, 0.140),
    "masks": ("tokenizer/(?!sam_encoder)", 0.25, 0.21),
}
# Of the HBM's rate: a copy, and the loop of tokens, which reads all weights for each ("decode1").
COPY, TOKENS = 0.89, 0.73
# Seconds of a kernel that is too small to matter by its work, and how many of them the adapters of a layer bring to
# each token (two for each of six products) unless they are merged.
LAUNCH, ADAPTERS = 2.5e-6, 12


def expected_seconds(
    config: ExperimentConfig,
    name: str,
    device: Device,
    number: int,
    work: Work,
    new_tokens: int,
    state_bytes: float,
    network: float | None = None,
) -> float:
    """What one program of a step should take: its kinds of work one after the other, each at its measured rate.

    Args:
      config: the run. name: "train", "update", "rollout" or "predict". device, number: which devices, and how many.
      work: what one of them moves. new_tokens: of the loop, in "rollout" and "predict".
      state_bytes: of one device's trained parameters, gradients and optimizer state, which an update reads and writes.
      network: bytes per second of one device to other slices; None with one slice.
    """
    total = 0.0
    for kind, (paths, with_flash, with_xla) in KINDS.items():
        part = _part(config.model, kind)
        if part is None:
            continue
        share = with_flash if has_flash(part) else with_xla
        total += _operations(config, name, paths, part.remat == "full") / (number * device.flops * share)
    if new_tokens:
        total += work.hbm / (TOKENS * device.bandwidth)
        if config.lora is not None and config.lora.rank and not config.grpo.merge_adapters:
            total += new_tokens * config.model.need_language_model().num_layers * ADAPTERS * LAUNCH
    else:
        total += 2 * state_bytes / (COPY * device.bandwidth)
    return total + work.links / (LINKS * device.links) + (work.network / (LINKS * network) if network else 0.0)


def _part(model: Any, kind: str) -> Any:
    """The configuration of the part of a model that does a kind of work; None if it has none."""
    parts = {"language": model.language_model, "vision": model.vision, "sam": model.tokenizer.sam}
    return parts.get(kind, model.tokenizer)


def _operations(config: ExperimentConfig, name: str, paths: str, remat: bool) -> float:
    """Operations of the parts of a model in one program, of all devices, with what is computed again."""
    if name == "predict":
        length, new = config.data.max_length, config.eval.max_new_tokens
        return config.train.batch_size * flops.answer_flops(config.model, length, new, only=paths)
    count = flops.step_flops(config, only=paths)
    if name == "rollout":
        return count.rollout * config.grpo.updates_per_rollout
    return count.forward * (2 if remat and count.backward else 1) + count.backward
