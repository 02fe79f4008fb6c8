"""Where a command is to run: a head on this machine, a job server, a cluster of a Ray file elsewhere, a KubeRay job."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from workflows.jobs import local_head as heads
from workflows.jobs.job_server import ClusterUnreachable
from workflows.jobs.resources import MachineType, machine_types_of_cluster_file, machine_types_of_ray_cluster
from workflows.utils.environment import DEFAULT_ENV, find_free_ports

TUNNEL_LIMIT_S = 120
TargetKind = Literal["here", "server", "elsewhere", "rayjob"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the user named, read and checked; nothing has been started or asked yet."""

    name: str  # as it was written
    kind: TargetKind
    config: Mapping[str, Any] = field(default_factory=dict)  # of its file

    @property
    def machines(self) -> list[MachineType]:
        """What its file promises; [] where only the cluster itself can tell."""
        if self.kind == "elsewhere":
            return machine_types_of_cluster_file(self.config)
        return machine_types_of_ray_cluster(self.config["spec"]["rayClusterSpec"]) if self.kind == "rayjob" else []

    def all_nodes_joined(self, nodes: int) -> bool:
        """Whether all machines that its file lists have joined, so that there will be no more."""
        provider = self.config.get("provider", {})
        return provider.get("type") == "local" and nodes > len(provider.get("worker_ips", []))


def parse_target(name: str) -> Target:
    """ValueError when it is neither an address nor a file of a kind that is known."""
    if "://" in name:
        if not name.startswith(("http://", "https://", "ray://")):
            raise ValueError(
                f"{name} is no cluster address: write http://host:8265, ray://host:10001 or a cluster file"
            )
        return Target(name=name, kind="server")
    if not Path(name).is_file():
        raise ValueError(f"{name} does not exist: the target is a cluster file (cluster/local.yaml) or an address")
    if manifest := _manifest(name):
        return Target(name=name, kind="rayjob", config=manifest)
    config = heads.load_cluster_file(name)
    return Target(name=name, kind="here" if heads.is_local(config) else "elsewhere", config=config)


def _manifest(name: str) -> dict[str, Any] | None:
    """The RayJob in a file; None when it is no Kubernetes file."""
    try:
        documents = [d for d in yaml.safe_load_all(Path(name).read_text()) if isinstance(d, dict)]
    except yaml.YAMLError:
        return None  # the reader of cluster files says what is wrong
    jobs = [d for d in documents if d.get("kind") == "RayJob"]
    if jobs:
        return jobs[0]
    if kinds := [d["kind"] for d in documents if "kind" in d]:
        raise ValueError(
            f"{name} holds a {kinds[0]}, and a job is submitted to a RayJob (cluster/kuberay/rayjob-train.yaml) or to "
            f"the address "
            "of a RayCluster that runs: kubectl port-forward service/mutual-forcing-head-svc 8265, then "
            "http://127.0.0.1:8265"
        )
    return None


def connect_target(target: Target, state: Path) -> Context[str]:
    """The address of the target's job server, reachable while the context lasts. A head on this machine is started."""
    if target.kind == "server":
        return nullcontext(target.name)
    if target.kind == "here":
        return nullcontext(heads.get_or_start_head(dict(target.config), state).address)
    return _tunnel(target)


@contextmanager
def _tunnel(target: Target) -> Iterator[str]:
    """Ray's own port forwarding, by ssh, to the job server on the head's loopback."""
    ray = shutil.which("ray", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    (port,) = find_free_ports(1)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [ray or "ray", "dashboard", target.name, "--port", str(port)],
            env=DEFAULT_ENV | dict(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its ssh is ended with it
        )
        try:
            _wait_for_tunnel(target, process, port, output)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(process)


def _wait_for_tunnel(target: Target, process: subprocess.Popen[bytes], port: int, output: Any) -> None:
    deadline = time.monotonic() + TUNNEL_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        if heads.ping_job_server(f"http://127.0.0.1:{port}"):
            return
        time.sleep(0.3)
    output.seek(0)
    last = " ".join(line.strip() for line in output.read().splitlines()[-3:])
    raise ClusterUnreachable(
        f"no head of {target.name} can be reached: is it up? Start it with `ray up -y {target.name}` (from the clone's "
        f"folder), look with `ray exec {target.name} 'ray status'`. ssh said: {last}"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        for one in [*children, psutil.Process(process.pid)]:
            one.terminate()
    process.wait()
