"""A driver that is paused at any point of its writing never harms the dataset of the next one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.toyworld.world import write_toyworld

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["new", "damaged"])
def test_a_driver_paused_at_any_point_leaves_a_dataset_that_verifies(kind, tmp_path):
    """SIGSTOP before each check of the lease and each change of a file, another driver, SIGCONT."""
    write_toyworld(tmp_path / "media", clips=3, seconds=2.0, size=32, jobs=1)
    command = [sys.executable, "-m", "tests.helpers.paused_driver", kind, str(tmp_path / "media"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880, check=True)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    print(f"{len(lines)} points, {sum(line['first'] == 3 for line in lines)} ended with a lost lease")
    assert len(lines) >= 10
    assert [line for line in lines if (line["second"], line["verify"]) != (0, 0)] == [], run.stderr[-2000:]
    assert {line["first"] for line in lines} <= {0, 3}, "ended, or lost its lease"
    assert sum(line["first"] == 3 for line in lines) >= 8
