"""`mfctl study` rejects settings that no study can run with, before it writes a file."""

import pytest
from typer.testing import CliRunner

from workflows.cli.app import app


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--set batch=0", "batch=0: use 1 to"),
        ("--set joint_batch=-1", "joint_batch=-1: use 1 to"),
        ("--set joint_steps=0", "joint_steps=0: use 1 to"),
        ("--set chunks=[]", "chunks=[]: give at least one clip length"),
        ("--set joint_chunks=[6,0]", "joint_chunks=0: use 1 to"),
        ("--set fake_ratio=0", "fake_ratio=0.0: use a number above 0"),
        ("--set fake_final=2", "fake_final=2.0: use 0 to 1"),
        ("--set clips=0", "clips=0: use 1 to"),
        ("--set seconds=0", "seconds=0.0: use a number above 0"),
        ("--set guidance=-1", "guidance=-1.0: use 0 to"),
        ("--minutes nan", "--minutes nan: use a number above 0"),
        ("--minutes inf", "--minutes inf: use a number above 0"),
        ("--minutes 0", "--minutes 0.0: use a number above 0"),
        ("--minutes -1", "--minutes -1.0: use a number above 0"),
        ("--minutes nan --networks other", "--minutes nan: use a number above 0"),
        ("--seeds 99999999", "--seeds 99999999: "),
    ],
)
def test_impossible_settings_are_rejected_before_any_file(tmp_path, options, message):
    out = tmp_path / "study"
    done = CliRunner().invoke(app, ["study", "--quick", "--out", str(out), *options.split()])
    assert done.exit_code == 2
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not list(tmp_path.iterdir())
