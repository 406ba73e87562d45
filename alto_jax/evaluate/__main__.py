"""Benchmarks from the command line: one command gives the numbers of every table.

    python -m alto_jax.evaluate --checkpoint DIR --benchmark refcoco_val,grefcoco_testA --data ROOT --out DIR

Writes to the out directory `results/*.jsonl` (a line a sample, in order), `metrics.json`, `tables.md`, plots,
`coco/*.json` (the predicted masks), `worst.html`, `timing.json` and `timing.md`. Killed and started again, it goes on
after the last whole batch; everything but the times ends byte for byte as without the kill. --rescore makes it all
again from the results. A benchmark is one of those that --list names, or `tokenizer_NAME`: the mask
tokenizer alone on the masks of benchmark NAME, of `scenes`, or of the SA-1B folder given by --data (`tokenizer_sa1b`).
"""

import argparse

from alto_jax import cli
from alto_jax.config import ConfigError


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    from alto_jax.data.masks import AUTO, RULES  # late: keeps the start fast
    from alto_jax.data.reading import EXIF
    from alto_jax.data.refcoco import PROTOCOLS

    found = argparse.ArgumentParser(prog="python -m alto_jax.evaluate", description="Benchmarks and their tables.")
    found.add_argument("--checkpoint", metavar="DIR", help="a run's directory")
    found.add_argument(
        "--benchmark", metavar="NAMES", help="names with commas between; all: every one whose files are there"
    )
    found.add_argument("--data", default=".", metavar="DIR", help="the data folder, or a prepared data set")
    found.add_argument("--images", metavar="DIR", help="the COCO images, if not at a usual place in the data folder")
    found.add_argument("--out", metavar="DIR")
    found.add_argument("--list", action="store_true", help="print the benchmarks and the files they expect")
    found.add_argument("--protocol", choices=PROTOCOLS, default="joined", help="sentences of a referent as one request")
    found.add_argument("--length", choices=("adaptive", "fixed", "both"), default="adaptive")
    found.add_argument("--batch-size", type=int, default=8, help="over all devices")
    found.add_argument("--limit", type=int, default=0, help="only the first samples (0: all)")
    found.add_argument("--max-tiles", type=int, default=1, metavar="N",
                       help="of an image in POPE, VQAv2 and MME (InternVL 2.5: 12)")  # fmt: skip
    found.add_argument("--max-new-tokens", type=int, default=0, help="longest answer (0: one mask and a sentence)")
    found.add_argument("--grammar", action="store_true", help="allow only well-formed masks")
    found.add_argument(
        "--forced-prefix", action="store_true", help="the answer's start is given, the mask's end ends it"
    )
    found.add_argument("--end-bias", type=float, default=0.0, metavar="X", help="> 0: fewer mask tokens; < 0: more")
    found.add_argument("--min-pixels", type=int, help="fewer predicted pixels count as no mask")
    found.add_argument("--reference", action="store_true",
                       help="the reference's scoring: nearest upsampling, ignored pixels as hits, malformed answers "
                            "decoded from no codes")  # fmt: skip
    found.add_argument("--max-bad-fraction", type=float, default=0.001, help="unreadable samples left out at most")
    found.add_argument("--exif", choices=EXIF, default="stored", help="EXIF orientation of images: see docs/data.md")
    found.add_argument("--mask-rule", default=AUTO, help=f"of mask files: {RULES} (docs/data.md)")
    found.add_argument("--scenes", type=int, default=256, help="samples of the built-in benchmark")
    found.add_argument("--paper-rows", metavar="FILE", help='JSON {table: [{"row": name, benchmark: value}]} to add')
    found.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
    cli.add_quantize(found)
    found.add_argument("--title", help="name of our rows (default: the checkpoint's folder)")
    found.add_argument("--rescore", action="store_true",
                       help="compute the tables again from the results in --out, without a model")  # fmt: skip
    found.add_argument("--worst", type=int, default=12, help="answers of lowest IoU to show as pictures (0: none)")
    found.add_argument("--timed-samples", type=int, default=8, help="samples to time one at a time, too (0: none)")
    found.add_argument("--fsdp", type=int, default=1, help="devices that share the parameters")
    found.add_argument("--tensor", type=int, default=1, help="devices that share heads and vocabulary")
    found.add_argument(
        "--distributed", choices=("none", "env", "auto"), default="none", help="as in alto_jax.main (distributed.py)"
    )
    found.add_argument("--threads", type=int, default=2, help="reading threads")
    return found


def main() -> int:
    """The command; see the module's docstring."""
    options = parser().parse_args()
    if options.list:
        from alto_jax.data.benchmarks import BENCHMARKS  # late: keeps the start fast

        for found in BENCHMARKS.values():
            print(f"{found.name:28s}{found.expects}")
        return 0
    for name in ("out",) if options.rescore else ("checkpoint", "benchmark", "out"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is required (see --help)")
    from alto_jax.evaluate.options import EvaluateOptions  # late: keeps the start fast
    from alto_jax.evaluate.runner import evaluate
    from alto_jax.parallel import distributed

    values = vars(options)
    distributed.initialize(values.pop("distributed"))
    names = [name.strip() for name in (values.pop("benchmark") or "").split(",") if name.strip()]
    values.pop("list")
    values["checkpoint"] = values["checkpoint"] or ""
    evaluate(EvaluateOptions(benchmarks=names, **values))
    return 0


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
