"""Which of several processes holds the others up.

All processes wait for each other in every update, so that their seconds per step are nearly equal. What tells them
apart is the time in which a process does not wait for its devices: reading data, and the Python of the loop. A process
that has little of the step left to wait is the one that the others wait for. (A slow device is not seen so: all wait
for it alike. On the CPU, where several processes compute in the call itself, that counts as their own time.)
"""

import socket
import statistics

from alto_jax.parallel import distributed


class Stragglers:
    """Compares the processes at log steps; all must ask together."""

    def __init__(self) -> None:
        self._told: int | None = None
        self.news = ""  # What is to be said now.

    def compare(self, step_seconds: float, own_seconds: float) -> dict[str, float]:
        """Metrics of the slowest process; {} if there is one alone (which then waits for nobody).

        Args:
          step_seconds: of this process, per update.
          own_seconds: those of them in which it did not wait for its devices.

        Returns:
          {"step_seconds_max", "own_seconds_max", "own_seconds_median", "slowest_process": the one of own_seconds_max}.
        """
        speeds = distributed.gather([step_seconds, own_seconds, socket.gethostname()])
        self.news = ""
        if len(speeds) == 1:
            return {}
        own = [speed[1] for speed in speeds]
        slowest = own.index(max(own))
        median = statistics.median_low(own)
        seconds, most, host = speeds[slowest]
        if most > 2 * median and most > seconds / 2 and slowest != self._told:
            self._told = slowest
            self.news = (
                f"process {slowest} ({host}) holds the others up: {most:.3g} of {seconds:.3g} s a step are its own"
                f" (reading data, Python), {median:.3g} s in the middle one"
            )
        return {
            "step_seconds_max": max(speed[0] for speed in speeds),
            "own_seconds_max": most,
            "own_seconds_median": median,
            "slowest_process": float(slowest),
        }
