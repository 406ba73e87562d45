"""The built-in scenes as a test that means something: what a model answers beside what needs no looking.

    python -m alto_jax.evaluate.scenes --checkpoint alto-tiny --out DIR

Needs no data. What the kinds of requests are, and what stands beside the answers: scene_answers.py. With --quantize
the answers are also compared with those of the checkpoint as it is. Writes scenes.json and scenes.md to the out
directory.
"""

import argparse
import functools
import json
import pathlib

from alto_jax import cli
from alto_jax.config import ConfigError


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m alto_jax.evaluate.scenes", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run's directory (stage 2 or 3), or alto-tiny"
    )
    parser.add_argument("--out", metavar="DIR", help="where scenes.json and scenes.md are written")
    parser.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
    cli.add_quantize(parser)
    parser.add_argument("--kinds", help="with commas between (default: all)")
    parser.add_argument("--scenes", type=int, default=256, help="of each kind")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", choices=("adaptive", "fixed"), default="adaptive")
    parser.add_argument("--end-bias", type=float, default=0.0, metavar="X", help="> 0: fewer mask tokens; < 0: more")
    options = parser.parse_args()
    cli.check_paths({"out": options.out})
    # late: --help needs no JAX
    from alto_jax.checkpoint import loading
    from alto_jax.evaluate.scene_answers import KINDS, evaluate_scenes, table

    kinds = [kind.strip() for kind in options.kinds.split(",")] if options.kinds else list(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"--kinds: unknown {unknown[0]!r}; expected some of {', '.join(KINDS)}")
    for name in ("scenes", "batch_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    open_model = functools.partial(loading.load_model, options.checkpoint, step=options.step, for_inference=True)
    model, beside = open_model(quantize=options.quantize), open_model() if options.quantize else None
    rows = evaluate_scenes(model, kinds, options.scenes, beside=beside, batch_size=options.batch_size,
                           adaptive=options.length == "adaptive", end_bias=options.end_bias)  # fmt: skip
    print(table(rows))
    if options.out:
        folder = pathlib.Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scenes.json").write_text(json.dumps({"checkpoint": model.identity, "rows": rows}, indent=2) + "\n")
        (folder / "scenes.md").write_text(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
