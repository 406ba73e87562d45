"""Is the mask tokenizer good enough for these shapes? Mask → codes → mask of one's own masks, without a language model.

In: the meta.json of alto_jax.data.convert, or a folder of images and one of masks. Out: a summary, {name: number}, and
the worst masks as pictures. IoU is at the tokenizer's resolution, as in evaluate/reconstruction.py; that of the
pictures at the masks' own.
"""

from collections.abc import Sequence
import pathlib
from typing import Any

import jax
import numpy as np

from alto_jax import metrics, report
from alto_jax.config import ConfigError
from alto_jax.data.bad_data import RecordError
from alto_jax.data.conversations import Conversations
from alto_jax.data.convert.annotated import Annotated, Frame, drawn
from alto_jax.data.convert.pairs import read_pairs
from alto_jax.data.reading import AS_STORED
from alto_jax.data.source import Records
from alto_jax.evaluate.device import Programs
from alto_jax.evaluate.reconstruction import Reconstruction
from alto_jax.inference.tokenizer import TokenizerModel
from alto_jax.parallel import sharding

QUANTILES = (0.05, 0.25, 0.5, 0.75)


class OfConversations:
    """Random access to MaskRecords {"key", "image", "image_name", "mask"}: every mask of a meta file's records."""

    def __init__(self, meta: str, limit: int):
        """The first `limit` masks. ValueError: a file that is missing or malformed, or records without masks."""
        self._source = Conversations(meta, once=True, reading=AS_STORED)
        self._places: list[tuple[int, int]] = []
        for index in range(len(self._source)):
            if len(self._places) >= limit:
                break
            self._places += [(index, number) for number in range(len(self._source[index]["masks"]))]
        self._places = self._places[:limit]
        if not self._places:
            raise ConfigError(f"--meta={meta}: none of its {len(self._source)} records has a mask")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, number = self._places[index]
        record = self._source[row]
        key = record["key"] + (f"#{number}" if len(record["masks"]) > 1 else "")
        mask = record["masks"][number]
        return {"key": key, "image": record["image"], "image_name": record["image_name"], "mask": mask}


class OfFolders:
    """Random access to MaskRecords of image files and the mask files that are named as they are."""

    def __init__(self, of_images: str, of_masks: str, rule: str, limit: int, exif: Frame = None):
        """The first `limit` images, `exif` as in `drawn`. ConfigError: an image without a mask, or no image at all."""
        found = list(read_pairs(pathlib.Path(of_images), pathlib.Path(of_masks), "mask", rule, exif))
        bad = [entry for entry in found if isinstance(entry, RecordError)]
        if bad or not found:
            raise ConfigError(f"--images={of_images}: {bad[0] if bad else 'no images there'}")
        self._found = [entry for entry in found if isinstance(entry, Annotated)][:limit]
        self._exif = exif

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self._found[index]
        photo, mask = drawn(entry, entry.image, self._exif)
        record = {"key": str(entry.image), "image": photo.image, "image_name": entry.image.stem}
        return record | {"mask": mask.astype(np.uint8) * 255}


def token_counts(num_latent_tokens: int) -> list[int]:
    """1, 2, 4, … up to all tokens."""
    return [k for k in (1, 2, 4, 8, 16, 32) if k < num_latent_tokens] + [num_latent_tokens]


def reconstruct(model: TokenizerModel, source: Records, batch_size: int = 32) -> list[dict[str, Any]]:
    """The line of `Reconstruction` for each mask: iou at `token_counts`, iou_adaptive, length, key."""
    programs = Programs(sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1]), model.cfg.matmul_precision)
    counts = token_counts(model.cfg.tokenizer.num_latent_tokens)
    task = Reconstruction(model.cfg, model.params, "masks", source, {}, programs, counts)
    lines: list[dict[str, Any]] = []
    batch_size = min(batch_size, len(source))
    for start in range(0, len(source), batch_size):
        examples = [task.example(index) for index in range(start, min(start + batch_size, len(source)))]
        filled = examples + [task.blank()] * (batch_size - len(examples))
        answers = task.answer(filled)
        lines += [task.line(example, answers, row) for row, example in enumerate(examples)]
    return lines


def summarize(lines: Sequence[dict[str, Any]], counts: Sequence[int]) -> dict[str, float]:
    """masks, mean_iou and its quantiles by adaptive length, mean_length, and iou_K, the mean with K tokens."""
    adaptive = np.array([line["iou_adaptive"] for line in lines])
    by_count = np.mean([line["iou"] for line in lines], axis=0)
    found = {"masks": float(len(lines)), "mean_iou": float(adaptive.mean())}
    found |= {f"iou_quantile_{q:g}": float(np.quantile(adaptive, q)) for q in QUANTILES}
    found["mean_length"] = float(np.mean([line["length"] for line in lines]))
    return found | {f"iou_{k}": float(iou) for k, iou in zip(counts, by_count, strict=True)}


def write_worst(
    path: pathlib.Path, model: TokenizerModel, source: Records, lines: Sequence[dict[str, Any]], count: int
) -> None:
    """Writes a page with the `count` masks of lowest IoU by adaptive length: picture, mask, mask from its codes."""
    samples = []
    for index in np.argsort([line["iou_adaptive"] for line in lines], kind="stable")[:count].tolist():
        record, line = source[index], lines[index]
        target = record["mask"] > 0
        codes = model.encode(target)
        drawn = model.decode(codes, target.shape, record["image"])
        most, iou = model.cfg.tokenizer.num_latent_tokens, float(metrics.mask_iou(drawn, target))
        samples.append(report.ReportSample(record["image"], drawn, line["key"], len(codes), most, target, iou, codes))
    note = f"The {len(samples)} masks of lowest IoU, worst first: image, mask, mask from its codes."
    report.write_report(path, "Masks from their codes", samples={"masks": samples}, notes=[note])
