"""Autoscaling from zero workers: nodes of two types join for jobs, one is killed during each job, idle ones leave.

The nodes are real raylets, started and stopped by Ray's autoscaler through ``ray_node_provider.py``.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from preprocessing.io.local_ray import TOKEN_FILE
from tests.helpers.run_log import logged_steps
from workflows.checkpoints.layout import OUTCOME_FILE
from workflows.data.inspect import inspect_dataset
from workflows.jobs import local_head as heads
from workflows.jobs.job_server import query_cluster
from workflows.utils.json_io import read_json

ROOT = Path(__file__).resolve().parents[2]
HEAD_NODE = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
KINDS = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
    "preprocess": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    # A node with a GPU, as in the cloud files: Ray adds it only for jobs that need one. Without the GPU the first
    # autoscaler rates both types equal once it has seen the memory of a preprocessing node.
    "train": {"resources": {"CPU": 1, "GPU": 1, "trainer": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
}
NOTHING = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
STARTS = (
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)
CONFIG: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 4,
    "upscaling_speed": 100.0,
    "idle_timeout_minutes": 0.25,
    "provider": {
        "type": "external",
        "module": "tests.helpers.ray_node_provider.KillableNodeProvider",
        "launch_multiple": True,
        "head_node_id": HEAD_NODE,
        "use_node_id_as_ip": True,  # the autoscaler distinguishes nodes by IP
        "disable_node_updaters": True,  # no ssh
        "disable_launch_config_check": True,
    },
    "auth": {"ssh_user": "ray"},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    "available_node_types": KINDS,
    "head_node_type": "ray.head.default",
    **{name: [] for name in (*NOTHING, *STARTS)},
}


@pytest.fixture(params=["", "1"], ids=["first autoscaler", "ray up autoscaler"])
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[heads.LocalHead]:
    """Start a head with 0 CPUs and one of Ray's two autoscalers, on free ports."""
    ports = heads._free_ports()
    gcs = f"127.0.0.1:{ports['MFCTL_RAY_PORT']}"  # the default of the provider is port 6379
    temp = tempfile.mkdtemp(prefix="mfctl-", dir="/tmp")
    config = tmp_path_factory.mktemp("fake") / "cluster.json"
    config.write_text(json.dumps(CONFIG | {"provider": CONFIG["provider"] | {"gcs_address": gcs, "machines": temp}}))
    environment = heads._start_environment(temp) | {"RAY_FAKE_CLUSTER": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE, "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    if request.param:
        environment |= {"RAY_enable_autoscaler_v2": request.param, "RAY_CLOUD_INSTANCE_ID": HEAD_NODE}
    names = {"port": "RAY", "dashboard-port": "DASHBOARD", "dashboard-agent-listen-port": "AGENT"}
    names |= {"ray-client-server-port": "CLIENT", "metrics-export-port": "METRICS"}
    flags = [f"--{flag}={ports[f'MFCTL_{name}_PORT']}" for flag, name in names.items()]
    address = f"http://127.0.0.1:{ports['MFCTL_DASHBOARD_PORT']}"
    local_head = heads.LocalHead(cluster="fake", address=address, temp=temp)
    words = ["ray", "start", "--head", "--num-cpus=0", f"--autoscaling-config={config}", f"--temp-dir={temp}", *flags]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heads, "START_LIMIT_S", 600)  # a loaded machine starts slowly
            heads._run_start_command(" ".join(words), environment)
            heads._wait_until_alive(local_head)
        yield local_head
    finally:
        heads.stop_processes(local_head)  # ends commands that follow its jobs, too
        shutil.rmtree(temp, ignore_errors=True)
        assert heads.head_processes(temp) == []


