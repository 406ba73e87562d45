"""What the commands share: one clear line for bad input, instead of a stack trace."""

from collections.abc import Callable
import logging
import os
import sys
import traceback

from alto_jax.parallel import distributed
from alto_jax.train.preemption import EXIT_RESUMABLE, Stopped


def run(main: Callable[[], int | None]) -> None:
    """Runs a command; bad input ends it with one line on stderr and exit code 2 instead of a stack trace.

    ALTO_TRACEBACK=1 in the environment shows the stack trace as well. A run that was asked to stop, or that lost one of
    its processes, ends with exit code 75: the same command goes on from what was saved.
    """
    # Note: Orbax reports every file that a checkpoint of another kind would have.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        sys.exit(main() or 0)
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(EXIT_RESUMABLE)
    except distributed.ProcessLost as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(EXIT_RESUMABLE)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("ALTO_TRACEBACK"):
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        distributed.leave(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
