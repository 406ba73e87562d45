"""Memory and speed of the weight converter: `python benchmarks/convert.py [--size 2b] [--folder DIR]`.

Makes a synthetic InternVL2.5 checkpoint with the true shapes of a size (bfloat16, shards of 2 GB; 4.4 GB for
2b), converts it in a process of its own, and prints the peak memory above the interpreter's own (with all
modules imported), the speed in MB/s of source, and both as a ratio to the targets (2 GiB, 150 MB/s). Needs
twice the checkpoint's size of disk; everything is removed afterwards. For 8B: `--size 8b` (16 GB).
"""

import argparse
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

TARGET_BYTES, TARGET_SPEED = 2 * 2**30, 150.0
SHARD_BYTES = 2 * 10**9
# Runs a command line of the converter and prints the highest memory of the process, in kB.
CHILD = """
import resource, sys
from alto_jax.checkpoint import runs
from tools.convert_torch_weights import exporter, importer, plans, report
from tools.convert_torch_weights.__main__ import main
import jax; jax.devices(); jax.eval_shape(lambda: jax.numpy.zeros(1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(sys.argv[1:]) if sys.argv[1:] else 0
print("memory", before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def make_checkpoint(folder: Path, size: str, kind: str) -> int:
    """Writes the checkpoint and returns its size in bytes."""
    from alto_jax.config import build, to_dict
    from alto_jax.mllm.alto_llm import ModelConfig
    from configs import common
    from tools.convert_torch_weights import configs_for_torch, exporter, mapping

    num_codes = common.NUM_CODES if kind == "altollm" else 0
    vision = common.internvit("6b" if size == "26b" else "300m")
    config = build(ModelConfig, {"vision": vision, "language_model": common.language_model(size, num_codes)})
    family = "qwen2" if config.language_model.qkv_bias else "internlm2"
    table = mapping.get_table(f"{kind}-{family}", config)
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1 << 24) * 0.02).astype(ml_dtypes.bfloat16)
    headers, tensors = {}, {}
    for rule in table.rules:
        for row in rule.rows():
            for key, (_, shape) in zip(rule.keys(row), rule.sources):
                dtype = noise.dtype if rule.targets else np.dtype(bool)
                headers[key] = (shape, dtype, int(np.prod(shape)) * dtype.itemsize)
                tensors[key] = rule.inverse()[0] if not rule.targets else None
    folder.mkdir(parents=True)

    def generate():
        for number, (key, (shape, _, _)) in enumerate(headers.items()):
            fixed = tensors[key]
            yield key, np.resize(np.roll(noise[: 1 << 20], number), shape) if fixed is None else fixed

    exporter.write_shards(folder, headers, generate(), SHARD_BYTES, lambda nbytes: None)
    values = to_dict(config)
    content = configs_for_torch.torch_config(f"{kind}-{family}", values, {}, headers)
    (folder / "config.json").write_text(json.dumps(content))
    return sum(header[2] for header in headers.values())


def run(*arguments: str) -> tuple[int, int, float]:
    """(memory before, highest memory, seconds) of the converter, both in bytes."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    before, after = (int(kb) * 1024 for kb in done.stdout.split("memory")[-1].split())
    return before, after, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2b", choices=["1b", "2b", "4b", "8b", "26b"])
    parser.add_argument("--kind", default="internvl", choices=["internvl", "altollm"])
    parser.add_argument("--folder", help="where to put the temporary checkpoints (default: the system's)")
    parser.add_argument("--export", action="store_true", help="also convert back")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="alto_jax_convert_", dir=options.folder))
    try:
        nbytes = make_checkpoint(folder / "torch", options.size, options.kind)
        os.sync()  # the source lies on disk, as a download would; what is measured does not wait for it
        print(f"{options.kind} {options.size}: {nbytes / 1e9:.2f} GB of bfloat16")
        commands = [("import", "import", folder / "torch", folder / "out", "--tokenizer", "none")]
        commands += [("export", "export", folder / "out", folder / "back")] if options.export else []
        for name, *arguments in commands:
            before, after, seconds = run(*map(str, arguments))
            above, speed = after - before, nbytes / 1e6 / seconds
            print(f"{name}: {seconds:.1f} s with start-up, {speed:.0f} MB/s = {speed / TARGET_SPEED:.2f} x the target;"
                  f" peak {above / 2**30:.2f} GiB above the interpreter's {before / 2**30:.2f} GiB"
                  f" = {above / TARGET_BYTES:.2f} x the limit")  # fmt: skip
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
