"""What a compiled program says about itself: memory by kind, and the data that its collectives move.

XLA's own cost analysis counts the body of a loop once; here the text of the optimised program is read, and a collective
inside a loop counts as often as the loop runs, where its trip count is known.
"""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "f8": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}

_COMPUTATION = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?->.*\{\s*$")
_OPCODE = re.compile(rf"[\s)}}]({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|async_computation)=\{?%?([\w.\-]+(?:,\s*%?[\w.\-]+)*)\}?"
)
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+)|false_computation=%?([\w.\-]+))"
)
_TRIPS = re.compile(r'known_trip_count[\\"]*\s*:\s*\{[\\"]*n[\\"]*\s*:\s*[\\"]*(\d+)')
_NAMES = re.compile(r"%([\w.\-]+)")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*\{([^}]*)\}")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# Between TPU slices: what is received from the runtime that moves data over the network.
_SLICES = re.compile(
    r'[\s)}]recv\(.*_xla_host_transfer_handler_name="xla_megascale_runtime".*'
    r'_xla_megascale_target="\{([0-9,]*)\}.*_xla_megascale_transfer_type="([A-Z_]+)"'
)
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([0-9,]*)\}")


class OutOfMemory(Exception):
    """The program does not fit. Bytes, None where the compiler did not say: used in all, or temporaries; limit."""

    def __init__(self, used: int | None, temporaries: int | None, limit: int | None):
        super().__init__(f"used {used}, temporaries {temporaries}, of {limit} bytes")
        self.used, self.temporaries, self.limit = used, temporaries, limit


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind among groups of one size, in one run of the program.

    count: how often one is executed. bytes: what each device receives in all of them. in_unknown_loop: some are in a
    loop whose trip count the text does not tell, and counted once. between_slices: over the network between TPU slices;
    the groups are then of slices, and each device's part of what moves is counted.
    """

    kind: str
    group_size: int
    count: int
    bytes: int
    in_unknown_loop: bool
    between_slices: bool = False


def compile_program(lowered: Any) -> Any:
    """Compiles `lowered`.

    Raises:
      OutOfMemory: the compiler found that the program does not fit into the device.
    """
    try:
        return lowered.compile()
    except Exception as error:
        found = parse_out_of_memory(str(error))
        if found is None:
            raise
        raise found from error


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """Reads XLA's out-of-memory messages; None if it is another one."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    factor = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number = lambda found, i: round(float(found[i]) * factor[found[i + 1]])
    found = re.search(rf"Used {size} of {size} hbm", message)
    if found:
        return OutOfMemory(number(found, 1), None, number(found, 3))
    found = re.search(rf"required for HLO temporaries \({size}\) exceeds available HBM \({size}\)", message)
    if found:
        return OutOfMemory(None, number(found, 1), number(found, 3))
    return OutOfMemory(None, None, None) if re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", message) else None


