"""The demo page.

    python -m alto_jax.demo [--checkpoint alto-tiny] [--port 7860]

Needs `pip install 'alto_jax[page]'` (Gradio). Opens at http://127.0.0.1:7860; nothing is loaded from elsewhere.
"""

import argparse

from alto_jax import cli
from alto_jax.config import ConfigError


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m alto_jax.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="alto-tiny", metavar="DIR", help="a run's directory (stage 2 or 3)")
    parser.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
    cli.add_quantize(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        raise ConfigError(f"--port={options.port}: expected 1..65535")
    from alto_jax.demo import page  # late: --help needs no JAX
    from alto_jax.inference import segmenter

    model = segmenter.load(options.checkpoint, options.step, options.quantize)
    if not isinstance(model, segmenter.Segmenter):
        raise ConfigError(f"--checkpoint={options.checkpoint}: a mask tokenizer alone; expected a run of stage 2 or 3")
    page.launch(model, options.checkpoint, options.host, options.port)
    return 0


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
