"""The exit code of commands that read Parquet files and end at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ROUNDS = 12


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", [("preprocess", "clips", "data", "--dry-run"), ("inspect", "data")])
def test_short_commands_end_with_zero(toy_data: str, command: tuple[str, ...]) -> None:
    """Threads of Arrow that outlive the interpreter aborted a third of them (SIGABRT) after the right output."""
    settings = ("--set", "window_seconds=5/2") if command[0] == "preprocess" else ()
    codes = [
        subprocess.run(
            [sys.executable, "-P", "-m", "workflows.cli", *command, *settings],
            cwd=Path(toy_data).parent,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
        ).returncode
        for _ in range(ROUNDS)
    ]
    assert codes == [0] * ROUNDS
