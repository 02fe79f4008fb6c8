"""Commands as Ray jobs: the working tree is packed, the command runs there, its logs and its exit code come back.

``TARGET`` is a Ray cluster file, the address of a cluster that runs (``http://host:8265``, its job server, or
``ray://host:10001``), or the file of a KubeRay RayJob. What cannot work is refused before anything is submitted.
"""

import asyncio
import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preprocessing.io.ray_resources import PROMISED_RESOURCES_ENV
from workflows.jobs import job_server, kuberay, resources
from workflows.jobs import local_head as heads
from workflows.jobs.command import FORWARDED_ENV, ParsedCommand, check_paths, check_secrets
from workflows.jobs.job_server import (
    ClusterInfo,
    check_head_alive,
    check_versions,
    query_cluster,
    translate_connection_errors,
)
from workflows.jobs.records import SubmittedJob, state_dir
from workflows.jobs.targets import Target, connect_target, parse_target
from workflows.jobs.working_dir import package_working_dir
from workflows.utils.environment import CWD_ENV, DEFAULT_ENV, base_directory, tracking_uri
from workflows.utils.json_io import write_json

ROOT = Path(__file__).resolve().parents[2]
AGENT_LIMIT_S = 90
POLL_S = 15.0
UNKNOWN_EXIT = 1


def submit_job(
    target: str,
    command: ParsedCommand,
    *,
    detach: bool = False,
    python: str | None = None,
    shared: str | None = None,
) -> dict:
    """Run the command as a job on the target and follow its logs to the end, or with ``detach`` only start it.

    Relative paths of the command mean what they mean here, or with ``shared``, a folder that all machines of the target
    have mounted, what they mean there. ``python`` is the interpreter on the cluster; by default this one for a head on
    this machine, else ``python``. Returns job, address, status and exit_code (None while it runs). ValueError, before
    anything starts, for what the target could never run.
    """
    if not (ROOT / "pyproject.toml").exists():
        raise ValueError(f"submit packs a checkout, and {ROOT} is none: run it from a clone (`make venv` there)")
    place = parse_target(target)
    shared = os.path.normpath(shared) if shared else None
    if place.kind in ("elsewhere", "rayjob"):
        _check_elsewhere(place, command, shared, place.machines)
    if place.kind == "rayjob":
        return _submit_rayjob(place, command, shared, detach=detach)
    silent = f"{target} fell silent before it had taken the job: submit the same command again"
    with _no_other_address(), connect_target(place, state_dir()) as address:
        with translate_connection_errors(silent):
            client = job_server.connect(address)
            check_head_alive(client)
            cluster = query_cluster(client)
            variables = _variables(place, cluster, command, shared, python)
            interpreter = python or (sys.executable if place.kind == "here" else "python")
            own = {} if cluster.is_local else resources.driver_resources(command, place.machines or cluster.machines)
            job = _start(client, interpreter, command, variables, target, own)
        print(f"job {job.id} on {job.address}", file=sys.stderr)
        return _summary(client, job) if detach else _follow(client, job)


def _check_elsewhere(
    place: Target, command: ParsedCommand, shared: str | None, machines: Sequence[resources.MachineType]
) -> None:
    check_paths(command, place.name, shared)
    if machines:
        resources.require_capacity(resources.required_resources(command), machines, place.name)


def _variables(
    place: Target, cluster: ClusterInfo, command: ParsedCommand, shared: str | None, python: str | None
) -> dict[str, str]:
    """Check the command against the running cluster; the environment of the job."""
    if place.kind != "here":
        check_versions(cluster, place.name, python)
    if place.kind == "server" and not cluster.is_local:
        _check_elsewhere(place, command, shared, [])
    if not place.machines and (cluster.fixed or place.all_nodes_joined(len(cluster.nodes))):
        resources.require_capacity(resources.required_resources(command), cluster.machines, place.name)
    elsewhere = place.kind == "elsewhere" or not cluster.is_local
    variables = _environment(shared, elsewhere=elsewhere) | _promised(place)
    check_secrets(command.argv, variables)
    return variables


def _promised(place: Target) -> dict[str, str]:
    """What the machines of the target's file have together, for a job that will see only those that have come."""
    return {PROMISED_RESOURCES_ENV: json.dumps(resources.total_resources(place.machines))} if place.machines else {}


