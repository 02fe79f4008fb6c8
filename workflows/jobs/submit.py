"""Submit commands as Ray jobs: package the working tree, run the command, return its logs and its exit code.

``TARGET`` is a Ray cluster file, the address of a running cluster (``http://host:8265``, its job server, or
``ray://host:10001``), or the file of a KubeRay RayJob. All checks run before the job is submitted.
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

from mfcore.errors import UserInputError
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


def submit_job(
    target: str,
    command: ParsedCommand,
    *,
    detach: bool = False,
    python: str | None = None,
    shared: str | None = None,
    untracked: bool = False,
) -> dict:
    """Run the command as a job on the target and follow its logs until it ends.

    Args:
        target: a cluster file, an address or a RayJob file.
        command: the command, parsed with ``shared`` as its base.
        detach: return after the submission.
        python: interpreter on the cluster; default: this one on this machine, else ``python``.
        shared: folder that all machines of the target have mounted; relative paths are below it.
        untracked: package files that git does not track, too.

    Returns:
        job, address, command, status, exit_code (None while the job runs) and message.

    Raises:
        ValueError: before the submission, if the target cannot run the command.
    """
    if not (ROOT / "pyproject.toml").exists():
        raise UserInputError(
            f"submit packages a checkout, and {ROOT} is not one. Run it from a clone (`make venv` there)"
        )
    parsed_target = parse_target(target)
    shared = os.path.normpath(shared) if shared else None
    if parsed_target.kind in ("elsewhere", "rayjob"):
        _check_elsewhere(parsed_target, command, shared, parsed_target.machines)
    if parsed_target.kind == "rayjob":
        return _submit_rayjob(parsed_target, command, shared, detach=detach)
    lost = f"{target} stopped responding before the job was accepted. Run the same command again"
    with _without_ray_address(), connect_target(parsed_target, state_dir()) as address:
        with translate_connection_errors(lost):
            client = job_server.connect(address)
            check_head_alive(client)
            cluster = query_cluster(client)
            variables = _check_and_build_environment(parsed_target, cluster, command, shared=shared, python=python)
            machines = [] if cluster.is_local else parsed_target.machines or cluster.machines
            job = _start(
                client,
                command,
                target=target,
                interpreter=python or (sys.executable if parsed_target.kind == "here" else "python"),
                variables=variables,
                driver=resources.driver_resources(command, machines),
                untracked=untracked,
            )
        print(f"job {job.id} on {job.address}", file=sys.stderr)
        return _summary(client, job) if detach else _follow(client, job)


def _check_elsewhere(
    target: Target, command: ParsedCommand, shared: str | None, machines: Sequence[resources.MachineType]
) -> None:
    check_paths(command, target.name, shared)
    if machines:
        resources.require_capacity(resources.required_resources(command), machines, target.name)


def _check_and_build_environment(
    target: Target, cluster: ClusterInfo, command: ParsedCommand, *, shared: str | None, python: str | None
) -> dict[str, str]:
    """Check the command against the running cluster; return the environment of the job."""
    if target.kind != "here":
        check_versions(cluster, target.name, python)
    if target.kind == "server" and not cluster.is_local:
        _check_elsewhere(target, command, shared, [])
    if not target.machines and (cluster.fixed or target.all_nodes_joined(len(cluster.nodes))):
        resources.require_capacity(resources.required_resources(command), cluster.machines, target.name)
    elsewhere = target.kind == "elsewhere" or not cluster.is_local
    variables = _environment(shared, elsewhere=elsewhere) | _promised_resources(target)
    check_secrets(command.argv, variables)
    return variables


def _promised_resources(target: Target) -> dict[str, str]:
    """Return the variable with the total resources of the target's file; the job sees only nodes that have joined."""
    return {PROMISED_RESOURCES_ENV: json.dumps(resources.total_resources(target.machines))} if target.machines else {}


