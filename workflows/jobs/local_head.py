"""Ray heads on this machine: start one from a cluster file, find it again, and stop it without touching others.

Each head has a separate temporary folder. Every process of the head has that folder in its command line, its
environment or its open files. ``stop`` selects the processes by it; ``ray stop`` would end every Ray on the machine.
The folder also holds the token of the head: only processes of this user can read it, and only its holders are clients.
"""

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import jsonschema
import psutil
import yaml

from mfcore.errors import UserInputError
from preprocessing.io.local_ray import TOKEN_FILE, token_environment, write_token
from workflows.utils.environment import DEFAULT_ENV, find_free_ports
from workflows.utils.json_io import write_json

TEMP_ENV = "MFCTL_TEMP"
PORTS = ("RAY_PORT", "DASHBOARD_PORT", "AGENT_PORT", "CLIENT_PORT", "METRICS_PORT")
HEAD_PROCESS_NAMES = {"gcs_server", "raylet"}  # required for a working head
START_LIMIT_S = 120
STOP_LIMIT_S = 5  # grace period before SIGKILL; a raylet may wait long for its workers
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class LocalHead:
    """Record of a head on this machine, running or not."""

    cluster: str  # cluster_name of its file
    address: str  # URL of its job server
    temp: str  # temporary folder: sessions, logs; identifies its processes

    def is_alive(self) -> bool:
        """Return True if the GCS, the raylet and the job server respond."""
        names = {process.name() for process in head_processes(self.temp)}
        return names >= HEAD_PROCESS_NAMES and ping_job_server(self.address)

    @property
    def token(self) -> str:
        """The token of its clients; "" if the head is gone."""
        file = Path(self.temp, TOKEN_FILE)
        return file.read_text() if file.exists() else ""


def ping_job_server(address: str, limit_s: float = 5.0) -> bool:
    """Return True if a Ray job server replies in time; a server that requires a token counts."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=limit_s) as reply:
            return "ray_version" in json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except (OSError, ValueError):
        return False


def load_cluster_file(path: str) -> dict:
    """Load a cluster file and validate it with the schema of the installed Ray."""
    try:
        config = yaml.safe_load(Path(path).read_text())
        jsonschema.validate(config, _ray_schema())
    except yaml.YAMLError as error:
        raise UserInputError(f"{path} is not YAML: {error}") from error
    except jsonschema.ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path) or "top level"
        raise UserInputError(f"{path} is not a Ray cluster file: {error.message} (at {where})") from error
    return config


def is_local(config: dict) -> bool:
    """Return True if the cluster file describes a head on this machine."""
    return config["provider"]["type"] == "local" and config["provider"].get("head_ip") in LOOPBACK


def get_or_start_head(config: dict, state: Path) -> LocalHead:
    """Return the recorded head of a cluster file if it is alive, else start a new one."""
    record = state / f"{config['cluster_name']}.json"
    with _locked(record.with_suffix(".lock")):
        head = load_record(record)
        if head is not None and head.is_alive():
            return head
        if head is not None:
            stop_processes(head)
        head = _start(config)
        write_json(record, asdict(head))
        return head


def stop_heads(state: Path) -> list[str]:
    """Stop every head recorded in ``state``; return the addresses of those that were running."""
    stopped = []
    for record in sorted(state.glob("*.json")):
        head = load_record(record)
        assert head is not None
        if stop_processes(head):
            stopped.append(head.address)
        shutil.rmtree(head.temp, ignore_errors=True)
        record.unlink()
        record.with_suffix(".lock").unlink(missing_ok=True)
    return stopped


def find_head_token(address: str, state: Path) -> str:
    """Return the token of the head recorded in ``state`` with this job server; "" if there is none."""
    heads = [load_record(record) for record in state.glob("*.json")]
    return next((head.token for head in heads if head and head.address == address.rstrip("/")), "")


def load_record(record: Path) -> LocalHead | None:
    """Load the record of a head; None if there is none."""
    return LocalHead(**json.loads(record.read_text())) if record.exists() else None


def head_processes(temp: str) -> list[psutil.Process]:
    """Return the running processes of a head and their children, by its temporary folder."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # of another user, or ended meanwhile
            if (
                process.status() != psutil.STATUS_ZOMBIE
                and process.pid != os.getpid()
                and _belongs_to_head(process, temp)
            ):
                found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
    return [process for process in found.values() if _is_running(process)]