def _environment(shared: str | None, *, elsewhere: bool) -> dict[str, str]:
    """What a job is told: switches, where relative paths start, where MLflow is, and where credentials are found."""
    variables = {name: os.environ.get(name, value) for name, value in DEFAULT_ENV.items()}
    variables |= {name: os.environ[name] for name in FORWARDED_ENV if name in os.environ}
    base = shared or (None if elsewhere else str(base_directory()))
    if base:
        variables[CWD_ENV] = base
    if not elsewhere or "MLFLOW_TRACKING_URI" in os.environ:
        variables["MLFLOW_TRACKING_URI"] = tracking_uri()
    return variables


def _start(
    client: Any,
    interpreter: str,
    command: ParsedCommand,
    variables: dict[str, str],
    target: str,
    own: Mapping[str, float],
) -> SubmittedJob:
    words = [interpreter, "-m", "workflows.cli", *command.argv]
    with tempfile.TemporaryDirectory(prefix="mfctl-") as folder:
        archive = package_working_dir(ROOT, Path(folder))
        name = _submit_when_ready(client, words, {"working_dir": str(archive), "env_vars": variables}, own)
    job = SubmittedJob(
        id=name,
        address=client.get_address(),
        command=list(command.argv),
        submitted=time.time(),
        target=target,
    )
    _record(job)
    return job


def _submit_rayjob(place: Target, command: ParsedCommand, shared: str | None, *, detach: bool) -> dict:
    """The code is the image's: what travels is the command and the environment."""
    version = place.config["spec"]["rayClusterSpec"].get("rayVersion")
    import ray

    if version and version != ray.__version__:
        raise ValueError(
            f"{place.name} has rayVersion {version}, here is {ray.__version__}: build the image again, write the same"
        )
    variables = _environment(shared, elsewhere=True) | _promised(place)
    check_secrets(command.argv, variables)
    own = resources.driver_resources(command, place.machines)
    name = kuberay.submit_rayjob(kuberay.render_manifest(place.config, command.argv, variables, own))
    job = SubmittedJob(
        id=name, address=place.name, command=list(command.argv), submitted=time.time(), target=place.name
    )
    _record(job)
    print(f"RayJob {name} from {place.name}; its code is that of the image", file=sys.stderr)
    if not detach:
        kuberay.follow_logs(name)
    return _rayjob_summary(job)


def _rayjob_summary(job: SubmittedJob) -> dict:
    return {"job": job.id, "address": job.address, "command": job.command, **kuberay.job_status(job.id)}


def _is_rayjob(job: SubmittedJob) -> bool:
    return "://" not in job.address


