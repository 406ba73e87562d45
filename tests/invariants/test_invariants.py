"""The short forms of trajectories.py and collectives.py, each in a process with eight virtual devices."""

import json

import pytest

from tests.conftest import run_python
from tests.invariants import collectives

FOLDER = "tests/invariants"


@pytest.fixture(scope="module")
def stage2():
    """Differences of stage 2 from one device with plain rows, by what is changed; all cases: by command."""
    done = run_python(f"{FOLDER}/trajectories.py", "--stages", "stage2", "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| stage2 |")]
    return {row[2].strip(): [float(cell) for cell in row[3:5]] for row in rows}


def test_stage2_on_a_mesh_of_eight_equals_one_device(stage2):
    # Not exactly equal either: the mesh was really used, and its reductions have another order.
    assert 0 < max(stage2["mesh (2, 2, 2)"]) < 1e-5


def test_everything_changed_at_once_is_the_same_trajectory(stage2):
    """On a mesh, in micro-batches, with packed rows."""
    assert 0 < max(stage2["mesh (2, 2, 2), accumulate 2, pack 2"]) < 1e-5


def test_a_compiled_step_moves_what_is_recorded():
    """One stage's; all of them: .ci/run."""
    done = run_python(f"{FOLDER}/collectives.py", "--stages", "stage2")
    if done.returncode == collectives.OTHER_VERSION:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_new_gather_is_seen():
    recorded = json.loads(collectives.RECORD.read_text())["programs"]
    assert len(recorded) == 5 and all("all-reduce" in " ".join(lines) for lines in recorded.values())
    assert collectives.changes(recorded, recorded) == []
    first, *others = recorded["stage2 train"]
    found = {"stage2 train": ["all-gather among 2: 9 times, 9 bytes", *others]}
    assert collectives.changes(recorded, found) == [
        f"- stage2 train: {first}",
        "+ stage2 train: all-gather among 2: 9 times, 9 bytes",
    ]
