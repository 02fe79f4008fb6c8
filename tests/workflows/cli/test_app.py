"""Contract of the command line: commands, exit codes, output streams."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from workflows import doctor
from workflows.cli.app import app
from workflows.utils import environment

ROOT = Path(__file__).resolve().parents[3]
VERBS = [
    "doctor",
    "demo",
    "toyworld",
    "preprocess",
    "inspect",
    "reconstruct",
    "train",
    "generate",
    "evaluate",
    "submit",
    "status",
    "logs",
    "stop",
    "mlflow",
]


def python(program: str, *, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=cwd, env=_env(variables), capture_output=True, text=True, timeout=60, check=False
    )


def mfctl(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workflows.cli", *words]
    return subprocess.run(
        command, cwd=cwd, env=_env(variables), capture_output=True, text=True, timeout=60, check=False
    )


def _env(variables: dict[str, str]) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | variables


def test_help_of_every_command_works_without_torch_and_ray() -> None:
    listed = re.findall(r"^\W+([a-z]+) {2}", mfctl("--help").stdout, re.MULTILINE)
    assert set(VERBS) <= set(listed)
    program = f"""
import sys
from typer.main import get_command
from typer.testing import CliRunner
from workflows.cli.app import app
for verb in {VERBS}:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.output, verb
assert not {{"torch", "ray", "deepspeed", "mlflow"}} & set(sys.modules)
"""
    done = python(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["doctr"], "Did you mean 'doctor'?"),
        (["train", "--stage", "video", "--preste", "tiny"], "--preset"),
        (["train", "--stage", "vido"], "'video'"),
        (["toyworld", "out", "--clips", "0"], "greater than or equal to 1"),
        (["evaluate", "run", "--steps", "1,x"], "--steps"),
        (["stop"], "mfctl stop --head"),
        (["submit", "nowhere.yaml", "--", "doctor"], "nowhere.yaml does not exist"),
        (["status", "raysubmit_none"], "no job raysubmit_none"),
    ],
)
def test_wrong_usage_exits_with_2_and_the_fix_and_writes_nothing(
    tmp_path: Path, words: list[str], message: str
) -> None:
    done = mfctl(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "dataset", "--json", "--vrify"], "No such option: --vrify"),
        (["toyworld", "out", "--clips", "0", "--json"], "greater than or equal to 1"),
    ],
)
def test_wrong_usage_with_json_is_one_object(tmp_path: Path, words: list[str], message: str) -> None:
    done = mfctl(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"error", "exit_code"} and found["exit_code"] == 2
    assert message in found["error"]
    assert "--" in done.stderr and done.stderr.count("Usage:") == 1


def test_options_of_a_submitted_command_do_not_print_json(tmp_path: Path) -> None:
    done = mfctl("submit", "--targt", "x", "--", "doctor", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preprocess", "nowhere", "dataset"], "nowhere"),
        (["preprocess", "a.mp4", "dataset", "--set", "windw_seconds=3"], "did you mean window_seconds?"),
        (["preprocess", "a.mp4", "dataset", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["inspect", "nowhere"], "nowhere is not a dataset"),
        (["reconstruct", "nowhere", "clip", "out.mp4"], "nowhere is not a dataset"),
        (["train", "--stage", "video", "--data", "nowhere"], "nowhere is not a dataset"),
        (["train", "--stage", "joint"], "mfctl preprocess"),
        (["generate", "nowhere", "out.mp4"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_exits_with_2_and_its_name_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, "one message"
    assert not list(tmp_path.iterdir())


def test_with_json_standard_output_is_exactly_one_object() -> None:
    work = "print('a'); os.write(1, b'b'); subprocess.call(['echo', 'c']); return {'x': float('nan'), 'p': Path('q')}"
    done = python(_app(work, "as_json=True"))
    assert json.loads(done.stdout) == {"x": None, "p": "q"}
    assert done.stdout.count("\n") == 1
    assert all(letter in done.stderr for letter in "abc")


def test_with_json_an_error_is_an_object() -> None:
    done = python(_app("raise UserInputError('no')", "as_json=True"))
    assert (done.returncode, json.loads(done.stdout)) == (2, {"error": "no", "exit_code": 2})


def test_without_json_a_result_is_readable_text() -> None:
    done = python(_app("return {'clips': 3, 'rejects_by_reason': {'no_audio': 1}}"))
    assert done.stdout == "clips: 3\nrejects_by_reason:\n  no_audio: 1\n"


def _app(work: str, options: str = "as_json=False") -> str:
    return f"""
import os, subprocess, typer
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from mfcore.errors import UserInputError
from workflows.cli import output
app = typer.Typer(pretty_exceptions_enable=False)
@app.command()
def verb():
    def work():
        {work}
    output.run_command(work, {options})
app()
"""


def test_paths_become_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert environment.resolve_path("a/../b*.mp4") == str(tmp_path / "b*.mp4")
    assert environment.resolve_path("s3://bucket/a") == "s3://bucket/a"
    assert environment.resolve_existing_path("video-1") == "video-1"
    (tmp_path / "video-1").mkdir()
    assert environment.resolve_existing_path("video-1") == str(tmp_path / "video-1")
    monkeypatch.setenv(environment.CWD_ENV, "/elsewhere")
    assert environment.resolve_path("a") == "/elsewhere/a"


def test_the_default_store_is_one_file_below_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert environment.tracking_uri() == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert environment.tracking_uri() == "http://tracking:5000"


def test_telemetry_is_off_unless_the_user_sets_it() -> None:
    program = "from workflows.utils.environment import apply_defaults as a; a(); import os; print(os.environ['{}'])"
    assert python(program.format("RAY_USAGE_STATS_ENABLED")).stdout == "0\n"
    assert python(program.format("RAY_AUTH_MODE"), RAY_AUTH_MODE="token").stdout == "token\n"


def test_doctor_prints_the_fix_for_a_missing_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.ffmpeg()
    assert check.state == "missing"
    assert "install ffmpeg" in check.remedy
    text = doctor.format_report({"ok": False, "checks": [vars(check)]})
    assert "no ffmpeg and no ffprobe" in text
    assert check.remedy in text


def test_doctor_names_flite_as_an_optional_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.flite()
    assert check.state == "optional"
    assert "install flite" in check.remedy


def test_doctor_reports_an_ffmpeg_without_the_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ffmpeg", "ffprobe"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho ' A....D aac   AAC'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.ffmpeg().detail.endswith("has no encoder libx264")


def test_doctor_reports_a_broken_library_and_a_read_only_store(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = doctor._imported("thing", "import no_such_thing")
    assert (broken.state, "no_such_thing" in broken.detail, broken.remedy) == ("missing", True, doctor.INSTALL)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/mlflow.db")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root can write everywhere
    assert doctor.mlflow_store().state == "missing"


@pytest.mark.slow
def test_doctor_reports_a_complete_installation() -> None:
    done = mfctl("doctor", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True), report
    assert {"torch", "ray", "deepspeed", "mlflow", "ffmpeg"} <= {
        c["name"] for c in report["checks"] if c["state"] == "ok"
    }
