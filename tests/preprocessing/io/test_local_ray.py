"""A Ray that a command starts accepts clients with its token only, and listens on the loopback only."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from preprocessing.io import local_ray
from tests.helpers.ray_access import listening_addresses

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 65534
SESSION = """
import json, os, sys
from preprocessing.io.local_ray import start_ray
start_ray(num_cpus=1)
import ray
import psutil
ray.get(ray.remote(num_cpus=1)(lambda: 1).remote())
pids = [p.pid for p in psutil.Process().children(recursive=True)]
facts = {"gcs": ray.get_runtime_context().gcs_address, "token": os.environ["RAY_AUTH_TOKEN_PATH"], "pids": pids}
print(json.dumps(facts), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def session() -> Iterator[dict[str, Any]]:
    """Yield the facts of a process with a Ray started by ``start_ray``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    process = subprocess.Popen(
        [sys.executable, "-c", SESSION],
        cwd=ROOT,
        env=environment | {"RAY_AUTH_MODE": "disabled"},  # does not weaken a new Ray
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    facts = json.loads(process.stdout.readline())
    yield facts
    process.stdin.close()
    assert process.wait(60) == 0
    assert not Path(facts["token"]).exists(), "the token is removed at the end"


def attempt(gcs: str, *, uid: int = 0, **variables: str) -> str:
    """Read and write the store of the GCS in a new process; return its error or ""."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.helpers.ray_access", gcs, "", ""]
    if uid:
        command = ["setpriv", f"--reuid={uid}", "--clear-groups", *command]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["read_and_write_kv"]


@pytest.mark.slow
def test_a_client_needs_the_token(session: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("0" * 64)
    for variables in (
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")},
    ):
        assert "InvalidAuthToken" in attempt(session["gcs"], **variables)
    assert attempt(session["gcs"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=session["token"]) == ""


@pytest.mark.slow
def test_another_user_cannot_read_the_token_or_the_store(session: dict[str, Any]) -> None:
    token = Path(session["token"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and util-linux")
    read = subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", "--clear-groups", "cat", str(token)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert read.returncode == 1 and "Permission denied" in read.stderr
    if subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", "--clear-groups", sys.executable, "-c", "import ray"], check=False
    ).returncode:
        pytest.skip("another user cannot run this interpreter")
    for variables in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        assert "InvalidAuthToken" in attempt(session["gcs"], uid=NOBODY, **variables)


@pytest.mark.slow
def test_all_its_processes_listen_on_the_loopback(session: dict[str, Any]) -> None:
    alive = [pid for pid in session["pids"] if psutil.pid_exists(pid)]
    assert "gcs_server" in {psutil.Process(pid).name() for pid in alive}
    assert listening_addresses(alive) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_the_token_of_clients_comes_from_rays_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert local_ray.find_token() == ""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("user\n")
    assert local_ray.find_token() == "user"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(local_ray.write_token(tmp_path)))
    assert len(local_ray.find_token()) == 64
    monkeypatch.setenv("RAY_AUTH_TOKEN", "first")
    assert local_ray.find_token() == "first"


def test_each_token_is_new_and_private(tmp_path: Path) -> None:
    made = set[str]()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = local_ray.write_token(tmp_path / name)
        made.add(path.read_text())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(made) == 2
    with pytest.raises(FileExistsError):
        local_ray.write_token(tmp_path / "a")


WAITING = """
import time
from preprocessing.io.local_ray import start_ray
start_ray(num_cpus=1)
import ray
task = ray.remote(lambda: time.sleep(100))
reference = task.remote()
try:
    print("ready", flush=True)  # the signal may come at once
    ray.get(reference)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise SystemExit(1)
"""


@pytest.mark.slow
def test_sigterm_ends_a_command_as_sigint_does() -> None:
    """Without our handler the process aborts (-6) and prints a native stack."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    output, errors = process.communicate(timeout=90)
    assert (process.returncode, output) == (1, "interrupted\n"), errors
    assert "SIGTERM" not in errors and "Traceback" not in errors and "stack" not in errors.lower(), errors
