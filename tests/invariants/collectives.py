"""What each stage's compiled step moves between devices: kinds, counts and bytes, as recorded in collectives.json.

    python tests/invariants/collectives.py [--renew] [--stages stage1,stage2]

Compiles the programs of every stage at its smallest size for eight virtual CPU devices (data 2, fsdp 2, tensor 2) and
compares their collectives with the record; exits with 1 where they differ, and says how. --renew writes the record
anew: what changes in it is then seen in review. It is of one version of JAX, whose compiler chooses some of them.
"""

import argparse
import importlib.metadata
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.parallel.stages_on_processes import STAGES  # noqa: E402

RECORD = pathlib.Path(__file__).with_suffix(".json")
MESH = (2, 2, 2)
OTHER_VERSION = 3  # exit code


def found_in(stage: str) -> dict[str, list[str]]:
    """{"stage program": collectives, one a line} of a stage's step."""
    from alto_jax.parallel import sharding  # late: they import JAX
    from alto_jax.plan import hlo, programs  # late: they import JAX
    from tests.invariants import trajectories  # late: it asks for eight devices

    config = trajectories.configured(stage, trajectories.Case(MESH))
    mesh = sharding.make_mesh(config.mesh)
    lines = {}
    for name, function, arguments in programs.lower_programs(config, "train", mesh)[2]:
        text = hlo.compile_program(function.lower(*arguments)).as_text()
        lines[f"{stage} {name}"] = [
            f"{c.kind} among {c.group_size}: {c.count} times, {c.bytes} bytes"
            + (" (a loop of unknown length counted once)" if c.in_unknown_loop else "")
            for c in sorted(hlo.collectives(text, mesh.size), key=lambda c: (c.kind, c.group_size))
        ]
    return lines


def changes(recorded: dict[str, list[str]], found: dict[str, list[str]]) -> list[str]:
    """What is gone (-) and what is new (+) in the programs that were found."""
    return [
        f"{mark} {name}: {line}"
        for name, lines in found.items()
        for mark, ours, others in (
            ("-", recorded.get(name, []), lines),
            ("+", lines, recorded.get(name, [])),
        )
        for line in ours
        if line not in others
    ]


def main() -> int:
    """Parses the command line, compiles, compares or writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="write the record")
    parser.add_argument("--stages", default=",".join(STAGES))
    options = parser.parse_args()
    version = importlib.metadata.version("jax")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"jax": version, "programs": {}}
    if record["jax"] != version and not options.renew:
        print(f"recorded with jax {record['jax']}, this is {version}")
        return OTHER_VERSION
    found: dict[str, list[str]] = {}
    for stage in options.stages.split(","):
        found |= found_in(stage)
    if options.renew:
        kept = record["programs"] if record["jax"] == version else {}
        text = json.dumps({"jax": version, "programs": kept | found}, indent=1)
        RECORD.write_text(text + "\n")
        return 0
    changed = changes(record["programs"], found)
    if changed:
        print("\n".join(changed))
        print(f"not as {RECORD.name} has it; if that is meant: python tests/invariants/collectives.py --renew")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