def _is_running(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _belongs_to_head(process: psutil.Process, temp: str) -> bool:
    """Search command line, environment and open files: Ray workers overwrite the first two with their title."""
    return (
        any(temp in part for part in process.cmdline())
        or process.environ().get(TEMP_ENV) == temp
        or any(file.path.startswith(temp) for file in process.open_files())
    )


def stop_processes(head: LocalHead) -> bool:
    """Send SIGTERM, then SIGKILL, to the processes of a head; return True if there were any."""
    first = head_processes(head.temp)
    for process in first:
        _signal(process, psutil.Process.terminate)
    psutil.wait_procs(first, timeout=STOP_LIMIT_S)
    deadline = time.monotonic() + STOP_LIMIT_S
    remaining = head_processes(head.temp)
    while remaining and time.monotonic() < deadline:
        for process in remaining:
            _signal(process, psutil.Process.kill)
        psutil.wait_procs(remaining, timeout=1)
        remaining = head_processes(head.temp)
    return bool(first)


def _signal(process: psutil.Process, send: Callable[[psutil.Process], None]) -> None:
    with suppress(psutil.NoSuchProcess):
        send(process)


def _start(config: dict) -> LocalHead:
    """Run the start commands of the file with free ports, a new temporary folder and token; wait for the job server."""
    ports = _free_ports()
    # short: it holds Unix sockets, with paths of at most 107 bytes
    temp = tempfile.mkdtemp(prefix="mfctl-", dir="/tmp")
    address = f"http://127.0.0.1:{ports['MFCTL_DASHBOARD_PORT']}"
    head = LocalHead(cluster=config["cluster_name"], address=address, temp=temp)
    environment = _start_environment(temp) | ports
    try:
        for command in config.get("head_start_ray_commands", []):
            _run_start_command(command, environment)
        _wait_until_alive(head)
    except BaseException:
        stop_processes(head)
        shutil.rmtree(temp, ignore_errors=True)
        raise
    return head


def _run_start_command(command: str, environment: dict[str, str]) -> None:
    """Run one line in a shell, as Ray does on a remote head.

    The output goes to a file: background processes keep it open, and a pipe would never end.
    """
    with tempfile.TemporaryFile("w+") as output:
        code = subprocess.call(
            ["bash", "-c", command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=START_LIMIT_S,
        )
        output.seek(0)
        if code != 0:
            raise RuntimeError(f"the head did not start: `{command}` ended with exit code {code}:\n{output.read()}")


def _start_environment(temp: str) -> dict[str, str]:
    """Return the environment of a head: its folder and a new token in it, this interpreter, no other cluster."""
    environment = DEFAULT_ENV | dict(os.environ) | token_environment(write_token(Path(temp))) | {TEMP_ENV: temp}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
        environment.pop(name, None)
    return environment


def _free_ports() -> dict[str, str]:
    """Return a port for every port variable of the cluster file: the value that is set, else a free one."""
    names = [f"MFCTL_{port}" for port in PORTS]
    found = zip(names, find_free_ports(len(names)), strict=True)
    return {name: os.environ.get(name) or str(port) for name, port in found}


def _wait_until_alive(head: LocalHead) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not head.is_alive():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"the Ray head did not become ready in {START_LIMIT_S} s: its job server at {head.address} does not "
                f"respond. See the logs in {head.temp}"
            )
        time.sleep(0.3)


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """Hold a file lock: one process at a time finds or starts a head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _ray_schema() -> dict:
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        raise RuntimeError("ray is not installed. Run `make venv`")
    return json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
