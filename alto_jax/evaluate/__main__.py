"""Benchmarks from the command line: one command gives the numbers of every table.

    python -m alto_jax.evaluate --checkpoint DIR --benchmark refcoco_val,grefcoco_testA --data ROOT --out DIR

Writes to the out directory `results/*.jsonl` (a line a sample, in order), `metrics.json`, `tables.md`, plots,
`coco/*.json` (the predicted masks), `worst.html`, `timing.json` and `timing.md`; it may be a URL of a bucket. Killed
and started again, it goes on after the last whole batch; everything but the times ends byte for byte as without the
kill. --rescore makes it all again from the results. A benchmark is one of those that --list names, or `tokenizer_NAME`:
the mask tokenizer alone on the masks of benchmark NAME, of `scenes`, or of the SA-1B folder given by --data
(`tokenizer_sa1b`).
"""

import argparse
from collections.abc import Sequence
import pathlib
from typing import TYPE_CHECKING

from alto_jax import cli
from alto_jax.config import ConfigError, local_path

if TYPE_CHECKING:
    from alto_jax.evaluate.options import EvaluateOptions


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    from alto_jax.data.masks import AUTO, RULES  # late: keeps the start fast
    from alto_jax.data.reading import EXIF
    from alto_jax.data.refcoco import PROTOCOLS

    found = argparse.ArgumentParser(prog="python -m alto_jax.evaluate", description="Benchmarks and their tables.")
    found.add_argument("--checkpoint", metavar="DIR", help="a run's directory (with --table 7 two: DIR,DIR)")
    found.add_argument(
        "--benchmark", metavar="NAMES", help="names with commas between; all: every one whose files are there"
    )
    found.add_argument("--data", default=".", metavar="DIR", help="the data folder, or a prepared data set")
    found.add_argument("--images", metavar="DIR", help="the COCO images, if not at a usual place in the data folder")
    found.add_argument("--out", metavar="DIR")
    found.add_argument("--list", action="store_true", help="print the benchmarks and the files they expect")
    found.add_argument("--table", metavar="N", help="tables of the paper to write, 2 to 7, with commas between")
    found.add_argument("--figure", type=int, metavar="N", help="a figure of the paper to draw: 4 to 9")
    found.add_argument("--runs", metavar="DIRS", help="what figures 6, 7 and 8 compare, with commas between")
    found.add_argument("--card", action="store_true", help="write the card of a model to the file --out")
    found.add_argument("--results", metavar="DIRS", help="evaluations that the card is of, with commas between")
    found.add_argument("--protocol", choices=PROTOCOLS, default="joined", help="sentences of a referent as one request")
    found.add_argument("--length", help="adaptive (default), fixed, both (default with --table), or numbers of mask "
                                        "tokens, with commas between")  # fmt: skip
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
    values = vars(options)
    values.pop("list")
    split = lambda name: [part.strip() for part in (values.pop(name) or "").split(",") if part.strip()]
    table, figure, is_card = split("table"), values.pop("figure"), values.pop("card")
    runs, results = split("runs"), split("results")
    _check(options, table, figure, is_card, runs, results)
    from alto_jax.evaluate.options import EvaluateOptions  # late: keeps the start fast
    from alto_jax.parallel import distributed

    distributed.initialize(values.pop("distributed"))
    values["length"] = values["length"] or ("both" if table else "adaptive")
    values["checkpoint"] = values["checkpoint"] or ""
    if is_card:
        local_path(options.out, "--out")
    asked = EvaluateOptions(benchmarks=split("benchmark"), **values)
    from alto_jax.storage.mirror import working_copy  # late: keeps the start fast

    # Note: places may be others on another machine; what lies there is compared when it is read.
    places = ("checkpoint", "data", "images", "out", "paper_rows")
    distributed.require_same("command", {name: str(v) for name, v in vars(asked).items() if name not in places})
    with working_copy(asked.out, "--out") as (out, _):
        _write(asked.replace(out=out), table, figure, is_card, runs, results)
    return 0


def _write(
    asked: "EvaluateOptions", table: Sequence[str], figure: int | None, is_card: bool, runs: Sequence[str],
    results: Sequence[str],
) -> None:  # fmt: skip
    """Writes what is asked for into its folder on this machine."""
    if table or figure is not None or is_card:
        from alto_jax.evaluate.paper import command as paper  # late: keeps the start fast

        if table:
            paper.write_tables(asked, [int(number) for number in table])
        elif figure is not None:
            paper.write_figure(asked, figure, runs)
        else:
            paper.write_card(asked, results)
        return
    from alto_jax.evaluate.runner import evaluate  # late: keeps the start fast

    if evaluate(asked):
        print((pathlib.Path(asked.out) / "tables.md").read_text(), end="")


def _check(
    options: argparse.Namespace,
    table: Sequence[str],
    figure: int | None,
    is_card: bool,
    runs: Sequence[str],
    results: Sequence[str],
) -> None:
    """Raises ConfigError where an option is missing, or is there beside one that it does not go with."""
    asked = {"--table": table, "--figure": figure is not None, "--card": is_card}
    if sum(map(bool, asked.values())) > 1:
        raise ConfigError(f"expected one of {', '.join(name for name, given in asked.items() if given)}")
    for number in table:
        if not (number.isascii() and number.isdigit()):
            raise ConfigError(f"--table: expected numbers with commas between, got {number!r}")
    for name, given, goes in (("runs", runs, figure is not None), ("results", results, is_card)):
        if given and not goes:
            raise ConfigError(f"--{name}: goes with --{'figure' if name == 'runs' else 'card'} alone (see --help)")
    needed = ["out"] if options.rescore or figure is not None else ["checkpoint", "out"]
    needed += ["benchmark"] if not (options.rescore or any(asked.values())) else []
    for name in needed:
        if not getattr(options, name):
            raise ConfigError(f"--{name} is required (see --help)")
    if is_card and not results:
        raise ConfigError("--results is required (see --help)")


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
