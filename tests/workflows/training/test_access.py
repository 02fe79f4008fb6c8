"""Commands with Ray on one machine: all their processes listen on the loopback and serve holders of the token only."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.latent_dataset import write_dataset
from tests.helpers.port_probe import METHODS
from tests.helpers.ray_access import LOOPBACK
from tests.helpers.small_training import SMALL
from workflows.training import worker
from workflows.training.train import train_stage

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 65534
START_S = 400
SYSTEM = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
LONG = ("engine.kind=deepspeed", "engine.workers=2", "steps=100000", "log_every=100", "eval_every=50000")
COMMANDS = {
    "preprocess": ("preprocess", "clips", "out", "--set", "window_seconds=5/2", "--set", "workers=2"),
    "train": ("train", "--stage", "video", "--data", "set", *(w for s in (*SMALL, *LONG) for w in ("--set", s))),
    "evaluate": ("evaluate", "runs/joint", "--data", "toy", "--workers", "2", "--out", "sweep"),
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toy_data: str) -> Path:
    """Return a folder with clips, two datasets, and a trained run ``runs/joint``."""
    path = tmp_path_factory.mktemp("access")
    (path / "clips").symlink_to(Path(toy_data).parent / "clips")
    (path / "toy").symlink_to(toy_data)
    write_dataset(path / "set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFCTL_TRACKER", "json")
        for stage in ("video", "audio", "joint"):
            train_stage(stage, data=toy_data, sets=SMALL, runs_dir=path / "runs", run=stage, launch=worker.run_worker)
    return path


def listeners(pid: int) -> dict[tuple[str, int], str]:
    """Return the listening TCP sockets (address, port) of a process and its descendants, with their process names."""
    found = dict[tuple[str, int], str]()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.ip, connection.laddr.port] = process.name()
    return found


def is_working(found: dict[tuple[str, int], str], command: str) -> bool:
    """Return True when both workers compute: in training, after the connections of torch.distributed."""
    workers = [name for name in found.values() if name.startswith("ray::") and not name.startswith(SYSTEM)]
    return workers.count("ray::RayTrainWorker") >= 4 if command == "train" else len(workers) >= 2


def open_ways(ports: list[int], token: str = "") -> dict[str, list[str]]:
    """Return what a client can do at each port: without a token as another user, if the test may start one."""
    other = ["setpriv", f"--reuid={NOBODY}", "--clear-groups"]
    prefix = other if not token and os.geteuid() == 0 and shutil.which("setpriv") else []
    if prefix and subprocess.run([*prefix, sys.executable, "-c", "import grpc"], check=False).returncode:
        prefix = []
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.helpers.port_probe", token, *map(str, ports)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_all_sockets_are_on_the_loopback_and_closed_to_others(folder: Path, command: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MFCTL_TRACKER": "json", "OMP_NUM_THREADS": "1"}
    with (folder / f"{command}.txt").open("w") as log:
        arguments = [sys.executable, "-P", "-m", "workflows.cli", *COMMANDS[command]]
        process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        found, deadline = dict[tuple[str, int], str](), time.monotonic() + START_S
        while not is_working(listeners(process.pid), command):
            assert process.poll() is None and time.monotonic() < deadline, (folder / f"{command}.txt").read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)  # its Ray serves clients, and does not end
        found = listeners(process.pid)
        assert {(name, ip) for (ip, _), name in found.items() if ip not in LOOPBACK} == set()
        ports = sorted({port for _, port in found})
        assert not any(open_ways(ports).values()), "without a token"
        (gcs,) = (p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "gcs_server")
        held = open_ways(ports, gcs.environ()["RAY_AUTH_TOKEN_PATH"])
        assert {way for ways in held.values() for way in ways} >= set(METHODS[:2]), "with the token the calls run"
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(120)
