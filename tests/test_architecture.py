"""The house: an import points down the list of rooms, never up or round, also where it is late."""

import ast
import functools
import pathlib
import re

import pytest

from tests.conftest import ROOT

# From the top; the README's tree has the same order. A room is a folder or a file of alto_jax/.
ROOMS = (
    "__init__", "plan", "main", "quickstart", "demo", "serve", "export", "tokenize", "predict", "inference", "evaluate",
    "train", "stages", "experiment", "data", "checkpoint", "lora", "report", "figures", "losses", "rewards", "metrics",
    "mllm", "tokenizer", "layers", "attention", "batch", "params", "storage", "cli", "parallel", "config",
)  # fmt: skip
# A room's command stands above the rooms: it may ask any of them.
COMMANDS = {"checkpoint.__main__", "evaluate.__main__", "lora.__main__", "plan.__main__"}
LINEN_ROOMS = {"layers", "tokenizer", "mllm"}
ORBAX_ROOMS = {"checkpoint"}
ORBAX_BARRIER = ("parallel", "orbax.checkpoint.multihost")  # Of the coordination service: JAX has no public call.
CODE = ("alto_jax", "configs", "tools", "benchmarks", "experiments", "tests")
OUR_LATE = re.compile(r"#.*\blate: \S")


def read_sources() -> dict[str, str]:
    """{"room.module": text} of every module of the package; a package's `__init__` is "room.__init__"."""
    root = ROOT / "alto_jax"
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in sorted(root.rglob("*.py"))}
    return {name: path.read_text() for path, name in names.items()}


@functools.cache
def import_nodes(text: str) -> list[tuple[ast.stmt, bool]]:
    """(import, whether it is late) of a module; remembered, since each test reads all modules."""
    tree = ast.parse(text)
    late = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)}  # fmt: skip
    return [(node, id(node) in late) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def imports(name: str, text: str, modules: set[str]) -> list[tuple[str, int, bool]]:
    """(what is imported, line, whether late) of a module: our modules without the leading "alto_jax.", others whole."""
    found = []
    for node, is_late in import_nodes(text):
        if isinstance(node, ast.Import):
            found += [(alias.name.removeprefix("alto_jax."), node.lineno, is_late) for alias in node.names]
        else:
            assert not node.level, f"{name}:{node.lineno}: relative imports hide their room"
            module = node.module
            if module.split(".")[0] != "alto_jax":
                found.append((module, node.lineno, is_late))
                continue
            base = module.removeprefix("alto_jax").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                target = inner if inner in modules else base if base in modules else f"{inner}.__init__".lstrip(".")
                target = target if target in modules else f"{base}.__init__".lstrip(".")
                found.append((target, node.lineno, is_late))
    return found


def faults(sources: dict[str, str]) -> list[str]:
    """What breaks the rules of the house, in words."""
    modules, found, arrows = set(sources), [], {}
    for name, text in sources.items():
        room, lines = name.split(".")[0], text.splitlines()
        if room not in ROOMS:
            found.append(f"{name}: its room is not in the list")
            continue
        arrows[name] = set()
        for target, line, is_late in imports(name, text, modules):
            where = f"{name}:{line}"
            if target not in modules:
                if target.startswith(("flax.linen", "flax.nnx")) and room not in LINEN_ROOMS:
                    found.append(f"{where}: Linen outside of {sorted(LINEN_ROOMS)}")
                if target.split(".")[0] == "orbax" and room not in ORBAX_ROOMS and (room, target) != ORBAX_BARRIER:
                    found.append(f"{where}: Orbax outside of {sorted(ORBAX_ROOMS)}")
                continue
            arrows[name].add(target)
            other = target.split(".")[0]
            if other in ROOMS and other != room and name not in COMMANDS and ROOMS.index(other) < ROOMS.index(room):
                found.append(f"{where}: {target} stands above {room}")
            if is_late and not says_why(lines, line - 1):
                found.append(f"{where}: a late import that does not say why")
    return found + [f"a circle: {' -> '.join(circle)}" for circle in circles(arrows)]


def says_why(lines: list[str], index: int) -> bool:
    """Whether the imports around a line, or the comment above them, say why they are late."""
    while index > 0 and re.match(r"\s*(from|import) |\s*$", lines[index - 1]):
        index -= 1
    around = [lines[index - 1]]
    while index < len(lines) and re.match(r"\s*(from|import) |\s*$", lines[index]):
        around.append(lines[index])
        index += 1
    return any(OUR_LATE.search(line) for line in around)


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each arrow that closes one."""
    found, state = [], {}

    def visit(name: str, path: list[str]) -> None:
        state[name] = "open"
        for target in sorted(arrows.get(name, ())):
            if state.get(target) == "open":
                found.append([*path[path.index(target) :], target])
            elif target not in state:
                visit(target, [*path, target])
        state[name] = "done"

    for name in sorted(arrows):
        if name not in state:
            visit(name, [name])
    return found


def test_the_house_is_in_order():
    assert not faults(read_sources())


@pytest.mark.parametrize(
    "module, line, fault",
    [
        ("params", "from alto_jax.train import loop", "params:1: train.loop stands above params"),
        ("mllm.text", "import alto_jax.stages.sft", "mllm.text:1: stages.sft stands above mllm"),
        ("config", "def f():\n    from alto_jax.cli import run  # late: why not", "config:2: cli stands above config"),
        ("plan.types", "from alto_jax.plan import programs", "plan.types -> plan.programs"),
        ("stages.stage", "def f():\n    from alto_jax.stages.table import STAGES  # late: a circle",
         "stages.stage -> stages.table"),
        ("data.rle", "def f():\n    from alto_jax.data import transforms", "data.rle:2: a late import that does not"),
        ("train.loop", "from flax import linen\nimport flax.linen as nn", "train.loop:2: Linen outside"),
        ("train.loop", "import orbax.checkpoint as ocp", "train.loop:1: Orbax outside"),
        ("train.loop", "import orbax.checkpoint.multihost", "train.loop:1: Orbax outside"),
        ("parallel.shares", "import orbax.checkpoint as ocp", "parallel.shares:1: Orbax outside"),
    ],
)  # fmt: skip
def test_a_fault_is_found(module, line, fault):
    sources = read_sources()
    sources[module] = f"{line}\n{sources[module].split('import annotations')[-1]}"
    assert any(fault in found for found in faults(sources)), faults(sources)


def test_front_door_is_short():
    assert len(list((ROOT / "alto_jax").glob("*.py"))) <= 14
    files = [path for name in CODE for path in (ROOT / name).rglob("*.py")]
    long = {str(path.relative_to(ROOT)): n for path in files if (n := path.read_text().count("\n")) > 450}
    assert not long


def test_readme_has_the_same_order():
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"^alto_jax/.*?(?=^\S)", text, re.MULTILINE | re.DOTALL).group(0)
    named = [pathlib.PurePath(name).stem for name in re.findall(r"^  (\w+(?:\.py|/))", tree, re.MULTILINE)]
    assert named == list(ROOMS)


def test_files_of_tests_have_names_of_their_own():
    """Pytest imports test files by their last name alone: of two alike it runs one, and fails on the other."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
