"""Where a case's time goes (`benchmarks/gpu.py --profile`): its kernels, by the operations that they came from."""

import collections
from collections.abc import Callable, Iterator
from pathlib import Path
import re
import tempfile
from typing import Any

import jax

_ROWS = 45
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?metadata=\{[^}]*?op_name=\"([^\"]*)\"", re.MULTILINE)


def traced(call: Callable[[], Any], wait: Callable[[Any], Any]) -> list[tuple[str, str, float]]:
    """[(kernel, instruction of the compiled program, milliseconds)] of one call, in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            wait(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        return sorted_events(data)


def sorted_events(data: Any) -> list[tuple[str, str, float]]:
    """The kernels of a profile: of the devices, or of the host where there is none."""
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    found = []
    for plane in planes or list(data.planes):
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and not line.name.startswith("XLA"):  # Note: XLA's own lines repeat the streams'.
                    found.append((event.start_ns, event.name, str(stats["hlo_op"]), event.duration_ns / 1e6))
    return [event[1:] for event in sorted(found)]


def origins(programs: dict[str, Any]) -> dict[str, str]:
    """Instruction → the operation of the model that it came from, with layers and transforms left out."""
    found: dict[str, str] = {}
    for program in programs.values():
        for name, path in _INSTRUCTION.findall(program.as_text()):
            found.setdefault(
                name, "/".join(part for part in path.split("/") if not re.match(r"jit\(|while|body|closed_", part))
            )
    return found


def report(title: str, events: list[tuple[str, str, float]], origin: dict[str, str]) -> Iterator[str]:
    """Lines: the whole, then the kernels that take longest, alike ones together."""
    total: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for kernel, instruction, ms in events:
        total[re.sub(r"[_.]\d+", "", kernel)[:60], origin.get(instruction, instruction)[-110:]].append(ms)
    yield f"{title}: {sum(ms for *_, ms in events):.3f} ms in {len(events)} kernels"
    for (kernel, path), each in sorted(total.items(), key=lambda item: -sum(item[1]))[:_ROWS]:
        yield f"{sum(each):9.3f} ms {len(each):5}  {kernel:60}  {path}"
