"""Connection to the job server of a cluster, with timeouts and clear errors; facts about the cluster."""

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

from mfcore.errors import UserInputError
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.local_ray import find_token
from workflows.jobs.local_head import LOOPBACK, find_head_token, ping_job_server
from workflows.jobs.records import state_dir
from workflows.jobs.resources import MachineType, merge_equal

NODES = "/api/v0/nodes?detail=true&limit=10000"
CONNECT_TIMEOUT_S = 30.0  # of the first reply
READ_TIMEOUT_S = 60.0  # of each later reply; a busy head takes seconds


class ClusterUnreachable(InfrastructureError):
    """A cluster that does not respond; the message contains the fix."""


def connect(address: str) -> Any:
    """Return Ray's client of the job server at ``http://host:8265`` or of the cluster ``ray://host:10001``.

    It sends the token of the local head at this address, else the token of Ray's variables or of the user's file.

    Raises:
        ClusterUnreachable: if no Ray job server replies in time.
        UserInputError: if the server rejects the token.
    """
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")  # no warning about the archive
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # Ray logs every excluded file
    _check_server(address)
    token = find_head_token(address, state_dir()) or find_token()
    if token and address.startswith("ray://"):  # reads the variables only
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except (AuthenticationError, ConnectionError, RuntimeError) as error:
        if isinstance(error, AuthenticationError) or "Authentication" in str(error):
            raise UserInputError(
                f"{address} {'rejects the token' if token else 'requires a token'}. Set RAY_AUTH_TOKEN_PATH to the "
                "file with the token of this cluster (default: ~/.ray/auth_token)"
            ) from error
        raise ClusterUnreachable(
            f"no Ray job server responds at {address} ({_first_line(error)}). {_REMEDY}"
        ) from error
    _check_same_machine(address, client.get_address())
    client._do_request = partial(client._do_request, timeout=READ_TIMEOUT_S)  # Ray sets no timeout
    return client


_REMEDY = (
    "Check that the cluster is up and the port is the one of its dashboard, forwarded to this machine. `mfctl status` "
    "lists the heads started from this folder"
)


def _check_server(address: str) -> None:
    """Check that a job server replies; Ray's client waits 30 s for a closed port and forever for a silent host."""
    url = urllib.parse.urlsplit(address)
    try:
        port = url.port or {"http": 80, "https": 443}.get(url.scheme, 10001)
        with socket.create_connection((url.hostname or "", port), timeout=CONNECT_TIMEOUT_S):
            pass
    except ValueError as error:
        raise UserInputError(f"{address} is not a cluster address ({error}). Use http://host:8265") from error
    except OSError as error:
        raise ClusterUnreachable(f"no Ray job server responds at {address} ({error}). {_REMEDY}") from error
    if url.scheme.startswith("http") and not ping_job_server(address, CONNECT_TIMEOUT_S):
        raise ClusterUnreachable(f"the server at {address} is not a Ray job server. {_REMEDY}")


def _check_same_machine(given: str, advertised: str) -> None:
    """Raise if the head advertises a loopback address: from this machine it is a different server."""
    host = urllib.parse.urlsplit(given).hostname
    is_remote = host not in LOOPBACK and host not in _local_addresses()
    if given.startswith("ray://") and urllib.parse.urlsplit(advertised).hostname in LOOPBACK and is_remote:
        raise ClusterUnreachable(
            f"{given} serves jobs on its loopback only. Forward the port (ssh -L 8265:127.0.0.1:8265 {host}) and "
            "submit to http://127.0.0.1:8265, or submit to the cluster file"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def translate_connection_errors(message: str) -> Iterator[None]:
    """Raise ClusterUnreachable with ``message`` when the job server stops responding."""
    import aiohttp
    import requests

    try:
        yield
    except ClusterUnreachable:  # already translated by an inner call
        raise
    except (requests.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise ClusterUnreachable(f"{message} ({_first_line(error)})") from error
    except RuntimeError as error:
        if "WebSocket" not in str(error):
            raise
        raise ClusterUnreachable(f"{message} ({_first_line(error)})") from error


# ---------------------------------------------------------------------------------------------- facts about the cluster


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """Versions and nodes of a running cluster."""

    ray: str
    python: str
    nodes: list[Mapping[str, Any]]  # alive, as listed by the state API of Ray
    fixed: bool = False  # without an autoscaler that could add nodes

    @property
    def machines(self) -> list[MachineType]:
        """The machine types of its nodes."""
        return merge_equal(
            [MachineType(name=n["node_name"], resources=n["resources_total"], max_count=1) for n in self.nodes]
        )

    @property
    def is_local(self) -> bool:
        """True if every node is on this machine, so that paths are the same."""
        return all(node["node_ip"] in _local_addresses() for node in self.nodes)


def _local_addresses() -> set[str]:
    """Return the addresses of this machine."""
    return {a.address for addresses in psutil.net_if_addrs().values() for a in addresses}


def check_head_alive(client: Any) -> None:
    """Raise ConnectionError if the head node is dead: its job server may still reply and list jobs as running."""
    reply = client._do_request("GET", NODES)
    if reply.status_code != 200:  # overloaded at the moment; the caller polls again
        return
    states = [node["state"] for node in reply.json()["data"]["result"]["result"] if node["is_head_node"]]
    if states and "ALIVE" not in states:
        raise ConnectionError("the job server reports that the head node is dead")


def query_cluster(client: Any) -> ClusterInfo:
    """Return versions and nodes of the cluster, from its job server."""
    metadata = client._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
    nodes = client._do_request("GET", NODES).json()["data"]["result"]["result"]
    alive = [node for node in nodes if node["state"] == "ALIVE"]
    status = client._do_request("GET", "/api/cluster_status").json()["data"].get("clusterStatus") or {}
    return ClusterInfo(
        ray=metadata["rayVersion"], python=metadata["pythonVersion"], nodes=alive, fixed=_has_fixed_size(status)
    )


def _has_fixed_size(status: Mapping[str, Any]) -> bool:
    """Return True without a cluster file: Ray's autoscaler then names the type of each node after the node."""
    kinds = (status.get("autoscalerReport") or {}).get("nodeTypeMapping") or {}
    return bool(kinds) and all(kind == f"node_{node}" for node, kind in kinds.items())


def check_versions(cluster: ClusterInfo, target: str, python: str | None) -> None:
    """Raise ValueError if the cluster has another Ray or Python version than this machine."""
    import ray

    if _minor(cluster.ray) != _minor(ray.__version__):
        raise UserInputError(
            f"{target} runs Ray {cluster.ray}, this machine {ray.__version__}. Install the same version on both "
            "(constraints.txt has the tested one; `ray up` installs it)"
        )
    if python is None and _minor(cluster.python) != _minor(platform.python_version()):
        raise UserInputError(
            f"{target} runs Python {cluster.python}, this machine {platform.python_version()}. Use the same version on "
            f"both (make PYTHON=python{_minor(cluster.python)} venv), or --python PATH with an interpreter of the "
            "cluster that has everything in constraints.txt"
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
