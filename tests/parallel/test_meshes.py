"""A mesh does not change what is learned: the cheap part of benchmarks/meshes.py, with a vocabulary that is odd."""

from tests.conftest import run_python


def test_stage2_on_a_mesh_of_eight_equals_one_device():
    done = run_python("benchmarks/meshes.py", "--stages", "stage2", "--meshes", "2,2,2", "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    row = next(line for line in done.stdout.splitlines() if line.startswith("| stage2 | (2, 2, 2) |"))
    figures = [float(cell) for cell in row.split("|")[3:6]]
    # Not exactly equal either: the mesh was really used, and its reductions have another order.
    assert 0 < max(figures) < 1e-5