@contextmanager
def _reached(job: SubmittedJob) -> Iterator[Any]:
    """A client of the job's server; for a cluster file elsewhere through a tunnel of its own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_other_address())
        address = job.address
        if job.target and "://" not in job.target and Path(job.target).is_file():
            place = parse_target(job.target)
            if place.kind == "elsewhere":
                address = stack.enter_context(connect_target(place, state_dir()))
        stack.enter_context(translate_connection_errors(_lost(job)))
        yield job_server.connect(address)


def _lost(job: SubmittedJob) -> str:
    return (
        f"the cluster at {job.target or job.address} no longer answers. The job may go on without us: "
        f"mfctl logs --follow {job.id}. If its head is gone, submit the same command again: it goes on where it stopped"
    )


def job_status(job_id: str | None = None) -> dict:
    """One job, or every recorded job with the heads on this machine."""
    if job_id is not None:
        return _now(_job(job_id))
    running = [head for path in sorted(state_dir().glob("*.json")) if (head := heads.load_record(path))]
    return {
        "heads": [{"address": head.address, "answers": head.is_alive()} for head in running],
        "jobs": [_last_known(job) for job in _jobs()],
    }


def job_logs(job_id: str, *, follow: bool = False) -> dict:
    """Print what the job has written so far; with ``follow`` go on until it ends."""
    job = _job(job_id)
    if _is_rayjob(job):
        kuberay.follow_logs(job.id) if follow else print(kuberay.print_logs(job.id), end="")
        return _rayjob_summary(job)
    with _reached(job) as client:
        if follow:
            return _follow(client, job)
        print(client.get_job_logs(job.id), end="")
        return _summary(client, job)


def stop_job(job_id: str) -> dict:
    """Ask the job to stop, and wait until it has."""
    job = _job(job_id)
    if _is_rayjob(job):
        kuberay.suspend_job(job.id)
        return _rayjob_summary(job)
    with _reached(job) as client:
        client.stop_job(job.id)
        _wait_until_ended(client, job)
        return _summary(client, job)


def stop_local_heads() -> dict:
    """Stop the heads that ``submit`` started from this folder, with all their jobs, and no other Ray process."""
    return {"stopped": heads.stop_heads(state_dir())}


def _submit_when_ready(client: Any, command: list[str], runtime_env: dict, own: Mapping[str, float]) -> str:
    """A head accepts jobs a few seconds after it answers: until its agent has registered, submission is refused."""
    deadline = time.monotonic() + AGENT_LIMIT_S
    asked = {f"entrypoint_num_{name.lower()}s": amount for name, amount in own.items()}
    while True:
        try:
            return client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env, **asked)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def _follow(client: Any, job: SubmittedJob) -> dict:
    """Print the job's logs as they come, until it has ended. Unreachable when the cluster falls silent meanwhile."""
    try:
        with translate_connection_errors(_lost(job)):
            asyncio.run(_print_logs(client, job.id))
            _wait_until_ended(client, job)
            return _summary(client, job)
    except KeyboardInterrupt:
        print(f"\nthe job goes on: mfctl logs --follow {job.id}   or end it: mfctl stop {job.id}", file=sys.stderr)
        raise


async def _print_logs(client: Any, job_id: str) -> None:
    """A machine that loses power closes no connection: its server is asked for a sign of life meanwhile."""
    printing = asyncio.ensure_future(_print_as_they_come(client, job_id))
    try:
        while not (await asyncio.wait({printing}, timeout=POLL_S))[0]:
            await asyncio.to_thread(check_head_alive, client)
        await printing
    finally:
        printing.cancel()


async def _print_as_they_come(client: Any, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        print(lines, end="", flush=True)


def _wait_until_ended(client: Any, job: SubmittedJob) -> None:
    looked = time.monotonic()
    while not client.get_job_status(job.id).is_terminal():
        time.sleep(0.3)
        if time.monotonic() - looked > POLL_S:
            check_head_alive(client)
            looked = time.monotonic()


def _summary(client: Any, job: SubmittedJob) -> dict:
    """The exit code is the command's own, not the 0 or 1 that Ray makes of it; None while the job runs."""
    info = client.get_job_info(job.id)
    ended = info.status.is_terminal()
    code = info.driver_exit_code if info.driver_exit_code is not None else UNKNOWN_EXIT
    return {
        "job": job.id,
        "address": job.address,
        "command": job.command,
        "status": info.status.value,
        "exit_code": code if ended else None,
        "message": (info.message or "").split(", last available logs")[0],  # the logs have been printed
    }


def _now(job: SubmittedJob) -> dict:
    if _is_rayjob(job):
        return _rayjob_summary(job)
    with _reached(job) as client:
        return _summary(client, job)


def _last_known(job: SubmittedJob) -> dict:
    """The job's summary, or the fact that its cluster is gone."""
    try:
        return _now(job)
    except RuntimeError:  # Unreachable, or another cluster at the same address that knows no such job
        return {"job": job.id, "address": job.address, "command": job.command, "status": "cluster does not answer"}


def _record(job: SubmittedJob) -> None:
    write_json(state_dir() / "jobs" / f"{job.id}.json", asdict(job))


def _jobs() -> list[SubmittedJob]:
    found = [SubmittedJob(**json.loads(path.read_text())) for path in (state_dir() / "jobs").glob("*.json")]
    return sorted(found, key=lambda job: job.submitted)


def _job(job_id: str) -> SubmittedJob:
    known = {job.id: job for job in _jobs()}
    if job_id not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"no job {job_id} was submitted from {base_directory()}; known jobs: {listed}")
    return known[job_id]


@contextlib.contextmanager
def _no_other_address() -> Generator[None]:
    """Ray's client prefers these variables to the address it is given; here the address given is the one meant."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)
