"""The table of `benchmarks/gpu.py`: records of JSON lines → markdown."""

from collections.abc import Iterable
import json
import os
from pathlib import Path
from typing import Any

from alto_jax.config import ConfigError, write_whole

COLUMNS = ("before", "after", "int8", "fp8", "peer")
# Case → what it is; in the table's order.
ROWS = {
    "copy": "copy of 1 GiB on the device",
    "matmul": "matrix product 8192³, bfloat16",
    "decode1": "decode, one token, batch 1",
    "decode12": "decode, one token, batch 12",
    "tokens1": "prompt, 18 codes and END, batch 1",
    "tokens12": "prompt, 18 codes and END, batch 12",
    "prefill1": "prompt of 320 tokens and first token, batch 1",
    "prefill12": "prompt of 320 tokens and first token, batch 12",
    "vit1": "InternViT-300M and projector, batch 1",
    "vit12": "InternViT-300M and projector, batch 12",
    "sam1": "SAM ViT-L at 1024, batch 1",
    "sam12": "SAM ViT-L at 1024, batch 12",
    "masks1": "codes → mask, batch 1",
    "masks12": "codes → mask, batch 12",
    "answer1": "whole answer, batch 1",
    "answer12": "whole answer, batch 12",
    "stage2_2b_cached": "stage 2, 2B, 16 rows × 512 tokens, SAM features cached",
    "stage2_2b": "stage 2, 2B, 16 rows × 512 tokens",
    "stage1_base": "stage 1, base, 32 rows",
    "stage3_8b_lora": "stage 3, 8B, LoRA 16, 4 prompts × 12 × 64 tokens",
}
GOALS = {
    "decode1": "6.1 ms; int8 3.6 ms", "decode12": "7 ms", "answer1": "150 ms; int8 100 ms", "sam12": "72 ms",
    "vit12": "22 ms", "stage2_2b_cached": "40 % MFU", "stage1_base": "40 % MFU", "stage3_8b_lora": "900 ms",
}  # fmt: skip


def read(files: Iterable[str | os.PathLike]) -> list[dict[str, Any]]:
    """The records of files of JSON lines, in order.

    Raises:
      ConfigError: a line that is no record; names the file and the line.
    """
    found = []
    for file in files:
        for number, text in enumerate(Path(file).read_text().splitlines(), 1):
            try:
                record = json.loads(text)
                found.append({**record, "case": record["case"], "variant": record["variant"]})
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"--table: {file}:{number}: not a record of this benchmark ({error})") from error
    return found


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(record: dict[str, Any]) -> str:
    """What a record says, in a few words."""
    if "error" in record:
        return f"failed: {record['error']}"[:60].replace("|", "/")
    parts = [f"{_number(record['ms'])} ms"]
    if "rollout_ms" in record:
        parts.append(f"{_number(record['rollout_ms'])} + {_number(record['update_ms'])}")
    if "gb_per_s" in record:
        parts.append(f"{record['gb_per_s'] / 1e3:.2f} TB/s")
    if "tflops" in record:
        parts.append(f"{_number(record['tflops'])} TFLOP/s")
    if "mfu" in record:
        parts.append(f"{record['mfu']:.0%} MFU")
    if record["case"].startswith("stage") and "peak_gb" in record:
        parts.append(f"{record['peak_gb']:.1f} GB")
    return ", ".join(parts) + (f" ({record['how']})" if "how" in record else "")


def line(record: dict[str, Any]) -> str:
    """A record as it is shown while the benchmark runs."""
    name = f"{record['case']:18} {record['variant']:7}"
    if record.get("lowered"):
        return f"{name} traced in {record['lower_s']} s"
    seconds = "  ".join(f"{key} {record[key]}" for key in ("lower_s", "compile_s", "measure_s") if key in record)
    if "error" in record:
        return f"{name} {record['error']}"
    return f"{name} {cell(record)}  [{record['ms_min']:.3f} .. {record['ms_max']:.3f} ms]  {seconds}"


def table(records: list[dict[str, Any]]) -> str:
    """One markdown table of the newest record of each case, variant and way, and under it where they are from.

    A measurement stands before a later failure of the same.
    """
    newest: dict[tuple, dict[str, Any]] = {}
    for record in records:
        if record.get("lowered"):
            continue
        key = record["case"], record["variant"], record.get("how")
        if "error" not in record or key not in newest:
            newest[key] = record
    columns = [c for c in COLUMNS if any(variant == c for _, variant, _ in newest)]
    lines = [f"| | {' | '.join(columns)} | goal |", f"|---{'|---' * len(columns)}|---|"]
    cases = [case for case in ROWS if any(key[0] == case for key in newest)]
    cases += sorted({key[0] for key in newest} - ROWS.keys())
    for case in cases:
        cells = [
            "; ".join(cell(r) for (c, v, _), r in newest.items() if (c, v) == (case, column)) for column in columns
        ]
        lines.append(f"| {ROWS.get(case, case)} | {' | '.join(cells)} | {GOALS.get(case, '')} |")
    return "\n".join([*lines, "", *_origins(newest.values())])


def _origins(records: Iterable[dict[str, Any]]) -> list[str]:
    """Device, date, versions and command of the records, one line each."""
    found: dict[str, list[str]] = {}
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(record.get("versions", {}).items()))
        command = f"`{record['command']}`" if record.get("command") else "measured before this benchmark was written"
        if "device" not in record:
            continue
        text = f"{record['device']}, {record['date']}, {versions}: {command}"
        if record["variant"] not in found.setdefault(text, []):
            found[text].append(record["variant"])
    return [f"- {', '.join(variants)}: {text}" for text, variants in found.items()]


def write(file: Path, text: str) -> None:
    """Writes the table as a page."""
    write_whole(file, f"# Speed and memory on one GPU\n\n{ABOUT}\n\n{text}\n")


ABOUT = """Made by `python benchmarks/gpu.py --table FILE.jsonl... --write`; `benchmarks/gpu.py` says what each case is.
Medians of rounds; random weights in bfloat16 (stages 1 and 2 train float32 ones), prompts of 256 image and 64 text
tokens, answers of exactly 18 codes and END. TB/s of decoding: bytes of weights over the time. A whole answer begins
with an image in the host's memory and ends with a mask there. MFU: the model's own operations over the data sheet's
peak; GB: the process's peak. "before": XLA's attention, and a token loop over stacked layers. The peer is transformers
with the same sizes and random weights (codes → mask: a plain ViT-L of 24 layers over 289 tokens alone)."""
