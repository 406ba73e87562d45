"""Trains three steps of every stage on several meshes, one after the other: one process of a run, or the only one.

    python tests/parallel/stages_on_processes.py FOLDER [STAGE:DATA,FSDP,TENSOR[:MICRO_BATCHES[:bucket][:packed]] ...]

Writes a folder of each case, with metrics.jsonl, into FOLDER (with "bucket" by its URL; with "packed" two conversations
share a row, of half as many); FOLDER/start is where stages 1.5, 2 and 3 begin. See test_several_processes.py.
"""

import importlib
import os
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

STAGES = ("stage1", "stage1_5", "stage2", "stage3")


def plain_config(
    stage: str, mesh: tuple[int, ...], start: str, accumulate: int = 1, pack: int = 1, samples: int = 8
) -> dict:
    """The stage's debug configuration, smaller, with as many heads as tensor devices, and `samples` samples in a batch,
    `pack` of them in each of its rows."""
    from benchmarks import reliability

    # Note: not by `alto_jax.main`, which may be the command that reads this.
    plain = importlib.import_module(f"configs.{stage}").get_config("debug").to_dict()
    plain["train"] |= {"steps": 3, "log_every": 1, "checkpoint_every": 0, "accumulate": accumulate}
    plain["train"]["batch_size"] = samples // pack
    if pack > 1:
        sizes = {name: plain["data"][name] * pack for name in ("max_length", "max_masks")}
        plain["data"] |= sizes | {"pack_samples": pack}
    plain["eval"]["num_samples"] = 0
    plain["mesh"] |= dict(zip(("data", "fsdp", "tensor"), mesh))
    plain["init_from"] = "" if stage == "stage1" else start
    plain["data"]["scenes"]["image_size"] = 32
    plain["model"]["tokenizer"] = reliability.get_config().model.tokenizer.to_dict()
    if stage in ("stage2", "stage3"):
        plain["model"]["vision"] |= {"image_size": 28, "embed_dim": 16, "mlp_dim": 16}
        plain["model"]["language_model"] |= {"num_layers": 1, "num_heads": 4}
    if stage == "stage3":
        # The paper's reward gives an untrained model nothing to learn from; this one differs where a mask begins.
        plain["grpo"]["reward"]["kind"] = "reference"
        plain["grpo"] |= {"num_generations": 8}
        plain["grpo"]["generate"] |= {"max_new_tokens": 24, "top_k": 0}
    return plain


def config_of(*arguments: Any):
    """`plain_config`, checked."""
    from alto_jax.experiment import make_experiment

    return make_experiment(plain_config(*arguments))


def main(folder: pathlib.Path, cases: list[str]) -> None:
    from alto_jax.parallel import distributed

    distributed.initialize("env" if "ALTO_COORDINATOR" in os.environ else "none")
    from alto_jax.train import loop

    for case in cases:
        stage, mesh, *words = case.split(":")
        accumulate = int(words.pop(0)) if words else 1
        if unknown := {*words} - {"bucket", "packed"}:
            raise ValueError(f"{case}: what is {', '.join(sorted(unknown))}?")
        sizes, pack = tuple(map(int, mesh.split(","))), 2 if "packed" in words else 1
        config = config_of(stage, sizes, str(folder / "start"), accumulate, pack)
        loop.train(config, f"file://{folder}/{case}" if "bucket" in words else folder / case)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
