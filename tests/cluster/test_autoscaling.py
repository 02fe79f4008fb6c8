"""A head without workers: machines of two kinds come when jobs ask, one is killed in the middle, all go when idle.

The machines are those of ``provider.py``: real raylets and workers, begun and ended by Ray's autoscaler.
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
import ray

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
    # A machine with a GPU, as in the files for clouds: Ray brings it for nothing that another kind can do. (Without one
    # its first autoscaler, once it has seen how much memory a machine of preprocessing has, finds both kinds as good.)
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
        "module": "tests.helpers.ray_node_provider.MortalMachines",
        "launch_multiple": True,
        "head_node_id": HEAD_NODE,
        "use_node_id_as_ip": True,  # else all machines here are one to the autoscaler
        "disable_node_updaters": True,  # nothing is called by ssh
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


@pytest.fixture(params=["", "1"], ids=["first autoscaler", "the one of ray up"])
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[heads.LocalHead]:
    """A head of 0 CPUs with one of Ray's two autoscalers, on ports of its own."""
    ports = heads._free_ports()
    gcs = f"{ray.util.get_node_ip_address()}:{ports['MFCTL_RAY_PORT']}"  # the provider's default is port 6379
    temp = tempfile.mkdtemp(prefix="mfctl-", dir="/tmp")
    config = tmp_path_factory.mktemp("fake") / "cluster.json"
    config.write_text(json.dumps(CONFIG | {"provider": CONFIG["provider"] | {"gcs_address": gcs, "machines": temp}}))
    environment = heads._start_environment() | {heads.TEMP_ENV: temp, "RAY_FAKE_CLUSTER": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE, "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    if request.param:
        environment |= {"RAY_enable_autoscaler_v2": request.param, "RAY_CLOUD_INSTANCE_ID": HEAD_NODE}
    names = {"port": "RAY", "dashboard-port": "DASHBOARD", "dashboard-agent-listen-port": "AGENT"}
    names |= {"ray-client-server-port": "CLIENT", "metrics-export-port": "METRICS"}
    flags = [f"--{flag}={ports[f'MFCTL_{name}_PORT']}" for flag, name in names.items()]
    address = f"http://127.0.0.1:{ports['MFCTL_DASHBOARD_PORT']}"
    made = heads.LocalHead(cluster="fake", address=address, temp=temp)
    words = ["ray", "start", "--head", "--num-cpus=0", f"--autoscaling-config={config}", f"--temp-dir={temp}", *flags]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heads, "START_LIMIT_S", 600)  # a loaded machine starts slowly
            heads._run_start_command(" ".join(words), environment)
            heads._wait_until_answering(made)
        yield made
    finally:
        heads.stop_processes(made)  # a command that follows a job of it ends with it
        shutil.rmtree(temp, ignore_errors=True)
        assert heads.head_processes(temp) == []


class Watch:
    """The machines of a cluster over time, and one that can be killed."""

    def __init__(self, head: heads.LocalHead) -> None:
        self.head, self.seen = head, set[str]()
        from ray.job_submission import JobSubmissionClient

        self.client = JobSubmissionClient(head.address)

    def kinds(self) -> list[str]:
        living = [node for node in query_cluster(self.client).nodes if not node["is_head_node"]]
        now = ["train" if "trainer" in node["resources_total"] else "preprocess" for node in living]
        self.seen |= set(now)
        return now

    def kill_one(self, kind: str) -> None:
        """Its raylet and every process below it, at once; any of those of this kind."""
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


def submitted(head: heads.LocalHead, shared: Path, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`mfctl submit` typed in a folder that no job sees."""
    elsewhere = shared.parent / "typed here"
    elsewhere.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "workflows.cli", "submit", "--json", "--shared", str(shared)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MFCTL_TRACKER": "json", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--python", sys.executable, head.address, "--", *words],
        cwd=elsewhere,
        env=environment,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )


def until(process: subprocess.Popen[bytes], watch: Watch, happened: Callable[[], bool], log: Path) -> None:
    while not happened():
        assert process.poll() is None, log.read_text()[-3000:]
        watch.kinds()
        time.sleep(0.5)


def finish(process: subprocess.Popen[bytes], watch: Watch, log: Path) -> None:
    while process.poll() is None:
        watch.kinds()
        time.sleep(1)
    assert process.returncode == 0, log.read_text()[-6000:]


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_machines_come_for_a_job_are_lost_and_go_again(head: heads.LocalHead, tmp_path: Path) -> None:
    shared, watch, log = tmp_path / "shared", Watch(head), tmp_path / "log"
    shared.mkdir()
    words = [sys.executable, "-m", "workflows.cli", "toyworld", "clips", "--clips", "12", "--seconds", "3"]
    subprocess.run(words, cwd=shared, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert watch.kinds() == [], "the head has no workers"

    sets = ("window_seconds=3", "sources_per_unit=1", "workers=2")
    process = submitted(head, shared, ["preprocess", "clips", "data", *sets_of(sets)], log)
    until(process, watch, lambda: bool(list(shared.glob("data/_done/*.json"))), log)
    watch.kill_one("preprocess")
    finish(process, watch, log)
    assert watch.seen == {"preprocess"}
    facts = inspect_dataset(str(shared / "data"), verify=True)
    assert (facts["sources"], facts["accepted"]) == (12, 12)

    sets = ("engine.resource=trainer", "engine.workers=2", "engine.kind=torch", "steps=60", "data.batch=4")
    sets += ("data.held_out=0.25", "eval_every=60", "log_every=1", "checkpoint.every=20", "engine.max_failures=5")
    process = submitted(
        head, shared, ["train", "--stage", "audio", "--data", "data", "--run", "a", *sets_of(sets)], log
    )
    until(process, watch, lambda: bool(list(shared.glob("runs/a/checkpoints/*/COMPLETE"))), log)
    watch.kill_one("train")
    finish(process, watch, log)
    assert watch.seen == {"preprocess", "train"}
    assert read_json(shared / "runs/a" / OUTCOME_FILE)["progress"]["step"] == 60
    assert logged_steps(shared / "runs/a") == list(range(61)), "every step, and once"

    ended = time.monotonic()
    while watch.kinds():
        time.sleep(1)
        assert time.monotonic() - ended < 300, "machines without work go"
    assert not list((shared.parent / "typed here").glob("data*")), "nothing was written where the command was typed"


def sets_of(values: tuple[str, ...]) -> list[str]:
    return [word for value in values for word in ("--set", value)]
