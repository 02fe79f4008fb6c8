"""The job server of a cluster: reached within a bounded time, or named with the remedy; what it says of the cluster."""

import logging
import os
import platform
import socket
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from preprocessing.io.errors import InfrastructureError
from workflows.jobs.local_head import LOOPBACK, ping_job_server
from workflows.jobs.resources import MachineType, merge_equal

NODES = "/api/v0/nodes?detail=true&limit=10000"
CONNECT_TIMEOUT_S = 30.0  # for the first answer
READ_TIMEOUT_S = 60.0  # for each later one: a head that is busy takes seconds


class ClusterUnreachable(InfrastructureError):
    """A cluster that does not answer, or no longer. The message says what to do."""


def connect(address: str) -> Any:
    """Ray's client of the job server at ``http://host:8265``, or of the one that belongs to ``ray://host:10001``.

    Unreachable when nothing answers there in time, or something else does.
    """
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")  # no warning: the archive is ours
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.INFO)  # Ray lists every file it leaves out
    _knock(address)
    try:
        made = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ClusterUnreachable(f"no Ray job server answers at {address} ({_first_line(error)}): {_REMEDY}") from error
    _refuse_another_machine(address, made.get_address())
    made._do_request = partial(made._do_request, timeout=READ_TIMEOUT_S)  # Ray's own waits for ever
    return made


_REMEDY = (
    "is the cluster up, the port forwarded and the port that of its dashboard? `mfctl status` shows the heads started "
    "from this folder"
)


def _knock(address: str) -> None:
    """Ray's client waits half a minute for a closed port, and for ever for a host that says nothing."""
    url = urllib.parse.urlsplit(address)
    try:
        port = url.port or {"http": 80, "https": 443}.get(url.scheme, 10001)
        with socket.create_connection((url.hostname or "", port), timeout=CONNECT_TIMEOUT_S):
            pass
    except ValueError as error:
        raise ValueError(f"{address} is no cluster address ({error}): write http://host:8265") from error
    except OSError as error:
        raise ClusterUnreachable(f"no Ray job server answers at {address} ({error}): {_REMEDY}") from error
    if url.scheme.startswith("http") and not ping_job_server(address, CONNECT_TIMEOUT_S):
        raise ClusterUnreachable(f"what answers at {address} is no Ray job server: {_REMEDY}")


def _refuse_another_machine(given: str, found: str) -> None:
    """A head that keeps its job server on its loopback says so to all; theirs is not ours."""
    there, here = (urllib.parse.urlsplit(address).hostname for address in (given, found))
    if given.startswith("ray://") and here in LOOPBACK and there not in LOOPBACK and there not in _addresses():
        raise ClusterUnreachable(
            f"{given} keeps its job server on its own loopback: forward it (ssh -L 8265:127.0.0.1:8265 {there}) and "
            "submit to http://127.0.0.1:8265, or to the cluster's file"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def translate_connection_errors(lost: str) -> Iterator[None]:
    """Talk with a job server; when it falls silent, Unreachable with what is ``lost`` and the remedy."""
    import aiohttp
    import requests

    try:
        yield
    except ClusterUnreachable:  # an inner conversation's own words
        raise
    except (requests.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise ClusterUnreachable(f"{lost} ({_first_line(error)})") from error
    except RuntimeError as error:
        if "WebSocket" not in str(error):
            raise
        raise ClusterUnreachable(f"{lost} ({_first_line(error)})") from error


# ----------------------------------------------------------------------------------------------- what the cluster says


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """What a running cluster says of itself."""

    ray: str
    python: str
    nodes: list[Mapping[str, Any]]  # those that live, as Ray's state API lists them
    fixed: bool = False  # no autoscaler that could add nodes

    @property
    def machines(self) -> list[MachineType]:
        return merge_equal(
            [MachineType(name=n["node_name"], resources=n["resources_total"], max_count=1) for n in self.nodes]
        )

    @property
    def is_local(self) -> bool:
        """Whether every node is this machine, so that paths mean the same."""
        return all(node["node_ip"] in _addresses() for node in self.nodes)


def _addresses() -> set[str]:
    """Those of this machine."""
    return {a.address for addresses in psutil.net_if_addrs().values() for a in addresses}


def check_head_alive(client: Any) -> None:
    """ConnectionError when the head's node has died: its job server may answer on, and calls its jobs running."""
    reply = client._do_request("GET", NODES)
    if reply.status_code != 200:  # asked too much at the moment; it will be asked again
        return
    states = [node["state"] for node in reply.json()["data"]["result"]["result"] if node["is_head_node"]]
    if states and "ALIVE" not in states:
        raise ConnectionError("its job server does, and says that the head's node is dead")


def query_cluster(client: Any) -> ClusterInfo:
    """Versions and nodes, from the job server."""
    facts = client._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
    listed = client._do_request("GET", NODES).json()["data"]["result"]["result"]
    living = [node for node in listed if node["state"] == "ALIVE"]
    status = client._do_request("GET", "/api/cluster_status").json()["data"].get("clusterStatus") or {}
    return ClusterInfo(ray=facts["rayVersion"], python=facts["pythonVersion"], nodes=living, fixed=_fixed(status))


def _fixed(status: Mapping[str, Any]) -> bool:
    """Given no cluster file, Ray's autoscaler only watches, and names the kind of each node after the node."""
    kinds = (status.get("autoscalerReport") or {}).get("nodeTypeMapping") or {}
    return bool(kinds) and all(kind == f"node_{node}" for node, kind in kinds.items())


def check_versions(cluster: ClusterInfo, target: str, python: str | None) -> None:
    """ValueError when the cluster's Ray or Python is not what this tree was tested with here."""
    import ray

    if _minor(cluster.ray) != _minor(ray.__version__):
        raise ValueError(
            f"{target} runs Ray {cluster.ray}, here is {ray.__version__}: install the same on both (constraints.txt "
            "has the tested one; `ray up` installs it)"
        )
    if python is None and _minor(cluster.python) != _minor(platform.python_version()):
        raise ValueError(
            f"{target} runs Python {cluster.python}, here is {platform.python_version()}: use the same on both (make "
            f"PYTHON=python{_minor(cluster.python)} venv), or name an interpreter of the cluster that has everything "
            "in constraints.txt with --python"
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
