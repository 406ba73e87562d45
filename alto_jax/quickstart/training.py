"""All stages in sequence in one directory, then predictions on held-out shapes, a table and a report.

The directory receives one run per stage (stage1/, stage1_5/, …), summary.json with the printed numbers,
report.html and figures. Running it again goes on where it stopped.
"""

import json
import pathlib
import time

import numpy as np

from alto_jax import figures, report
from alto_jax.config import local_path
from alto_jax.data import sources
from alto_jax.experiment import ExperimentConfig, make_experiment
from alto_jax.inference import segmenter
from alto_jax.inference.tokenizer import TokenizerModel
from alto_jax.train.loop import train
from alto_jax.train.workdir import claim_workdir

# What each stage begins with.
STARTS: dict[str, dict[str, str]] = {
    "stage0": {},
    "stage1": {},
    "stage1_5": {"init_from": "stage1"},
    "stage2": {"init_from": "stage0", "tokenizer_from": "stage1_5"},
    "stage3": {"init_from": "stage2"},
}
_KINDS = {"eval": "held-out", "eval_train": "training"}


def run(values: dict, workdir: str) -> dict:
    """Runs the stages of `values["stages"]`, each from the one before, and reports.

    Args:
      values: {"stages": names, NAME: the stage's configuration as plain values, "num_predictions": N}.
      workdir: the directory.

    Returns:
      The summary, as in summary.json.
    """
    began = time.monotonic()
    root = local_path(workdir, "--workdir")
    configs, results = {}, {}
    # Note: all directories are claimed before the first training, so that a mismatch is not found an hour later.
    for name in values["stages"]:
        starts = {field: str(root / previous) for field, previous in STARTS[name].items()}
        configs[name] = make_experiment({**values[name], **starts})
        claim_workdir(root / name, configs[name])
    for name, config in configs.items():
        results[name] = train(config, root / name)
    summary = summarize(results)
    began_report = time.monotonic()
    kinds = {name: _KINDS[sources.evaluated_on(config)] for name, config in configs.items()}
    samples = {
        f"Mask tokenizer: {kinds['stage1_5']} masks, encoded and decoded": tokenizer_samples(
            configs["stage1_5"], root / "stage1_5", values["num_predictions"]
        ),
        f"MLLM after stage 3: {kinds['stage3']} scenes": mllm_samples(
            configs["stage3"], root / "stage3", values["num_predictions"]
        ),
    }
    summary["seconds"]["report"] = round(time.monotonic() - began_report, 1)
    summary["seconds"]["this_command"] = round(time.monotonic() - began, 1)
    write(root, summary, results, configs, samples)
    print_table(summary)
    print(f"report: {root / 'report.html'}")
    return summary


def evaluation(result: dict) -> dict:
    """The numbers of a stage's last evaluation; of training data (`sources.evaluated_on`) if nothing was held out."""
    return result["eval"] if "eval" in result else result["eval_train"]


def summarize(results: dict[str, dict]) -> dict:
    """The printed numbers from the stages' results."""
    tokenizer = evaluation(results["stage1_5"])
    names = (
        "giou_full",
        "giou_by_tokens",
        "giou_adaptive",
        "giou_fixed_same_mean",
        "mean_length",
        "std_length",
        "codes_used",
    )
    summary: dict = {"tokenizer": {name: tokenizer[name] for name in names}}
    lessons = evaluation(results["stage0"])
    summary["stage0"] = {name: value for name, value in lessons.items() if isinstance(value, float)}
    first, last = (results["stage2"][f"metrics_{part}"] for part in ("first", "last"))
    mllm = ("giou", "giou_no_codes", "format_rate", "distinct", "mean_length", "std_length")
    summary["stage2"] = {name: evaluation(results["stage2"])[name] for name in mllm}
    summary["stage2"] |= {"loss_first": first["loss"], "loss_last": last["loss"]}
    first, last = (results["stage3"][f"metrics_{part}"] for part in ("first", "last"))
    summary["stage3"] = {name: evaluation(results["stage3"])[name] for name in mllm}
    summary["stage3"] |= {"reward_first": first["reward"], "reward_last": last["reward"]}
    summary["seconds"] = {name: result["seconds"] for name, result in results.items()}
    return summary