def _environment(shared: str | None, *, elsewhere: bool) -> dict[str, str]:
    """Return the environment of a job: defaults, base of relative paths, MLflow store, locations of credentials."""
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
    command: ParsedCommand,
    *,
    target: str,
    interpreter: str,
    variables: dict[str, str],
    driver: Mapping[str, float],
    untracked: bool,
) -> SubmittedJob:
    entrypoint = [interpreter, "-m", "workflows.cli", *command.argv]
    with tempfile.TemporaryDirectory(prefix="mfctl-") as folder:
        archive = package_working_dir(ROOT, Path(folder), untracked=untracked)
        name = _submit_when_ready(client, entrypoint, {"working_dir": str(archive), "env_vars": variables}, driver)
    job = SubmittedJob(
        id=name,
        address=client.get_address(),
        command=list(command.argv),
        submitted=time.time(),
        target=target,
    )
    _record(job)
    return job


def _submit_rayjob(target: Target, command: ParsedCommand, shared: str | None, *, detach: bool) -> dict:
    """Submit a RayJob with the command and its environment; the code is in the image."""
    version = target.config["spec"]["rayClusterSpec"].get("rayVersion")
    import ray

    if version and version != ray.__version__:
        raise UserInputError(
            f"{target.name} has rayVersion {version}, this machine {ray.__version__}. Rebuild the image with it"
        )
    variables = _environment(shared, elsewhere=True) | _promised_resources(target)
    check_secrets(command.argv, variables)
    driver = resources.driver_resources(command, target.machines)
    name = kuberay.submit_rayjob(kuberay.render_manifest(target.config, command.argv, variables, driver))
    job = SubmittedJob(
        id=name, address=target.name, command=list(command.argv), submitted=time.time(), target=target.name
    )
    _record(job)
    print(f"RayJob {name} from {target.name}, with the code of its image", file=sys.stderr)
    if not detach:
        kuberay.follow_logs(name)
    return _rayjob_summary(job)


def _rayjob_summary(job: SubmittedJob) -> dict:
    return {"job": job.id, "address": job.address, "command": job.command, **kuberay.job_status(job.id)}


def _is_rayjob(job: SubmittedJob) -> bool:
    return "://" not in job.address


