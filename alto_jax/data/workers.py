"""Reading processes: Python reads on one core a process, whatever its threads; a large model's step wants more.

    read = Workers(function, 8)      # function(number) -> anything that can be pickled, such as a dict of arrays
    read(5)                          # function(5), computed in one of the 8 processes; call it from several threads

The processes are fresh ones (nothing of this process is forked, and no `__main__` guard is needed), know no device, and
end when this process ends, however it ends. They leave signals to it. Arrays cross a socket without being pickled.
"""

from collections.abc import Callable
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import Any
import weakref

import cloudpickle
import numpy as np

_COUNT = struct.Struct("<I")


class Workers:
    """A function that is computed in other processes, one call a process at a time."""

    def __init__(self, function: Callable[[int], Any], num_workers: int):
        """Starts nothing yet: each process starts at its first call.

        Args:
          function: must be picklable (cloudpickle); every process gets its own copy.
          num_workers: processes, at least 1.
        """
        self._function, self._payload = function, b""
        self._lock, self._loss = threading.Lock(), ""
        self._processes: list[subprocess.Popen] = []
        self._idle: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(num_workers):
            self._idle.put(None)
        self._closing = weakref.finalize(self, _end, self._processes)

    def __call__(self, number: int, what: str = "") -> Any:
        """`function(number)`; raises what it raises. `what` names the number in messages.

        Raises:
          ChildProcessError: the process died.
        """
        worker = self._idle.get()
        try:
            worker = worker or self._start()
            try:
                _send(worker[0], number)
                is_error, value = _receive(worker[0])
            except (OSError, EOFError) as error:
                # Note: a later call that gets the dead process tells of the number that it died of, too.
                self._loss = self._loss or self._lost(worker[1], what or f"number {number}")
                raise ChildProcessError(self._loss) from error
        finally:
            self._idle.put(worker)
        if is_error:
            raise value
        return value

    def _start(self) -> tuple[socket.socket, subprocess.Popen]:
        with self._lock:
            if not self._closing.alive:
                raise ChildProcessError("the reading processes are closed")
            self._payload = self._payload or cloudpickle.dumps(self._function)
            ours, theirs = socket.socketpair()
            with theirs:
                environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
                command = [sys.executable, "-P", "-m", "alto_jax.data.workers", str(theirs.fileno())]
                process = subprocess.Popen(
                    command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=environment
                )
            self._processes.append(process)
        _send(ours, self._payload)
        return ours, process

    def _lost(self, process: subprocess.Popen, what: str) -> str:
        """What to say of a process that does not answer any more."""
        if not self._closing.alive:
            return "the reading processes are closed"
        code = process.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = " (out of memory? fewer processes need less)" if -code == signal.SIGKILL else ""
        return (
            f"config.data.num_workers: a reading process was ended {how} while it read {what}{hint}; started again, the"
            " run goes on from its last checkpoint"
        )

    def close(self) -> None:
        """Ends the processes; calls under way raise ChildProcessError."""
        self._closing()


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:  # Note: they only read, so that nothing is lost.
        process.kill()
    for process in processes:
        process.wait()


def _send(to: socket.socket, value: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    parts: list[Any] = [pickle.dumps(value, protocol=5, buffer_callback=buffers.append)]
    parts += [buffer.raw() for buffer in buffers]
    to.sendall(_COUNT.pack(len(parts)) + struct.pack(f"<{len(parts)}Q", *map(len, parts)))
    for part in parts:
        to.sendall(part)


def _receive(source: socket.socket) -> Any:
    (count,) = _COUNT.unpack(_exactly(source, _COUNT.size))
    sizes = struct.unpack(f"<{count}Q", _exactly(source, 8 * count))
    parts = [_exactly(source, size) for size in sizes]
    return pickle.loads(parts[0], buffers=parts[1:])


def _exactly(source: socket.socket, size: int) -> memoryview:
    """`size` bytes; raises EOFError where they end before."""
    found = memoryview(np.empty(size, np.uint8).data)
    done = 0
    while done < size:
        count = source.recv_into(found[done:])
        if count == 0:
            raise EOFError
        done += count
    return found


def _serve(source: socket.socket) -> None:
    """Answers until nobody asks any more."""
    try:
        function = pickle.loads(_receive(source))
        while True:
            number = _receive(source)
            try:
                answer = (False, function(number))
            except Exception as error:
                answer = (True, _picklable(error))
            _send(source, answer)
    except (EOFError, ConnectionError):
        return


def _picklable(error: Exception) -> Exception:
    """The error, or its text as a RuntimeError where it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"  # Note: what is read may import JAX, which must not take a device.
    with socket.socket(fileno=int(sys.argv[1])) as own:
        _serve(own)
