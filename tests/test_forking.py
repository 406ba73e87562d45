"""A command that is a fork is what it is in an interpreter of its own."""

import json
import os
import subprocess

import pytest

from tests.conftest import run_python
from tests.forking import LIBRARIES, SERVER

SAYS = """
import json, os, sys, threading
loaded = [name for name in sys.modules if name.split(".")[0] in ("alto_jax", "tests", "configs")]
environment = {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS")}  # of terminals
print(json.dumps([__name__, sys.argv, sys.path, os.getcwd(), loaded, environment, threading.active_count()]))
"""


@pytest.mark.parametrize("kind", ["program", "file"])
def test_it_has_the_names_places_and_environment_of_an_interpreter(kind, tmp_path, monkeypatch):
    (tmp_path / "says.py").write_text(SAYS)
    monkeypatch.setenv("ALTO_SAYS", "yes")
    monkeypatch.delenv("ALTO_CACHE")
    command = (["-c", SAYS] if kind == "program" else [tmp_path / "says.py"]) + ["--one", "two"]
    forked, fresh = (json.loads(run_python(*command, fresh=fresh).stdout) for fresh in (False, True))
    environment, expected = forked.pop(5), fresh.pop(5)  # the libraries add to it
    assert forked == fresh and expected.items() <= environment.items()
    assert environment["ALTO_SAYS"] == "yes" and "ALTO_CACHE" not in environment


def test_a_module_is_run_as_such():
    forked, fresh = (run_python("-m", "alto_jax.main", "--mode=none", fresh=fresh) for fresh in (False, True))
    assert (forked.returncode, forked.stderr, forked.stdout) == (fresh.returncode, fresh.stderr, fresh.stdout)
    assert forked.returncode == 2 and forked.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "program, code, err",
    [("exit('why')", 1, "why\n"), ("import os; os.kill(os.getpid(), 9)", -9, ""), ("exit(75)", 75, "")],
)
def test_its_end_is_told(program, code, err):
    done = run_python("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", err)


def test_several_run_at_a_time_and_one_that_takes_too_long_is_ended():
    first, second = (
        SERVER.start(["-c", "import time; print(1, flush=True); time.sleep(60)"], os.environ) for _ in range(2)
    )
    assert first.pid != second.pid and first.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        first.communicate(0.01)
    for command in (first, second):
        command.send_signal(9)
        command.communicate(60)
        assert command.returncode == -9
    second.send_signal(9)  # its number may be another process's by now


def test_what_the_libraries_have_read_makes_a_new_interpreter(monkeypatch):
    # Note: what other tests have imported may have set names of its own.
    for name in os.environ.keys() - SERVER.environment.keys():
        if not name.startswith("PYTEST"):
            monkeypatch.delenv(name)
    assert SERVER.can_run(os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    for name in ("JAX_PLATFORMS", "PYTHONPATH", "LD_LIBRARY_PATH"):
        assert not SERVER.can_run(os.environ | {name: "another"})
    code = f"import os, sys; print(os.environ['JAX_PLATFORMS'], {LIBRARIES[0]!r} in sys.modules)"
    assert run_python("-c", code).stdout == f"{os.environ['JAX_PLATFORMS']} True\n"
    monkeypatch.setenv("JAX_PLATFORMS", "none")
    assert run_python("-c", code).stdout == "none False\n"