@contextmanager
def _connected(job: SubmittedJob) -> Iterator[Any]:
    """Yield a client of the job's server; a remote cluster file is reached through a new tunnel."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_ray_address())
        address = job.address
        if job.target and "://" not in job.target and Path(job.target).is_file():
            parsed_target = parse_target(job.target)
            if parsed_target.kind == "elsewhere":
                address = stack.enter_context(connect_target(parsed_target, state_dir()))
        stack.enter_context(translate_connection_errors(_lost_message(job)))
        yield job_server.connect(address)


def _lost_message(job: SubmittedJob) -> str:
    return (
        f"the cluster at {job.target or job.address} does not respond; the job may still run. Try "
        f"mfctl logs --follow {job.id}. If the head is gone, submit the same command again: it resumes"
    )


def job_status(job_id: str | None = None) -> dict:
    """Return the status of one job, or of all recorded jobs and heads."""
    if job_id is not None:
        return _current_status(_find_job(job_id))
    records = [heads.load_record(path) for path in sorted(state_dir().glob("*.json"))]
    return {
        "heads": [{"address": head.address, "answers": head.is_alive()} for head in records if head],
        "jobs": [_last_status(job) for job in _jobs()],
    }


def job_logs(job_id: str, *, follow: bool = False) -> dict:
    """Print the log of a job; with ``follow`` until it ends. Return its summary."""
    job = _find_job(job_id)
    if _is_rayjob(job):
        kuberay.follow_logs(job.id) if follow else print(kuberay.print_logs(job.id), end="")
        return _rayjob_summary(job)
    with _connected(job) as client:
        if follow:
            return _follow(client, job)
        print(client.get_job_logs(job.id), end="")
        return _summary(client, job)


def stop_job(job_id: str) -> dict:
    """Stop a job, wait until it has ended and return its summary."""
    job = _find_job(job_id)
    if _is_rayjob(job):
        kuberay.suspend_job(job.id)
        return _rayjob_summary(job)
    with _connected(job) as client:
        client.stop_job(job.id)
        _wait_until_ended(client, job)
        return _summary(client, job)


def stop_local_heads() -> dict:
    """Stop the heads that ``submit`` started from this folder, with their jobs; other Ray processes keep running."""
    return {"stopped": heads.stop_heads(state_dir())}


def _submit_when_ready(client: Any, entrypoint: list[str], runtime_env: dict, driver: Mapping[str, float]) -> str:
    """Submit the job, with retries until the agent of the head has registered (seconds after its first reply)."""
    deadline = time.monotonic() + AGENT_LIMIT_S
    amounts = {f"entrypoint_num_{name.lower()}s": amount for name, amount in driver.items()}
    while True:
        try:
            return client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=runtime_env, **amounts)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def _follow(client: Any, job: SubmittedJob) -> dict:
    """Print the log until the job ends; ClusterUnreachable if the cluster stops responding."""
    try:
        with translate_connection_errors(_lost_message(job)):
            asyncio.run(_print_logs(client, job.id))
            _wait_until_ended(client, job)
            return _summary(client, job)
    except KeyboardInterrupt:
        print(
            f"\nthe job is still running: mfctl logs --follow {job.id}   or stop it: mfctl stop {job.id}",
            file=sys.stderr,
        )
        raise


async def _print_logs(client: Any, job_id: str) -> None:
    """Print the log and poll the server: a machine that loses power never closes the connection."""
    printing = asyncio.ensure_future(_stream_log(client, job_id))
    try:
        while not (await asyncio.wait({printing}, timeout=POLL_S))[0]:
            await asyncio.to_thread(check_head_alive, client)
        await printing
    finally:
        printing.cancel()


async def _stream_log(client: Any, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        print(lines, end="", flush=True)


def _wait_until_ended(client: Any, job: SubmittedJob) -> None:
    checked = time.monotonic()
    while not client.get_job_status(job.id).is_terminal():
        time.sleep(0.3)
        if time.monotonic() - checked > POLL_S:
            check_head_alive(client)
            checked = time.monotonic()


def _summary(client: Any, job: SubmittedJob) -> dict:
    """Return the summary of a job; exit_code is the one of the command, None while it runs."""
    info = client.get_job_info(job.id)
    ended = info.status.is_terminal()
    code = info.driver_exit_code if info.driver_exit_code is not None else kuberay.UNKNOWN_EXIT
    return {
        "job": job.id,
        "address": job.address,
        "command": job.command,
        "status": info.status.value,
        "exit_code": code if ended else None,
        "message": (info.message or "").split(", last available logs")[0],  # the logs have been printed
    }


def _current_status(job: SubmittedJob) -> dict:
    if _is_rayjob(job):
        return _rayjob_summary(job)
    with _connected(job) as client:
        return _summary(client, job)


def _last_status(job: SubmittedJob) -> dict:
    """Return the summary of a job, also if its cluster is gone."""
    try:
        return _current_status(job)
    except RuntimeError:  # unreachable, or another cluster at the same address, without this job
        return {"job": job.id, "address": job.address, "command": job.command, "status": "cluster does not answer"}


def _record(job: SubmittedJob) -> None:
    write_json(state_dir() / "jobs" / f"{job.id}.json", asdict(job))


def _jobs() -> list[SubmittedJob]:
    found = [SubmittedJob(**json.loads(path.read_text())) for path in (state_dir() / "jobs").glob("*.json")]
    return sorted(found, key=lambda job: job.submitted)


def _find_job(job_id: str) -> SubmittedJob:
    known = {job.id: job for job in _jobs()}
    if job_id not in known:
        listed = ", ".join(known) or "none"
        raise UserInputError(f"no job {job_id} was submitted from {base_directory()}. Known jobs: {listed}")
    return known[job_id]


@contextlib.contextmanager
def _without_ray_address() -> Generator[None]:
    """Unset the variables that Ray's client prefers to the address it is given."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)
