"""A checkpoint as programs that run without this package: StableHLO for several platforms, weights, a loader.

    python -m alto_jax.export --checkpoint alto-tiny --out DIR [--platforms cpu,cuda,tpu]

DIR gets encode, decode, decode_with_image and segment (.stablehlo), weights.safetensors, tokenizer.json,
manifest.json and alto_loader.py, which needs JAX, NumPy and flatbuffers alone (docs/export.md). Needs
`pip install 'alto_jax[export]'`.
"""

import argparse
import pathlib

from alto_jax import cli, predict
from alto_jax.config import ConfigError


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m alto_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory (any stage but 0)")
    parser.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--platforms", default="cpu,cuda,tpu", metavar="NAMES", help="cpu, cuda, rocm, tpu")
    parser.add_argument("--prompt_tokens", type=int, default=32, metavar="N", help="room for a phrase, in tokens")
    parser.add_argument("--forced_prefix", action=argparse.BooleanOptionalAction, default=True,
                        help="answers are a mask and nothing else; --no-forced_prefix: free ones")  # fmt: skip
    cli.add_quantize(parser)
    options = parser.parse_args()
    cli.check_paths({"--out": options.out})
    out = pathlib.Path(options.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out={options.out}: expected a folder")
    predict.describe(options.checkpoint, options.step, "adaptive")
    # late: --help and wrong options need no JAX
    from alto_jax.checkpoint import loading
    from alto_jax.export import writing

    model = loading.load_model(options.checkpoint, step=options.step, for_inference=True, quantize=options.quantize)
    platforms = [name.strip() for name in options.platforms.split(",") if name.strip()]
    manifest = writing.export_model(
        model, out, platforms, forced_prefix=options.forced_prefix, prompt_tokens=options.prompt_tokens
    )
    for file in sorted(out.iterdir()):
        print(f"{file.stat().st_size / 1e6:10.3f} MB  {file.name}")
    print(f"{', '.join(manifest['programs'])} for {', '.join(platforms)} in {out}")
    return 0


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
