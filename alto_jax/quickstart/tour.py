"""Five minutes with a checkpoint that can do something: pictures, an evaluation, and a length that GRPO shortens.

The directory receives pictures/ (first), scenes of the checkpoint and of two short runs of stage 3 at two length
penalties, summary.json and report.html. Running it again goes on where it stopped.
"""

import functools
import json
import pathlib
import time
from typing import Any

from alto_jax import figures, metrics, report
from alto_jax.checkpoint import loading
from alto_jax.config import local_path, write_whole
from alto_jax.data.composition import ScenesConfig
from alto_jax.data.scenes import ChatConfig, SceneChats
from alto_jax.evaluate import scene_answers
from alto_jax.experiment import make_experiment
from alto_jax.inference import segmenter
from alto_jax.mllm import text
from alto_jax.parallel.at_once import batches_at_once, in_order
from alto_jax.train.loop import train
from alto_jax.train.workdir import claim_workdir

_NUM_PICTURES = 3
_CONSTANT_SCENES = 16  # that the best constant answers are looked for in: every answer to them is tried on all of them
_BATCH_SIZE = 32  # scenes that are answered at once
_STEPS_SHOWN = (1, 2, 4, 8, 16, 32)


def run(values: dict, workdir: str) -> dict:
    """Segments three pictures, evaluates, trains, evaluates again, and reports.

    Args:
      values: {"checkpoint": run or name, "stages": names of the runs of stage 3, NAME: their configurations,
        "num_scenes": of each kind of request, "kinds": that are evaluated after stage 3}.
      workdir: the directory.

    Returns:
      The summary, as in summary.json.
    """
    began = time.monotonic()
    root = local_path(workdir, "--workdir")
    configs = {name: make_experiment({**values[name], "init_from": values["checkpoint"]}) for name in values["stages"]}
    for name, config in configs.items():
        claim_workdir(root / name, config)
    samples, strips = _pictures(values["checkpoint"], root / "pictures", began)
    model = loading.load_model(values["checkpoint"], for_inference=True)
    summary: dict[str, Any] = {"scenes": {}, "lengths": {}, "stage3": {}, "seconds": {}}
    found, clock = {}, time.monotonic()
    size = {"batch_size": min(values["num_scenes"], _BATCH_SIZE)}
    evaluation = scene_answers.SceneEvaluation(model, **size)
    few = min(_CONSTANT_SCENES, values["num_scenes"])
    constants = {}

    def evaluate(kind: str) -> list[scene_answers.Sample]:
        constants[kind] = evaluation.best_constant(kind, few)
        return evaluation.run(kind, values["num_scenes"], constants[kind])

    calls = (functools.partial(evaluate, kind) for kind in scene_answers.KINDS)
    for kind, answered in zip(scene_answers.KINDS, in_order(calls, batches_at_once()), strict=True):
        found[kind] = answered
        summary["scenes"][kind] = scene_answers.summarize(answered)
    summary["lengths"] = length_correlations(found["boxes"])
    summary["seconds"]["evaluation"] = round(time.monotonic() - clock, 1)
    print(scene_answers.table(summary["scenes"]), flush=True)
    before = {kind: summary["scenes"][kind] for kind in values["kinds"]}
    rows = [{"run": "checkpoint", "length penalty": None, **_short(before)}]
    for name, config in configs.items():
        result = train(config, root / name)
        trained = loading.load_model(root / name, for_inference=True)
        # Note: stage 3 leaves the codes as they are, so that the constant answers stay the same.
        after = scene_answers.evaluate_scenes(
            trained, values["kinds"], values["num_scenes"], constants=constants, **size
        )
        summary["stage3"][name] = after
        summary["seconds"][name] = result["seconds"]
        rows.append({"run": name, "length penalty": config.grpo.reward.length_weight, **_short(after)})
    summary["seconds"]["this_command"] = round(time.monotonic() - began, 1)
    write_whole(root / "summary.json", json.dumps(summary, indent=2) + "\n")
    _write_report(root, values, summary, rows, found, samples, strips)
    print(_lines(rows))
    print(f"report: {root / 'report.html'}")
    return summary


