"""Commands as Ray jobs on a local head that the test starts and stops."""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from preprocessing.io.local_ray import TOKEN_FILE, write_token
from tests.helpers.parsed_command import parse
from tests.helpers.ray_access import listening_addresses
from workflows.jobs import local_head, submit

ROOT = Path(__file__).resolve().parents[3]
LOCAL = ROOT / "cluster" / "local.yaml"


def mfctl(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process, outside the checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "workflows.cli", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_local_cluster_file_is_valid_and_local() -> None:
    config = local_head.load_cluster_file(str(LOCAL))
    assert local_head.is_local(config)
    assert "--node-ip-address=127.0.0.1" in config["head_start_ray_commands"][0]
    assert "--dashboard-agent-listen-port=" in config["head_start_ray_commands"][0]


def test_an_unknown_key_is_named(here: Path) -> None:
    path = write_yaml(here, "cluster_name: a\nprovider: {type: local}\nmax_wrokers: 3\n")
    with pytest.raises(ValueError, match="max_wrokers"):
        local_head.load_cluster_file(path)


@pytest.mark.parametrize(
    ("target", "argv", "message"),
    [
        ("nowhere.yaml", ["doctor"], "nowhere.yaml does not exist"),
        ("ftp://host:1", ["doctor"], "ftp://host:1.*http://host:8265"),
        (str(LOCAL), [], "nothing to submit"),
    ],
)
def test_wrong_targets_are_rejected_without_side_effects(
    here: Path, target: str, argv: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        submit.submit_job(target, parse(argv))
    assert not list(here.iterdir())


def test_an_unknown_job_is_named_with_the_known_jobs(here: Path) -> None:
    with pytest.raises(ValueError, match="raysubmit_x.*none"):
        submit.job_status("raysubmit_x")


def test_the_job_uses_the_folder_and_store_of_the_user(here: Path) -> None:
    variables = submit._environment(None, elsewhere=False)
    assert variables["MFCTL_CWD"] == str(here)
    assert variables["MLFLOW_TRACKING_URI"] == f"sqlite:///{here}/runs/mlflow.db"
    assert not [name for name in variables if "AUTH" in name], "a job has the mode and the token of its cluster"


def test_a_head_forks_without_the_handlers_of_grpc(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With them, 2% of the servers that a head starts for its clients crash before their first output."""
    monkeypatch.delenv("GRPC_ENABLE_FORK_SUPPORT", raising=False)
    assert local_head._start_environment(str(here))["GRPC_ENABLE_FORK_SUPPORT"] == "0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the submitting folder; stop its head at the end and check that nothing of it remains."""
    path = tmp_path_factory.mktemp("cluster")
    yield path
    record = local_head.load_record(path / "runs/cluster/mfctl-local.json")
    ended = mfctl("stop", "--head", "--json", cwd=path)
    assert record is not None
    assert json.loads(ended.stdout) == {"stopped": [record.address]}
    assert local_head.head_processes(record.temp) == []
    assert not Path(record.temp).exists()


@pytest.mark.cluster
@pytest.mark.timeout(480)
def test_a_job_runs_on_a_new_head_and_returns_its_exit_code(folder: Path) -> None:
    done = mfctl("submit", "--json", str(LOCAL), "--", "doctor", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["status"], result["exit_code"]) == ("SUCCEEDED", 0)
    assert f"sqlite:///{folder}/runs/mlflow.db" in done.stderr  # the job runs in a copy of the tree

    wrong = mfctl("submit", str(LOCAL), "--", "inspect", "nothing", cwd=folder)
    assert wrong.returncode == 2, wrong.stderr
    assert f"{folder}/nothing" in wrong.stdout

    typo = mfctl("submit", str(LOCAL), "--", "doctor", "--jsno", cwd=folder)
    assert typo.returncode == 2, typo.stderr
    assert "No such option: --jsno" in typo.stderr, "rejected before the submission"

    detached = json.loads(mfctl("submit", "--json", "--detach", str(LOCAL), "--", "doctor", cwd=folder).stdout)
    assert detached["address"] == result["address"], "the second command uses the same head"
    stopped = json.loads(mfctl("stop", "--json", detached["job"], cwd=folder).stdout)
    assert stopped["status"] in {"STOPPED", "SUCCEEDED"}

    shown = mfctl("status", cwd=folder).stdout
    assert f"{result['job']} SUCCEEDED (exit code 0): doctor --json" in shown.splitlines()
    listed = json.loads(mfctl("status", "--json", cwd=folder).stdout)
    assert listed["heads"] == [{"address": result["address"], "answers": True}]
    assert [job["exit_code"] for job in listed["jobs"][:2]] == [0, 2]
    failed = listed["jobs"][1]["job"]
    assert mfctl("logs", failed, cwd=folder).returncode == 0
    assert mfctl("logs", "--follow", failed, cwd=folder).returncode == 2, "exit code of the job"
    assert '"name": "mlflow store"' in mfctl("logs", result["job"], cwd=folder).stdout


@pytest.mark.cluster
@pytest.mark.timeout(480)
def test_a_head_serves_clients_with_its_token_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detached = json.loads(mfctl("submit", "--json", "--detach", str(LOCAL), "--", "doctor", cwd=folder).stdout)
    head = local_head.load_record(folder / "runs/cluster/mfctl-local.json")
    assert head is not None
    token = Path(head.temp, TOKEN_FILE)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(Path(head.temp).stat().st_mode) == 0o700
    processes = local_head.head_processes(head.temp)
    assert listening_addresses([p.pid for p in processes]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    (gcs,) = (p for p in processes if p.name() == "gcs_server")
    ports = [c.laddr.port for c in gcs.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    (server,) = (p.cmdline() for p in processes if "ray.util.client.server" in p.cmdline())
    (client,) = (word.split("=")[1] for word in server if word.startswith("--port="))
    ways = f"127.0.0.1:{ports[0]}", head.address, f"127.0.0.1:{client}"
    wrong = write_token(folder)
    for variables, expected in (
        ({"RAY_AUTH_MODE": "disabled"}, "Auth|ray client connection timeout"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)}, "Auth|ray client connection timeout"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}, "^$"),
    ):
        for way, error in access(*ways, **variables).items():
            assert re.search(expected, error), (way, variables, error)
    wrong.unlink()

    other = folder / "other"  # has no record of the head
    other.mkdir()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other / "none"))
    rejected = mfctl("submit", head.address, "--", "doctor", cwd=other)
    assert rejected.returncode == 2 and "requires a token. Set RAY_AUTH_TOKEN_PATH" in rejected.stderr, rejected.stderr
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert mfctl("submit", head.address, "--", "doctor", cwd=other).returncode == 0
    mfctl("stop", detached["job"], cwd=folder)


def access(*ways: str, **variables: str) -> dict[str, str]:
    """Try to use a head in a new process; return the error of each way."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.ray_access", *ways],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.cluster
@pytest.mark.timeout(480)
def test_a_training_job_writes_into_the_folder_of_the_user(folder: Path) -> None:
    seconds = ("--set", "window_seconds=3", "--set", "workers=0")
    for words in (("toyworld", "clips", "--clips", "4", "--seconds", "3"), ("preprocess", "clips", "toy", *seconds)):
        done = mfctl(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
    short = ("steps=2", "data.batch=2", "data.held_out=0.25", "eval_every=2", "log_every=1")
    sets = [word for value in short for word in ("--set", value)]
    done = mfctl("submit", str(LOCAL), "--", "train", "--stage", "video", "--data", "toy", *sets, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run_dir: {folder}/runs/video-" in done.stdout
    assert list(folder.glob("runs/video-*/checkpoints/*/COMPLETE"))
    assert (folder / "runs/mlflow.db").is_file()
