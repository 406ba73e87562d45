"""The planner against what ran: memory and time of training steps on one H100, estimated and measured.

    python benchmarks/plan_gpu.py

Reads benchmarks/results/gpu_before.jsonl ("before": XLA's attention) and gpu.jsonl (what benchmarks/gpu.py measured
of the tree as it is), estimates each training case from shapes alone, and writes benchmarks/results/plan_gpu.md.
"""

from collections.abc import Mapping
import functools
import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from alto_jax.experiment import make_experiment  # noqa: E402
from alto_jax.main import load_config  # noqa: E402
from alto_jax.plan import programs, types  # noqa: E402
from benchmarks.gpu_common import with_attention  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
# case → (configuration, changes): as in benchmarks/gpu_training.py
CASES = {
    "stage2_2b": ("stage2.py:2b", {"train": {"batch_size": 16}, "data": {"max_length": 512}}),
    "stage2_2b_cached": (
        # Note: without the image encoder, whose features are given; its weights are held all the same, 1.2 GB.
        "stage2.py:2b", {"train": {"batch_size": 16}, "data": {"max_length": 512}, "model.tokenizer": {"sam": None}},
    ),
    "stage1_base": ("stage1.py:base", {"train": {"batch_size": 32}}),
    "stage3_8b_lora": (
        "stage3.py:8b",
        # Note: adapters lay beside the kernels in the rollouts that gpu.jsonl has.
        {"train": {"batch_size": 4}, "data": {"max_length": 320}, "lora": {"rank": 16},
         "grpo": {"merge_adapters": False}},
    ),
}  # fmt: skip
HEAD = """# The planner against one H100

`python benchmarks/plan_gpu.py`: `plan --estimate` from shapes alone beside what ran. "bound" is what the card's data
sheet allows (everything overlapping, compute at 60 %, HBM at 80 %), "expected" goes by the rates that kernels had on
the card for each kind of work (alto_jax/plan/kernels.py): of forward passes and of the loop of tokens, not of these
steps. How much of a step's activations is held at once was set by these peaks. Estimates are of the programs as they
are: when "stage3_8b_lora, before" was measured, its loop of tokens read stacked weights (0.28 of the HBM's rate, now
0.73), the prompt's caches were kept once a layer by rematerialisation, and all logits were in memory at once.

"""


def estimate(case: str, before: bool, given: Mapping[str, Any] | None = None) -> dict[str, float]:
    """{"gb", "bound_ms", "expected_ms"} of one step of a case, from shapes; given: {"a.b": value}, the run's own."""
    file, changes = CASES[case]
    values = load_config(str(ROOT / "configs" / file)).to_dict()
    for path, fields in changes.items():
        functools.reduce(lambda group, name: group.setdefault(name, {}), path.split("."), values).update(fields)
    for path, value in (given or {}).items():
        *groups, field = path.split(".")
        group = functools.reduce(lambda tree, name: (tree or {}).setdefault(name, {}), groups, values)
        if group is not None:  # Note: else of a part that this stage's model does not have.
            group[field] = value
    config = make_experiment(values)
    config = with_attention(config, "xla") if before else config
    plan = programs.make_plan(config, types.Options(file, topology="h100-80g:1", mesh="1,1,1", estimate=True))
    most = max(program.hbm["total"] or 0 for program in plan.programs)
    times = {name: sum(program.seconds[key] for program in plan.programs) * 1e3
             for name, key in (("bound_ms", "estimate"), ("expected_ms", "expected"))}  # fmt: skip
    return {"gb": most / 1e9, **times}


def rows() -> list[dict]:
    """Each measured training case beside its estimate."""
    found = []
    for name in ("gpu_before.jsonl", "gpu.jsonl"):
        for line in (RESULTS / name).read_text().splitlines():
            record = json.loads(line)
            if record["case"] in CASES and record["variant"] in ("before", "after"):
                found.append(
                    {**record, **estimate(record["case"], record["variant"] == "before", record.get("set", {}))}
                )
    return found


def main() -> None:
    """Writes and prints the table."""
    lines = [
        "| case | GB measured | GB estimated | ms measured | ms bound | ms expected | memory | time |",
        "|---" * 8 + "|",
    ]
    for row in rows():
        lines.append(
            f"| {row['case']}, {row['variant']} | {row['peak_gb']:.1f} | {row['gb']:.1f} | {row['ms']:.0f} |"
            f" {row['bound_ms']:.0f} | {row['expected_ms']:.0f} | {row['gb'] / row['peak_gb'] - 1:+.0%} |"
            f" {row['expected_ms'] / row['ms'] - 1:+.0%} |"
        )
    text = HEAD + "\n".join(lines) + "\n"
    (RESULTS / "plan_gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