class NodeMonitor:
    """Node types of a cluster over time; kills a node on request."""

    def __init__(self, head: heads.LocalHead) -> None:
        self.head, self.seen = head, set[str]()
        from ray.job_submission import JobSubmissionClient

        self.client = JobSubmissionClient(head.address, headers={"Authorization": f"Bearer {head.token}"})

    def kinds(self) -> list[str]:
        alive = [node for node in query_cluster(self.client).nodes if not node["is_head_node"]]
        now = ["train" if "trainer" in node["resources_total"] else "preprocess" for node in alive]
        self.seen |= set(now)
        return now

    def kill_one(self, kind: str) -> None:
        """Kill the raylet of a random node of this type with all its processes."""
        raylets = [
            p for p in heads.head_processes(self.head.temp) if p.name() == "raylet" and "--head" not in p.cmdline()
        ]
        found = [p for p in raylets if ("trainer" in " ".join(p.cmdline())) == (kind == "train")]
        victim = random.choice(found)
        for process in [*victim.children(recursive=True), victim]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def start_submit(head: heads.LocalHead, shared: Path, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Run `mfctl submit` in a folder that no job uses."""
    elsewhere = shared.parent / "submitting folder"
    elsewhere.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "workflows.cli", "submit", "--json", "--shared", str(shared)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MFCTL_TRACKER": "json", "OMP_NUM_THREADS": "1"}
    environment["RAY_AUTH_TOKEN_PATH"] = f"{head.temp}/{TOKEN_FILE}"
    return subprocess.Popen(
        [*command, "--python", sys.executable, head.address, "--", *words],
        cwd=elsewhere,
        env=environment,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )


def wait_for(process: subprocess.Popen[bytes], monitor: NodeMonitor, happened: Callable[[], bool], log: Path) -> None:
    while not happened():
        assert process.poll() is None, log.read_text()[-3000:]
        monitor.kinds()
        time.sleep(0.5)


def finish(process: subprocess.Popen[bytes], monitor: NodeMonitor, log: Path) -> None:
    while process.poll() is None:
        monitor.kinds()
        time.sleep(1)
    assert process.returncode == 0, log.read_text()[-6000:]


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_nodes_join_for_jobs_are_replaced_and_leave_when_idle(head: heads.LocalHead, tmp_path: Path) -> None:
    shared, monitor, log = tmp_path / "shared", NodeMonitor(head), tmp_path / "log"
    shared.mkdir()
    words = [sys.executable, "-m", "workflows.cli", "toyworld", "clips", "--clips", "12", "--seconds", "3"]
    subprocess.run(words, cwd=shared, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert monitor.kinds() == [], "no worker at the start"

    sets = ("window_seconds=3", "sources_per_unit=1", "workers=2")
    process = start_submit(head, shared, ["preprocess", "clips", "data", *sets_of(sets)], log)
    wait_for(process, monitor, lambda: bool(list(shared.glob("data/_done/*.json"))), log)
    monitor.kill_one("preprocess")
    finish(process, monitor, log)
    assert monitor.seen == {"preprocess"}
    facts = inspect_dataset(str(shared / "data"), verify=True)
    assert (facts["sources"], facts["accepted"]) == (12, 12)

    sets = ("engine.resource=trainer", "engine.workers=2", "engine.kind=torch", "steps=60", "data.batch=4")
    sets += ("data.held_out=0.25", "eval_every=60", "log_every=1", "checkpoint.every=20", "engine.max_failures=5")
    process = start_submit(
        head, shared, ["train", "--stage", "audio", "--data", "data", "--run", "a", *sets_of(sets)], log
    )
    wait_for(process, monitor, lambda: bool(list(shared.glob("runs/a/checkpoints/*/COMPLETE"))), log)
    monitor.kill_one("train")
    finish(process, monitor, log)
    assert monitor.seen == {"preprocess", "train"}
    assert read_json(shared / "runs/a" / OUTCOME_FILE)["progress"]["step"] == 60
    assert logged_steps(shared / "runs/a") == list(range(61)), "every step exactly once"

    ended = time.monotonic()
    while monitor.kinds():
        time.sleep(1)
        assert time.monotonic() - ended < 300, "idle nodes leave"
    assert not list((shared.parent / "submitting folder").glob("data*")), "nothing is written in the submitting folder"


def sets_of(values: tuple[str, ...]) -> list[str]:
    return [word for value in values for word in ("--set", value)]
