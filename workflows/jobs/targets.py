"""Targets of a submission: a local head, a job server, a remote Ray cluster file or a KubeRay RayJob file."""

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

from mfcore.errors import UserInputError
from workflows.jobs import local_head as heads
from workflows.jobs.job_server import ClusterUnreachable
from workflows.jobs.resources import MachineType, machine_types_of_cluster_file, machine_types_of_ray_cluster
from workflows.utils.environment import DEFAULT_ENV, find_free_ports

TUNNEL_LIMIT_S = 120
TargetKind = Literal["here", "server", "elsewhere", "rayjob"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parsed and validated target; nothing has been started or contacted."""

    name: str  # as given by the user
    kind: TargetKind
    config: Mapping[str, Any] = field(default_factory=dict)  # content of its file

    @property
    def machines(self) -> list[MachineType]:
        """The machine types in its file; [] if only the running cluster has them."""
        if self.kind == "elsewhere":
            return machine_types_of_cluster_file(self.config)
        return machine_types_of_ray_cluster(self.config["spec"]["rayClusterSpec"]) if self.kind == "rayjob" else []

    def all_nodes_joined(self, nodes: int) -> bool:
        """Return True if all machines listed in its file have joined, so that no more can."""
        provider = self.config.get("provider", {})
        return provider.get("type") == "local" and nodes > len(provider.get("worker_ips", []))


def parse_target(name: str) -> Target:
    """Return the target of an address or a file; ValueError for anything else."""
    if "://" in name:
        if not name.startswith(("http://", "https://", "ray://")):
            raise UserInputError(
                f"{name} is not a cluster address. Use http://host:8265, ray://host:10001 or a cluster file"
            )
        return Target(name=name, kind="server")
    if not Path(name).is_file():
        raise UserInputError(f"{name} does not exist. Use a cluster file (cluster/local.yaml) or an address")
    manifest = _load_rayjob(name)
    if manifest:
        return Target(name=name, kind="rayjob", config=manifest)
    config = heads.load_cluster_file(name)
    return Target(name=name, kind="here" if heads.is_local(config) else "elsewhere", config=config)


def _load_rayjob(name: str) -> dict[str, Any] | None:
    """Return the RayJob in a file; None if it is not a Kubernetes file."""
    try:
        documents = [d for d in yaml.safe_load_all(Path(name).read_text()) if isinstance(d, dict)]
    except yaml.YAMLError:
        return None  # load_cluster_file raises the error
    jobs = [d for d in documents if d.get("kind") == "RayJob"]
    if jobs:
        return jobs[0]
    kinds = [d["kind"] for d in documents if "kind" in d]
    if kinds:
        raise UserInputError(
            f"{name} contains a {kinds[0]}, which is not a target. Use a RayJob (cluster/kuberay/rayjob-train.yaml), "
            "or the address of a running RayCluster: kubectl port-forward service/mutual-forcing-head-svc 8265, then "
            "http://127.0.0.1:8265"
        )
    return None


def connect_target(target: Target, state: Path) -> Context[str]:
    """Return a context with the address of the job server; starts a local head if there is none."""
    if target.kind == "server":
        return nullcontext(target.name)
    if target.kind == "here":
        return nullcontext(heads.get_or_start_head(dict(target.config), state).address)
    return _tunnel(target)


@contextmanager
def _tunnel(target: Target) -> Iterator[str]:
    """Forward a local port by ssh (`ray dashboard`) to the job server on the head's loopback."""
    ray = shutil.which("ray", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    (port,) = find_free_ports(1)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [ray or "ray", "dashboard", target.name, "--port", str(port)],
            env=DEFAULT_ENV | dict(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must not reach ssh
        )
        try:
            _wait_for_tunnel(target, process, port, output)
            yield f"http://127.0.0.1:{port}"
        finally:
            _terminate(process)


def _wait_for_tunnel(target: Target, process: subprocess.Popen[bytes], port: int, output: Any) -> None:
    deadline = time.monotonic() + TUNNEL_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        if heads.ping_job_server(f"http://127.0.0.1:{port}"):
            return
        time.sleep(0.3)
    output.seek(0)
    last_lines = " ".join(line.strip() for line in output.read().splitlines()[-3:])
    raise ClusterUnreachable(
        f"no head of {target.name} can be reached: {last_lines}. Start it with `ray up -y {target.name}` (from the "
        f"folder of the clone); check it with `ray exec {target.name} 'ray status'`"
    )


def _terminate(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        for one in [*children, psutil.Process(process.pid)]:
            one.terminate()
    process.wait()
