"""Commands as Ray jobs: the working tree is packed, the command runs there, its logs and its exit code come back.

``TARGET`` is a Ray cluster file whose head is this machine, or the address of a cluster that runs: ``http://host:8265``
(its job server) or ``ray://host:10001``.
"""

import asyncio
import contextlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workflows import head as heads
from workflows.environment import BASE, DEFAULTS, base_directory, tracking_uri

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKED = ["/.git", "/.venv", "/runs", "/data", "/build", "**/__pycache__", "*.egg-info", "*.mp4"]
AGENT_LIMIT_S = 90
UNKNOWN_EXIT = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submitted job, as recorded under ``runs/cluster/jobs``."""

    id: str
    address: str  # of the job server
    command: list[str]
    submitted: float  # seconds since the epoch


def state_folder() -> Path:
    """Where heads and jobs are recorded, one folder for one ``runs/``."""
    return base_directory() / "runs" / "cluster"


def submit(target: str, argv: list[str], *, detach: bool = False, python: str | None = None) -> dict:
    """Run ``mfctl argv`` as a job on the target and follow its logs to the end, or with ``detach`` only start it.

    Relative paths of the command mean what they mean here. ``python`` is the interpreter on the cluster; by default
    this one for a head on this machine, else ``python``. Returns job, address, status and exit_code (None while it
    runs).
    """
    if not argv:
        raise ValueError(
            "nothing to submit: write the command after --, e.g. mfctl submit cluster/local.yaml -- doctor"
        )
    if not (ROOT / "pyproject.toml").exists():
        raise ValueError(f"submit packs a checkout, and {ROOT} is none: run it from a clone (`make venv` there)")
    address, interpreter = _resolve(target)
    command = [python or interpreter, "-m", "workflows.cli", *argv]
    with _no_other_address():
        client = _client(address)
        job = Job(id=_submit_when_ready(client, command), address=address, command=argv, submitted=time.time())
        _record(job)
        print(f"job {job.id} on {address}", file=sys.stderr)
        if detach:
            return _summary(client, job)
        return _follow(client, job)


def status(job_id: str | None = None) -> dict:
    """One job, or every recorded job with the heads on this machine."""
    if job_id is not None:
        job = _job(job_id)
        with _no_other_address():
            return _summary(_client(job.address), job)
    running = [head for path in sorted(state_folder().glob("*.json")) if (head := heads.read_record(path))]
    return {
        "heads": [{"address": head.address, "answers": head.answers()} for head in running],
        "jobs": [_last_known(job) for job in _jobs()],
    }


def logs(job_id: str, *, follow: bool = False) -> dict:
    """Print what the job has written so far; with ``follow`` go on until it ends."""
    job = _job(job_id)
    with _no_other_address():
        client = _client(job.address)
        if follow:
            return _follow(client, job)
        print(client.get_job_logs(job.id), end="")
        return _summary(client, job)


def stop(job_id: str) -> dict:
    """Ask the job to stop, and wait until it has."""
    job = _job(job_id)
    with _no_other_address():
        client = _client(job.address)
        client.stop_job(job.id)
        _wait_until_ended(client, job)
        return _summary(client, job)


def stop_head() -> dict:
    """Stop the heads that ``submit`` started from this folder, with all their jobs, and no other Ray process."""
    return {"stopped": heads.stop_heads(state_folder())}


def _resolve(target: str) -> tuple[str, str]:
    """Address of the job server, starting a head where the target is this machine; and the interpreter to use there."""
    if "://" in target:
        if not target.startswith(("http://", "https://", "ray://")):
            raise ValueError(
                f"{target} is no cluster address: write http://host:8265, ray://host:10001 or a cluster file"
            )
        return target, "python"
    if not Path(target).is_file():
        raise ValueError(f"{target} does not exist: the target is a cluster file (cluster/local.yaml) or an address")
    config = heads.load_cluster(target)
    if not heads.runs_here(config):
        raise ValueError(
            f"{target} describes machines elsewhere (provider {config['provider']['type']}): start them with "
            f"`ray up {target}`, open the job server with `ray dashboard {target}`, then submit to http://127.0.0.1:8265"
        )
    return heads.ensure_head(config, state_folder()).address, sys.executable


def _client(address: str) -> Any:
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")  # NOT_PACKED holds them: no warning needed
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.INFO)  # Ray lists every file it leaves out
    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        raise RuntimeError(f"no Ray job server answers at {address}: is the cluster up? (mfctl status)") from error


def _submit_when_ready(client: Any, command: list[str]) -> str:
    """A head accepts jobs a few seconds after it answers: until its agent has registered, submission is refused."""
    deadline = time.monotonic() + AGENT_LIMIT_S
    while True:
        try:
            return client.submit_job(entrypoint=shlex.join(command), runtime_env=_runtime_environment())
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def _runtime_environment() -> dict:
    """The working tree, and what a copy of it would lose: the user's directory and the place of the runs."""
    variables = {name: os.environ.get(name, value) for name, value in DEFAULTS.items()}
    variables |= {BASE: str(base_directory()), "MLFLOW_TRACKING_URI": tracking_uri()}
    return {"working_dir": str(ROOT), "excludes": NOT_PACKED, "env_vars": variables}


def _follow(client: Any, job: Job) -> dict:
    """Print the job's logs as they come, until it has ended."""
    try:
        asyncio.run(_print_logs(client, job.id))
        _wait_until_ended(client, job)
    except KeyboardInterrupt:
        print(f"\nthe job goes on: mfctl logs --follow {job.id}   or end it: mfctl stop {job.id}", file=sys.stderr)
        raise
    return _summary(client, job)


async def _print_logs(client: Any, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        print(lines, end="", flush=True)


def _wait_until_ended(client: Any, job: Job) -> None:
    while not client.get_job_status(job.id).is_terminal():
        time.sleep(0.3)


def _summary(client: Any, job: Job) -> dict:
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


def _last_known(job: Job) -> dict:
    """The job's summary, or the fact that its cluster is gone."""
    try:
        with _no_other_address():
            return _summary(_client(job.address), job)
    except RuntimeError:
        return {"job": job.id, "address": job.address, "command": job.command, "status": "cluster does not answer"}


def _record(job: Job) -> None:
    folder = state_folder() / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job.id}.json").write_text(json.dumps(asdict(job), indent=1))


def _jobs() -> list[Job]:
    found = [Job(**json.loads(path.read_text())) for path in (state_folder() / "jobs").glob("*.json")]
    return sorted(found, key=lambda job: job.submitted)


def _job(job_id: str) -> Job:
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
