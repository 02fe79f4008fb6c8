"""One message per error, the exit code of its kind, and a traceback that is neither shown unasked nor lost."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from ray.exceptions import RayTaskError

from mfcore.errors import UserInputError
from preprocessing.io.errors import InfrastructureError
from workflows.cli import output
from workflows.cli.errors import FAILED, TRACEBACK, WRONG_INPUT, describe_error
from workflows.utils.environment import CWD_ENV, hide_passwords

ROOT = Path(__file__).resolve().parents[3]
LOG = re.compile(r"Traceback: (\S+mfctl-error-\S+\.log)$")


@pytest.fixture(autouse=True)
def logs_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def raised(error: BaseException) -> BaseException:
    """Return the error with a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserInputError("size 7: choose 8"), WRONG_INPUT, "size 7: choose 8"),
        (FileNotFoundError("clip.mp4 does not exist"), WRONG_INPUT, "clip.mp4 does not exist"),
        (OSError(errno.EROFS, "Read-only file system", "/ro/x"), WRONG_INPUT, "/ro/x: read-only file system. Choose"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
            WRONG_INPUT,
            "x: file name too long. Use shorter",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/locked/x"),
            WRONG_INPUT,
            "/locked/x: permission denied. Change",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/full/x"), FAILED, "/full/x: no space left on device. Free"),
        (InfrastructureError("s3://b: no such bucket. Create it"), FAILED, "s3://b: no such bucket. Create it"),
        (KeyboardInterrupt(), FAILED, "interrupted. Run the same command again"),
    ],
)
def test_expected_errors_are_one_message_without_a_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    text, exit_code = describe_error(raised(error))
    assert exit_code == code
    assert message in text
    assert len(text) < 300
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("Expecting value: line 1"), "internal error ValueError: Expecting value: line 1. Traceback: "),
        (KeyError("a bug"), "internal error KeyError: 'a bug'. Traceback: "),
        (RuntimeError("the engine stopped.\nmore"), "the engine stopped. Traceback: "),
        (MemoryError(), "internal error MemoryError. Traceback: "),
        (OSError("cut"), "internal error OSError: cut. Traceback: "),
    ],
)
def test_internal_errors_name_a_log_with_the_traceback(
    capfd: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    text, code = describe_error(raised(error))
    assert code == FAILED
    assert text.startswith(message)
    assert text.count("\n") == 0
    assert capfd.readouterr() == ("", ""), "no traceback unasked"
    found = LOG.search(text)
    assert found
    assert "in raised" in Path(found[1]).read_text()
    assert Path(found[1]).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("variable", [TRACEBACK, CWD_ENV])
def test_the_traceback_is_printed_on_request_and_in_the_log_of_a_job(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    assert describe_error(raised(KeyError("x")))[0].endswith("see above")
    assert "in raised" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_traceback_is_printed_if_no_log_can_be_written(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert describe_error(raised(KeyError("x")))[0].endswith("see above")
    assert "in raised" in capfd.readouterr().err


def test_an_error_in_a_ray_worker_is_a_failure_of_any_type() -> None:
    cause = UserInputError("inside")
    error = RayTaskError("f", "File x\nTraceback", cause).as_instanceof_cause()
    assert isinstance(error, UserInputError)
    text, code = describe_error(error)
    assert code == FAILED
    assert text.startswith("a Ray worker failed: inside. Traceback: ")


def test_passwords_are_hidden_in_message_and_log() -> None:
    assert hide_passwords("at http://ann:hunter2@h/x, s3://b/c:d@e") == "at http://ann:***@h/x, s3://b/c:d@e"
    assert "hunter2" not in describe_error(UserInputError("no answer from http://ann:hunter2@h"))[0]
    text, _ = describe_error(raised(KeyError("http://ann:hunter2@h")))
    found = LOG.search(text)
    assert found
    assert "hunter2" not in text + Path(found[1]).read_text()


def test_a_result_that_the_terminal_cannot_encode_is_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    output.write_stdout("clip \udcff\n")
    assert capfd.readouterr().out == "clip \\udcff\n"
    with pytest.raises(typer.Exit):
        output.exit_with_error("clip \udcff", 2, as_json=True)
    assert capfd.readouterr() == ('{"error": "clip \\udcff", "exit_code": 2}\n', "error: clip \\udcff\n")


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("mlflow --dry-run > /dev/full", 1, "cannot write the result to standard output: No space left on device"),
        ("toyworld --help > /dev/full", 1, "cannot write the result to standard output: No space left on device"),
        ("inspect nowhere --json > /dev/full", 2, "nowhere is not a dataset"),
        ("mlflow --dry-run >&-", 1, "standard output is closed. Redirect it"),
        ("inspect nowhere --json >&-", 1, "standard output is closed. Redirect it"),
        ("mlflow --dry-run 2>&- >&-", 1, ""),
    ],
)
def test_an_output_that_cannot_be_written_is_one_message(command: str, code: int, message: str, tmp_path: Path) -> None:
    done = shell(f"{sys.executable} -m workflows.cli {command}", tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == bool(message)


def test_a_deleted_current_directory_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(f"cd gone; rmdir ../gone; {sys.executable} -m workflows.cli inspect x", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the current directory was deleted. Change to an existing one" in done.stderr


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "http://tracking:5000"}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False
    )
