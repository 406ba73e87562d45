"""What the tests share: CPU, one cache of compiled programs a session, and one run of the quickstart."""

import dataclasses
import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

from absl import flags
from absl.testing import flagsaver
import filelock
import pytest

from alto_jax import cli
from tests import compiler_flags
from tests.debug_model import debug_model  # noqa: F401 - a fixture
from tests.forking import LIBRARIES, ROOT, SERVER

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What takes longest comes first, in this order, so that two workers end together.
LONG = ("test_loop.py", "test_several_processes.py", "test_bad_files.py", "test_processes.py", "test_distributed.py",
        "test_mixed_conversations.py", "test_tour.py", "test_adapters.py", "test_golden_stages.py", "test_readme.py",
        "test_package.py", "test_runner.py", "test_invariants.py", "test_trained.py", "test_mixture.py",
        "test_caches.py", "test_reliability.py", "test_step.py", "test_paper.py", "test_grpo.py",
        "test_length_penalty.py", "test_ceiling.py", "test_plan.py", "test_six_sources.py",
        "test_predict.py")  # fmt: skip


def pytest_collection_modifyitems(items):
    """Marks the tests of files that read recorded arrays: `pytest -m golden`, see docs/numerics.md; long ones first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        if getattr(item, "module", None) is not None and hasattr(item.module, "golden"):
            item.add_marker(pytest.mark.golden)


def pytest_configure(config):
    """Compiled programs are kept for the session, also for the processes that tests start.

    Compiling takes most of the time, so XLA does it the cheapest way; all processes give the same numbers.
    """
    gc.set_threshold(50_000, 20, 20)  # most of what tracing makes stays in JAX's caches
    config.addinivalue_line("markers", "golden: compares with arrays recorded from the reference")
    given = os.environ.get("XLA_FLAGS", "")
    missing = tuple(flag for flag in compiler_flags.QUICK_TO_COMPILE if flag.partition("=")[0] not in given)
    if not hasattr(config, "workerinput"):  # Note: workers are given what the first process has found.
        os.environ["XLA_FLAGS"] = " ".join([given, *compiler_flags.taken(missing)]).strip()
    flags.FLAGS.mark_as_parsed()
    config.alto_jax_index = tempfile.mkdtemp(prefix="alto_jax_index_")
    os.environ["ALTO_CACHE"] = config.alto_jax_index
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.alto_jax_cache = tempfile.mkdtemp(prefix="alto_jax_programs_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.alto_jax_cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_collection_finish():
    """Takes the environment of commands when it has what the libraries add to it."""
    for name in LIBRARIES:
        __import__(name)
    SERVER.environment = dict(os.environ)


def pytest_unconfigure(config):
    SERVER.close()
    shutil.rmtree(config.alto_jax_index, ignore_errors=True)
    if hasattr(config, "alto_jax_cache"):
        shutil.rmtree(config.alto_jax_cache, ignore_errors=True)


def run_python(*arguments: str, fresh: bool = False) -> subprocess.CompletedProcess:
    """Runs Python in the root of the project, as a user would, in a process of its own; output as text.

    Args:
      fresh: what is proved is how the interpreter starts, or what the libraries take; see forking.py.
    """
    command = [*map(str, arguments)]
    if fresh or not SERVER.can_run(os.environ):
        return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    started = SERVER.start(command, os.environ)
    try:
        out, err = started.communicate(600)
    finally:
        started.send_signal(signal.SIGKILL)
    return subprocess.CompletedProcess(command, started.returncode, out, err)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command in this process, which must refuse; returns the one line that it leaves on stderr."""

    def run(main, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as exit_:
            cli.run(main)
        said = capsys.readouterr()
        assert "Traceback" not in said.out
        return error_line(exit_.value.code, said.err)

    return run


def error_line(code: int, said: str) -> str:
    """The one line that a refused command leaves."""
    lines = said.strip().splitlines()
    assert code == 2 and len(lines) == 1, said
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def eight_devices(monkeypatch):
    """The processes that the test starts have eight virtual devices."""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8")


# The command; when the checkpoint of step 2 is complete, a stage's folder is copied as it is then: a process that is
# killed at that moment leaves the same.
COPIED = """
import shutil
from alto_jax import cli, main
from alto_jax.checkpoint import runs
save = runs.Checkpointer.save
def save_and_copy(self, step, *arguments, **options):
    save(self, step, *arguments, **options)
    if step == 2:
        self.wait()
        shutil.copytree(self.directory, f"{self.directory.parent}.stopped/{self.directory.name}")
runs.Checkpointer.save = save_and_copy
cli.run(main.main)
"""


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """A finished run of configs/quickstart.py:debug: its directory, copies of its stages' folders at step 2, the flags
    it ran with, what it printed."""

    path: pathlib.Path
    stopped: pathlib.Path
    overrides: dict[str, list[str]]
    output: str


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory, worker_id) -> Quickstart:
    """All four stages in sequence, in one process, four steps each; the run that other tests compare with."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent  # one run serves all workers
    path, output = base / "quickstart", base / "quickstart.txt"
    # An untrained model's answers hold no mask: many and long ones, in which some begin one, make the rewards differ.
    overrides = {
        "stage3": [
            "grpo.reward.kind=reference", "grpo.advantage_normalization=paper", "grpo.num_generations=8",
            "grpo.generate.max_new_tokens=48", "grpo.generate.top_k=0", "grpo.generate.grammar=True",
        ]
    }  # fmt: skip
    flags = [f"--config.{stage}.{change}" for stage, changes in overrides.items() for change in changes]
    with filelock.FileLock(base / "quickstart.lock"):
        if not output.exists():
            done = run_python("-c", COPIED, "--config=configs/quickstart.py:debug", f"--workdir={path}", *flags)
            assert done.returncode == 0, done.stderr[-2000:]
            output.write_text(done.stdout)
    return Quickstart(path, path.with_name("quickstart.stopped"), overrides, output.read_text())
