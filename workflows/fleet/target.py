"""Where a command is to run: a head on this machine, a job server, a cluster of a Ray file elsewhere, a KubeRay job."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from workflows import head as heads
from workflows.environment import DEFAULTS
from workflows.fleet.placement import Machines, machines_of_cluster_file, machines_of_ray_cluster, merged

TUNNEL_LIMIT_S = 120
Kind = Literal["here", "server", "elsewhere", "rayjob"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the user named, read and checked; nothing has been started or asked yet."""

    name: str  # as it was written
    kind: Kind
    config: Mapping[str, Any] = field(default_factory=dict)  # of its file

    @property
    def machines(self) -> list[Machines]:
        """What its file promises; [] where only the cluster itself can tell."""
        if self.kind == "elsewhere":
            return machines_of_cluster_file(self.config)
        return machines_of_ray_cluster(self.config["spec"]["rayClusterSpec"]) if self.kind == "rayjob" else []


def read_target(name: str) -> Target:
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
    config = heads.load_cluster(name)
    return Target(name=name, kind="here" if heads.runs_here(config) else "elsewhere", config=config)


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


def connected(target: Target, state: Path) -> Context[str]:
    """The address of the target's job server, reachable while the context lasts. A head on this machine is started."""
    if target.kind == "server":
        return nullcontext(target.name)
    if target.kind == "here":
        return nullcontext(heads.ensure_head(dict(target.config), state).address)
    return _tunnel(target)


@contextmanager
def _tunnel(target: Target) -> Iterator[str]:
    """Ray's own port forwarding, by ssh, to the job server on the head's loopback."""
    ray = shutil.which("ray", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    port = _free_port()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [ray or "ray", "dashboard", target.name, "--port", str(port)],
            env=DEFAULTS | dict(os.environ),
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
        if _answers(f"http://127.0.0.1:{port}"):
            return
        time.sleep(0.3)
    output.seek(0)
    last = " ".join(line.strip() for line in output.read().splitlines()[-3:])
    raise RuntimeError(
        f"no head of {target.name} can be reached: is it up? Start it with `ray up -y {target.name}` (from the clone's "
        f"folder), look with `ray exec {target.name} 'ray status'`. ssh said: {last}"
    )


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=5) as reply:
            return "ray_version" in json.load(reply)
    except (OSError, ValueError, urllib.error.URLError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        for one in [*children, psutil.Process(process.pid)]:
            one.terminate()
    process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a running cluster says of itself."""

    ray: str
    python: str
    nodes: list[Mapping[str, Any]]  # those that live, as Ray's state API lists them
    fixed: bool = False  # no autoscaler that could add nodes

    @property
    def machines(self) -> list[Machines]:
        return merged([Machines(name=n["node_name"], resources=n["resources_total"], most=1) for n in self.nodes])

    @property
    def all_here(self) -> bool:
        """Whether every node is this machine, so that paths mean the same."""
        mine = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses}
        return all(node["node_ip"] in mine for node in self.nodes)


def ask(client: Any) -> Cluster:
    """Versions and nodes, from the job server."""
    facts = client._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
    listed = client._do_request("GET", "/api/v0/nodes?detail=true&limit=10000").json()["data"]["result"]["result"]
    living = [node for node in listed if node["state"] == "ALIVE"]
    status = client._do_request("GET", "/api/cluster_status").json()["data"].get("clusterStatus") or {}
    return Cluster(ray=facts["rayVersion"], python=facts["pythonVersion"], nodes=living, fixed=_fixed(status))


def _fixed(status: Mapping[str, Any]) -> bool:
    """Given no cluster file, Ray's autoscaler only watches, and names the kind of each node after the node."""
    kinds = (status.get("autoscalerReport") or {}).get("nodeTypeMapping") or {}
    return bool(kinds) and all(kind == f"node_{node}" for node, kind in kinds.items())


def check_versions(cluster: Cluster, target: str, python: str | None) -> None:
    """ValueError when the cluster's Ray or Python is not what this tree was tested with here."""
    import ray

    if _minor(cluster.ray) != _minor(ray.__version__):
        raise ValueError(
            f"{target} runs Ray {cluster.ray}, here is {ray.__version__}: install the same on both (constraints.txt "
            f"has the tested "
            "one; `ray up` installs it)"
        )
    if python is None and _minor(cluster.python) != _minor(platform.python_version()):
        raise ValueError(
            f"{target} runs Python {cluster.python}, here is {platform.python_version()}: use the same on both (make "
            f"PYTHON=python{_minor(cluster.python)} venv), or name an interpreter of the cluster that has everything "
            f"in "
            "constraints.txt with --python"
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
