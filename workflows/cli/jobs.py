"""The verbs about Ray jobs: submit, status, logs, stop. Part of the command line in ``cli.py``."""

import os
import shlex
from typing import Annotated, Any

import typer

from workflows.cli import output
from workflows.cli.options import JsonFlag

app = typer.Typer()

JobIdArgument = Annotated[
    str | None, typer.Argument(metavar="JOB", help="As `mfctl submit` and `mfctl status` print it.")
]


@app.command()
def submit(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A cluster file, an address, or a RayJob's file.")],
    argv: Annotated[list[str], typer.Argument(metavar="-- VERB...", help="The mfctl command to run there.")],
    *,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait; see `mfctl logs --follow JOB`.")] = False,
    python: Annotated[str | None, typer.Option(metavar="PATH", help="The interpreter on the cluster.")] = None,
    shared: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Mounted on all machines of the cluster: runs and relative paths are there."
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Run an mfctl command as a Ray job, follow its logs and end with its exit code."""

    def work() -> Any:
        from workflows.cli.parse import parse_command
        from workflows.jobs.submit import submit_job

        base = os.path.normpath(shared) if shared else None
        command = parse_command(context.find_root().command, argv, base)
        return submit_job(target, command, detach=detach, python=python, shared=base)

    output.run_command(work, as_json=json, code=lambda done: done["exit_code"] or 0)


@app.command()
def status(job: JobIdArgument = None, *, json: JsonFlag = False) -> None:
    """One job, or all jobs and heads started from this folder."""

    def work() -> Any:
        from workflows.jobs.submit import job_status as run_status

        return run_status(job)

    output.run_command(work, as_json=json, render=_status_lines if job is None else None)


def _status_lines(known: dict[str, Any]) -> str:
    """A line for each head and job."""
    lines = [f"head {h['address']} {'answers' if h['answers'] else 'does not answer'}" for h in known["heads"]]
    for job in known["jobs"]:
        code = job.get("exit_code")
        state = job["status"] if code is None else f"{job['status']} (exit code {code})"
        lines.append(f"{job['job']} {state}: {shlex.join(job['command'])}")
    return "\n".join(lines) or "no heads, no jobs: nothing was submitted from this folder"


@app.command()
def logs(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends, with its exit code.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Print what a job has written."""

    def work() -> Any:
        from workflows.jobs.submit import job_logs as run_logs

        return run_logs(job, follow=follow)

    def code(done: dict[str, Any]) -> int:
        return (done["exit_code"] or 0) if follow else 0

    output.run_command(work, as_json=json, render=lambda done: f"[{done['job']} {done['status']}]", code=code)


@app.command()
def stop(
    job: JobIdArgument = None,
    *,
    head: Annotated[
        bool, typer.Option("--head", help="Stop the heads that submit started here, and their jobs.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Stop a job, or with --head the Ray head on this machine that `mfctl submit` started."""

    def work() -> Any:
        from workflows.jobs import submit

        if (job is None) != head:
            raise ValueError("name one thing to stop: `mfctl stop JOB` or `mfctl stop --head`")
        return submit.stop_local_heads() if job is None else submit.stop_job(job)

    output.run_command(work, as_json=json)