def _shape_bytes(text: str) -> list[int]:
    """Bytes of every array shape in the text of a type."""
    sizes = []
    for dtype, dims in _SHAPE.findall(text):
        bits = _ITEM_BITS.get(dtype)
        if bits is None:
            digits = re.match(r"(?:f8|[a-z]+(\d+))", dtype)
            bits = 8 if dtype.startswith("f8") else int(digits[1]) if digits and digits[1] else 0
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        sizes.append(count * bits // 8)
    return sizes


def _group_size(line: str, num_devices: int) -> int:
    found = _IOTA_GROUPS.search(line)
    if found:
        return int(found[2])
    found = _MESH_GROUPS.search(line)
    if found:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        # Note: 'axis':(a)b is a part of an axis, of size b.
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    found = _LISTED_GROUPS.search(line)
    return len(found[1].split(",")) if found and found[1] else num_devices


def _received(kind: str, sizes: list[int], is_start: bool, group: int) -> int:
    """Bytes that one device receives in a collective whose result has arrays of `sizes`."""
    if is_start and kind in ("all-gather", "collective-permute", "ragged-all-to-all", "all-to-all") and len(sizes) > 1:
        # An asynchronous one returns (operands, results, ...): scalars are flags.
        arrays = [size for size in sizes if size > 4]
        sizes = arrays[len(arrays) // 2 :]
    total, others = sum(sizes), group - 1
    if kind == "all-reduce":
        return 2 * total * others // group
    if kind == "reduce-scatter":
        return total * others
    return total if kind in ("collective-permute", "collective-broadcast") else total * others // group


def trip_count(line: str, computation: str, computations: dict[str, list[str]]) -> int | None:
    """How often a `while` runs: as XLA says, or else as its condition `counter < constant` does.

    The counter is taken to rise by one, from the constant it starts with (0 if that is not found), as in every
    `lax.scan`. None: the condition is another one, such as that of a `while_loop` with an early exit.

    Args:
      line: the instruction.
      computation: name of the computation that it is in.
      computations: lines of all computations by name.
    """
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
    defined = _definitions(computations.get(condition[1] if condition else "", ()))
    root = next((text for text in defined.values() if text.startswith("ROOT ")), "")
    compared = re.search(r"\scompare\(([^)]*)\), direction=(LT|GT)", root)
    names = _NAMES.findall(compared[1]) if compared else []
    if compared is None or len(names) != 2:
        return None
    counter, limit = (defined.get(name, "") for name in (names if compared[2] == "LT" else reversed(names)))
    end, index = _constant(limit), re.search(r"get-tuple-element\(.*\), index=(\d+)", counter)
    if end is None or index is None:
        return None
    before = _definitions(computations.get(computation, ()))
    operand = re.search(r"[\s)}]while\(.*?%([\w.\-]+)\)", line)
    elements = re.search(r"[\s)}]tuple\((.*?)\)(?:,|$)", before.get(operand[1], "") if operand else "")
    names = _NAMES.findall(elements[1]) if elements else []
    start = before.get(names[int(index[1])], "") if int(index[1]) < len(names) else ""
    while copied := re.search(r"[\s)}]copy\(.*?%([\w.\-]+)\)", start):
        start = before.get(copied[1], "")
    return max(end - (_constant(start) or 0), 0)


def _definitions(lines: Sequence[str]) -> dict[str, str]:
    """Name → instruction, of a computation."""
    found = {}
    for line in lines:
        name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        if name:
            found[name[1]] = line.strip()
    return found


def _constant(instruction: str) -> int | None:
    """The value of a scalar integer constant; None if the instruction is another."""
    found = re.search(r"\sconstant\((-?\d+)\)", instruction)
    return int(found[1]) if found else None


def computations_of(text: str) -> tuple[dict[str, list[str]], str | None]:
    """The lines of every computation of an optimised HLO module by its name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, name = None, None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and "=" not in line.split("->")[0].split("(")[0]:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif line.strip() == "}":
            name = None
        elif name is not None:
            computations[name].append(line)
    return computations, entry


def collectives(text: str, num_devices: int) -> list[Collective]:
    """Reads the collectives of an optimised HLO module (`compiled.as_text()`), the largest first."""
    computations, entry = computations_of(text)
    found: dict[tuple[str, int, bool], list] = {}

    def add(kind: str, group: int, between_slices: bool, times: int, moved: int, unknown: bool) -> None:
        total = found.setdefault((kind, group, between_slices), [0, 0, False])
        total[0] += times
        total[1] += times * moved
        total[2] |= unknown

    def visit(name: str, times: int, unknown: bool, seen: set[str], depth: int = 0) -> None:
        for line in computations.get(name, ()) if depth < 64 else ():
            match = _OPCODE.search(line)
            if match:
                channel = _CHANNEL.search(line)
                # Note: an asynchronous collective of a TPU stands in every fusion that it overlaps with.
                if channel and channel[1] in seen:
                    continue
                seen |= {channel[1]} if channel else set()
                kind, group = match[1], _group_size(line, num_devices)
                sizes = _shape_bytes(line[: match.start()].split("=", 1)[1])
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    # A TPU's reduce-scatter is a fusion of an all-reduce and a slice of its result.
                    kind, sizes = "reduce-scatter", [size // group for size in sizes]
                add(kind, group, False, times, _received(kind, sizes, bool(match[2]), group), unknown)
                continue
            crossed = _SLICES.search(line)
            if crossed:
                kind, group = crossed[2].lower().replace("_", "-"), len(crossed[1].split(","))
                # Note: the result is (what is received, a counter, a token).
                size = _shape_bytes(line[: line.index("recv(")].split("=", 1)[1])[0]
                add(kind, group, True, times, _received(kind, [size], False, group), unknown)
                continue
            if re.search(r"[\s)}]while\(", line):
                trips = trip_count(line, name, computations)
                body = re.search(r"\bbody=%?([\w.\-]+)", line)
                if body:
                    visit(body[1], times * (1 if trips is None else trips), unknown or trips is None, set(), depth + 1)
                continue
            if re.search(r"[\s)}]async-(done|update)\(", line):
                continue
            for called in _CALLED.findall(line):
                for child in re.split(r",\s*%?", called):
                    visit(child, times, unknown, seen, depth + 1)
            for names in _BRANCHES.findall(line):
                for child in re.split(r",\s*", ",".join(filter(None, names))):
                    visit(child.lstrip("%"), times, unknown, seen, depth + 1)

    if entry is not None:
        visit(entry, 1, False, set())
    result = [
        Collective(kind, group, count, total, unknown, crosses)
        for (kind, group, crosses), (count, total, unknown) in found.items()
        if group > 1
    ]
    return sorted(result, key=lambda c: -c.bytes)


def program_text(executable: Any) -> str | None:
    """The optimised program as text, or None where the compiler cannot print it."""
    try:
        return executable.as_text()
    # Note: libtpu fails an internal check for some programs; what it raises is not documented.
    except Exception:
        return None