def _pictures(checkpoint: str, folder: pathlib.Path, began: float) -> tuple[list[report.ReportSample], list[list[Any]]]:
    """Answers about built-in pictures, as files; and each mask after its first tokens."""
    model = segmenter.load(checkpoint)
    assert isinstance(model, segmenter.Segmenter)  # Note: `SceneEvaluation` refuses anything else, too.
    scene_options, chat_options = scene_answers.KINDS["names"]
    source = SceneChats(ScenesConfig(**scene_options, split="validation", seed=1), ChatConfig(**chat_options))
    folder.mkdir(parents=True, exist_ok=True)
    samples, strips = [], []
    for index in range(_NUM_PICTURES):
        record = source[index]
        phrase = text.find_reference(record["conversations"][0]["value"])
        assert phrase is not None  # Note: every record asks for a mask.
        result = model.segment(record["image"], phrase, target=record["masks"][0])
        report.save_overlay(folder / f"{index}.png", record["image"], result.mask)
        if not index:
            print(f"first mask after {time.monotonic() - began:.1f} s: {folder / '0.png'}", flush=True)
        samples.append(
            report.ReportSample(
                image=record["image"],
                prediction=result.mask,
                text=phrase.removeprefix(text.REF).removesuffix(text.REF_END),
                length=len(result.codes),
                max_length=model.cfg.tokenizer.num_latent_tokens,
                target=record["masks"][0] > 0,
                iou=result.iou,
                codes=result.codes,
            )
        )
        codes = result.codes or model.encode(record["masks"][0])
        kept = [k for k in _STEPS_SHOWN if k < len(codes)] + [len(codes)]
        masks = [model.decode(codes[:k], record["image"].shape[:2], record["image"]) for k in kept]
        titles = [f"{k} token{'s' * (k != 1)}" for k in kept]
        strips.append([(t, report.overlay(record["image"], mask)) for t, mask in zip(titles, masks, strict=True)])
    return samples, strips


def length_correlations(samples: list[scene_answers.Sample]) -> dict[str, float]:
    """Spearman correlations of lengths with the number of targets and with the complexity of the mask: of the model's
    answers, and of the length predictor's."""
    found = {}
    for whose, name in (("answers", "length"), ("tokenizer", "tokenizer_length")):
        lengths = [getattr(s, name) for s in samples if s.valid or name != "length"]
        kept = [s for s in samples if s.valid or name != "length"]
        for what in ("num_targets", "complexity"):
            found[f"{whose}_{what}"] = metrics.spearman(lengths, [getattr(s, what) for s in kept])
    return found


def _short(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    names = {"giou": "gIoU", "mean_length": "tokens", "std_length": "± tokens", "well_formed": "well-formed"}
    return {f"{kind}: {shown}": row[name] for kind, row in rows.items() for name, shown in names.items()}


def _lines(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        cells = [f"{name} {report.format_value(value)}" for name, value in row.items() if name != "run"]
        lines.append(f"{row['run']}: {', '.join(cells)}")
    return "\n".join(lines)


def _write_report(
    root: pathlib.Path,
    values: dict,
    summary: dict,
    rows: list[dict],
    found: dict[str, list[scene_answers.Sample]],
    samples: list[report.ReportSample],
    strips: list[list[Any]],
) -> None:
    several = [s for s in found["boxes"] if s.valid]
    scatter = figures.scatter_figure(
        {
            "number of targets": ([s.num_targets for s in several], [s.length for s in several]),
            "complexity of the mask": ([s.complexity for s in several], [s.length for s in several]),
        },
        "mask tokens",
    )
    told = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in summary["lengths"].items())
    histogram = figures.length_histogram_figure(
        {kind: [s.length for s in part if s.valid] or [0] for kind, part in found.items()},
        samples[0].max_length,
    )
    table = [
        {"requests": kind, **{n.replace("_", " "): v for n, v in row.items()}}
        for kind, row in summary["scenes"].items()
    ]
    report.write_report(
        root / "report.html",
        "ALTo in JAX: a tour",
        tables={
            f"{values['checkpoint']} on {values['num_scenes']} new scenes of each kind (the best constant answer: of"
            f" {min(_CONSTANT_SCENES, values['num_scenes'])} training scenes)": table,
            "A short stage 3 (GRPO) at two length penalties": rows,
        },
        figures={
            "Masks after their first tokens": (
                figures.strip_figure(strips),
                "Each row a picture, more tokens to the right",
            ),
            "Length against what is asked for": (
                scatter,
                f"Lengths of answers to requests by several boxes; Spearman: {told}",
            ),
            "Length histogram": (histogram, "How many mask tokens the answers of each kind have"),
        },
        samples={"Three pictures": samples},
        notes=[
            "Names: objects by names that training knew, in scenes that it never showed. Unseen: shapes that it never "
            "showed, by place and colour. Box, boxes: objects by their boxes. Beside each gIoU stand the best constant "
            "answer (one sequence of codes for every request), the mask from no codes, and what the mask tokenizer "
            "makes of the true masks.",
            "Lengths of answers, Spearman correlation: " + told + ".",
        ],
    )
