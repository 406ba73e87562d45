"""Runs Python commands in forks of a process that has imported the libraries, but nothing of the project.

Importing JAX, Flax, Orbax and Grain takes a process about two seconds. A command's process has all the rest to itself:
its arguments, environment, working directory, output, the project's modules, JAX's backend, its threads and its end.
"""

from collections.abc import Mapping, Sequence
import gc
import json
import os
import pathlib
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import types

ROOT = pathlib.Path(__file__).parents[1]
LIBRARIES = (
    "jax", "flax.linen", "optax", "grain", "orbax.checkpoint", "ml_collections.config_flags", "tokenizers",
    "tensorboardX", "clu.parameter_overview", "PIL.ImageDraw", "PIL.ImageFont",
)  # fmt: skip

# What the libraries read as late as a command does; with another difference a command gets a new interpreter.
_LATE = (
    "XLA_",
    "CRC32C_",
    "PYTEST_CURRENT_TEST",
    "ALTO_",
    "AWS_",
    "GRADIO_",
    "HF_",
    "TPU_",
    "ALLOW_MULTIPLE_LIBTPU_LOAD",
)


class Server:
    """The process of which commands are forks, in the root of the project; it begins with the first one.

    Attributes:
      environment: of the process, which the libraries have read; as it is now, until it is set.
    """

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self._process: subprocess.Popen | None = None
        self._ends: dict[int, int] = {}  # exit codes by the processes' ids
        self._folder = tempfile.TemporaryDirectory(prefix="alto_jax_forks_")
        self._count = 0

    def can_run(self, environment: Mapping[str, str]) -> bool:
        """Whether a command in this environment would be the same in an interpreter of its own."""
        return all(name.startswith(_LATE) for name, _ in self.environment.items() ^ environment.items())

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> "Command":
        """`python ARGUMENTS`.

        Args:
          arguments: "-m", a module, and its arguments; or "-c" and a program; or a file.
          environment: of the command, one that `can_run`.
        """
        if self._process is None:
            command, pipes = [sys.executable, __file__, self._folder.name], {"stdin": subprocess.PIPE}
            pipes |= {"stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, cwd=ROOT, env=self.environment, bufsize=0, **pipes)
        self._count += 1
        out, err = (pathlib.Path(self._folder.name, f"{kind}_{self._count}") for kind in ("out", "err"))
        asked = {"arguments": list(arguments), "environment": dict(environment), "out": str(out), "err": str(err)}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        begun = None
        while begun is None:
            begun = self._hear(60)
        return Command(self, begun, out, err)

    def end_of(self, pid: int, timeout: float) -> int | None:
        """The exit code of a command, as subprocess has them; None: it still runs after so many seconds."""
        deadline = time.monotonic() + timeout
        while pid not in self._ends:
            left = max(deadline - time.monotonic(), 0)
            if not select.select([self._process.stdout], [], [], left)[0]:
                return None
            self._hear(0)
        return self._ends[pid]

    def _hear(self, timeout: float) -> int | None:
        """Reads a line: the id of a command that has begun, which is returned, or that of one that has ended."""
        assert select.select([self._process.stdout], [], [], timeout)[0], "the server of commands says nothing"
        line = self._process.stdout.readline()
        assert line, f"the server of commands has ended with {self._process.wait()}"
        pid, *code = map(int, line.split())
        if not code:
            return pid
        self._ends[pid] = code[0]
        return None

    def close(self) -> None:
        """Ends the process, if it has begun."""
        if self._process is not None:
            self._process.communicate()
        self._folder.cleanup()


class Command:
    """A command that was started, with what tests use of subprocess.Popen."""

    def __init__(self, server: Server, pid: int, out: pathlib.Path, err: pathlib.Path):
        self.pid, self._server, self._files = pid, server, (out, err)

    def poll(self) -> int | None:
        return self._server.end_of(self.pid, 0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Waits for its end, then (standard output, standard error)."""
        if self._server.end_of(self.pid, timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self._files[0].read_text(), self._files[1].read_text()

    @property
    def returncode(self) -> int | None:
        return self.poll()


SERVER = Server()  # of this process


def _next_command() -> dict | None:
    """Serves: returns in each command's process with what it was asked for, and at the end of all with None."""
    given = dict(os.environ)
    for name in LIBRARIES:
        __import__(name)
    gc.freeze()
    sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False  # of the project: compiled once, left nowhere
    answers, (ended, wake) = os.dup(1), os.pipe()
    for end in (ended, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([0, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            while (found := _reap()) is not None:
                os.write(answers, b"%d %d\n" % found)
        if 0 in ready:
            line = sys.stdin.buffer.raw.readline()
            if not line:
                return None
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number in (answers, ended, wake):
                    os.close(number)
                asked = json.loads(line)
                _change_environment(given, asked["environment"])
                return asked
            os.write(answers, b"%d\n" % pid)


def _change_environment(given: Mapping[str, str], asked: Mapping[str, str]) -> None:
    """From what was given to the server to what is asked for; what the libraries have set stays."""
    for name in given.keys() - asked.keys():
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in asked.items() if given.get(name) != value})


def _reap() -> tuple[int, int] | None:
    """(id, exit code) of a child that has ended."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def _become(asked: dict) -> None:
    """This process is `python ARGUMENTS` from here on."""
    for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    first, *rest = asked["arguments"]
    if first == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0], sys.argv, main.__file__ = str(pathlib.Path(first).parent.absolute()), [first, *rest], first
        exec(compile(pathlib.Path(first).read_bytes(), first, "exec"), main.__dict__)


if __name__ == "__main__":
    command = _next_command()
    if command is not None:
        _become(command)
