"""Sphinx's settings: `sphinx-build -W -c docs . build/site` makes the site of README, docs and results, in build/site.

The source folder is the whole checkout, so that the links between the files lead to the same places here as on GitHub.
"""

import json
import pathlib
import re
import sys
from typing import Any

from myst_parser.parsers.sphinx_ import MystParser

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "alto_jax"
release = version = re.search(r'^__version__ = "(.+)"$', (ROOT / "alto_jax/__init__.py").read_text(), re.M).group(1)
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**.md",
    "docs/**.ipynb",
    "benchmarks/results/*.md",
    "experiments/RESULTS.md",
    "alto_jax/assets/*/README.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "**/__pycache__", "tests", "*.egg-info"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
default_role = "code"  # Docstrings have Markdown's single backticks.
highlight_language = "none"  # Blocks without a language are commands, trees and diagrams.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Note: a change of the log that quotes a heading of its own, and cards that begin at the second level.
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"alto_jax {release}"
html_extra_path = ["site"]  # index.html, which leads to the root document.
html_copy_source = False


class NotebookParser(MystParser):
    """Notebooks without outputs as pages: text as it stands, code as blocks; nothing is run."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: Any) -> None:
        parts = []
        for cell in json.loads(inputstring)["cells"]:
            source = "".join(cell["source"])
            parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        super().parse("\n\n".join(parts), document)


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