def tokenizer_samples(config: ExperimentConfig, workdir: pathlib.Path, count: int) -> list[report.ReportSample]:
    """Held-out masks through encoder and decoder, by adaptive length."""
    model, source = segmenter.load(workdir), sources.mask_source(config, held_out=True)
    samples = []
    for index in range(min(count, len(source))):
        record = source[index]
        target = record["mask"] > 127
        codes = model.encode(record["mask"])
        prediction = model.decode(codes, target.shape, record["image"])
        samples.append(_sample(record["image"], target, prediction, "reconstruction", codes, model))
    return samples


def mllm_samples(config: ExperimentConfig, workdir: pathlib.Path, count: int) -> list[report.ReportSample]:
    """Requests for held-out objects, answered by the last checkpoint."""
    model, source = segmenter.load(workdir), sources.chat_source(config, held_out=True, adaptive_only=True)
    assert isinstance(model, segmenter.Segmenter)  # Note: what stages 2 and 3 leave behind.
    samples = []
    for index in range(min(count, len(source))):
        record = source[index]
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        result = model.segment(record["image"], prompt=question)
        target = record["masks"][0] > 127
        samples.append(_sample(record["image"], target, result.mask, question, result.codes, model))
    return samples


def _sample(
    image: np.ndarray,
    target: np.ndarray,
    prediction: np.ndarray,
    text: str,
    codes: list[int],
    model: TokenizerModel,
) -> report.ReportSample:
    union = np.sum(target | prediction)
    return report.ReportSample(
        image=image,
        prediction=prediction,
        text=text,
        length=len(codes),
        max_length=model.cfg.tokenizer.num_latent_tokens,
        target=target,
        iou=float(np.sum(target & prediction) / union) if union else 1.0,
        codes=codes,
    )


def write(root: pathlib.Path, summary: dict, results: dict, configs: dict, samples: dict) -> None:
    """Writes summary.json, report.html and the figures."""
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    tokenizer = summary["tokenizer"]
    num_tokens = configs["stage1_5"].model.tokenizer.num_latent_tokens
    curve = figures.iou_curve_figure(
        {"fixed length": tokenizer["giou_by_tokens"]},
        {"adaptive": (tokenizer["mean_length"], tokenizer["giou_adaptive"])},
    )
    lengths = {
        "tokenizer (length predictor)": evaluation(results["stage1_5"])["lengths"],
        "MLLM after stage 2": evaluation(results["stage2"])["lengths"],
        "MLLM after stage 3": evaluation(results["stage3"])["lengths"],
    }
    histogram = figures.length_histogram_figure({k: v for k, v in lengths.items() if v}, num_tokens)
    points = ", ".join(f"{v:.2f} with {k}" for k, v in tokenizer["giou_by_tokens"].items())
    report.write_report(
        root / "report.html",
        "ALTo in JAX: quickstart",
        tables={"All stages": report.stage_rows(summary), "IoU by number of tokens": [tokenizer["giou_by_tokens"]]},
        figures={
            "IoU against tokens": (curve, f"gIoU of the mask tokenizer on held-out shapes: {points} tokens"),
            "Length histogram": (histogram, "How many mask tokens were used, per model"),
        },
        samples=samples,
        notes=[
            "All stages trained from nothing on built-in scenes (OpenMoji shapes on photos). The mask tokenizer is "
            "evaluated on shapes that training never showed, the language model on new scenes of names that it knows.",
            "The mask tokenizer learns to draw masks in minutes; the language model takes hours to find things: read "
            f"its gIoU ({summary['stage3']['giou']:.2f}; after stage 2 {summary['stage2']['giou']:.2f}) beside the "
            f"one of a mask decoded from no codes at all ({summary['stage3']['giou_no_codes']:.2f}).",
        ],
    )


def print_table(summary: dict) -> None:
    """Prints the summary, a stage a block of lines."""
    for stage, values in summary.items():
        print(f"\n{stage}")
        for name, value in values.items():
            if isinstance(value, dict):
                value = "  ".join(f"{k}: {v:.3f}" for k, v in value.items())
            else:
                value = report.format_value(value)
            print(f"  {name:22} {value}")
