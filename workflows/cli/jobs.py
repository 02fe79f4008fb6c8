"""`mfctl submit`, `status`, `logs` and `stop`: commands as Ray jobs."""

import os
import shlex
from typing import Annotated, Any

import typer

from mfcore.errors import UserInputError
from workflows.cli import output
from workflows.cli.options import JsonFlag

app = typer.Typer()

JOBS = "Jobs"
JOB_HELP = "Id of a job, as `mfctl submit` and `mfctl status` print it."
OptionalJobId = Annotated[str | None, typer.Argument(metavar="JOB", help=JOB_HELP)]


@app.command(rich_help_panel=JOBS)
def submit(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Cluster file, address of a cluster, or RayJob file.")
    ],
    argv: Annotated[list[str], typer.Argument(metavar="-- VERB...", help="The mfctl command to run.")],
    *,
    detach: Annotated[
        bool, typer.Option("--detach", help="Exit after the submission; see `mfctl logs --follow JOB`.")
    ] = False,
    python: Annotated[
        str | None,
        typer.Option(metavar="PATH", show_default="python", help="Python interpreter on the cluster."),
    ] = None,
    shared: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder mounted on all machines; runs and relative paths are below it."),
    ] = None,
    untracked: Annotated[
        bool, typer.Option("--untracked", help="Package files that git neither tracks nor ignores, too.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Run an mfctl command as a Ray job, follow its logs and end with its exit code.

    Example: mfctl submit cluster/local.yaml -- doctor
    """

    def work() -> Any:
        from workflows.cli.parse import parse_command
        from workflows.jobs.submit import submit_job

        base = os.path.normpath(shared) if shared else None
        command = parse_command(context.find_root().command, argv, base)
        return submit_job(target, command, detach=detach, python=python, shared=base, untracked=untracked)

    output.run_command(work, as_json=json, code=lambda done: done["exit_code"] or 0)


@app.command(rich_help_panel=JOBS)
def status(job: OptionalJobId = None, *, json: JsonFlag = False) -> None:
    """Print one job, or all jobs and local heads started from this folder.

    Example: mfctl status
    """

    def work() -> Any:
        from workflows.jobs.submit import job_status

        return job_status(job)

    output.run_command(work, as_json=json, render=_status_lines if job is None else None)


def _status_lines(known: dict[str, Any]) -> str:
    """Return one line per head and per job."""
    lines = [f"head {h['address']} {'answers' if h['answers'] else 'does not answer'}" for h in known["heads"]]
    for job in known["jobs"]:
        code = job.get("exit_code")
        state = job["status"] if code is None else f"{job['status']} (exit code {code})"
        lines.append(f"{job['job']} {state}: {shlex.join(job['command'])}")
    return "\n".join(lines) or "no heads, no jobs: nothing was submitted from this folder"


@app.command(rich_help_panel=JOBS)
def logs(
    job: Annotated[str, typer.Argument(metavar="JOB", help=JOB_HELP)],
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue until the job ends; end with its exit code.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Print the log of a job.

    Example: mfctl logs --follow JOB
    """

    def work() -> Any:
        from workflows.jobs.submit import job_logs

        return job_logs(job, follow=follow)

    def code(done: dict[str, Any]) -> int:
        return (done["exit_code"] or 0) if follow else 0

    output.run_command(work, as_json=json, render=lambda done: f"[{done['job']} {done['status']}]", code=code)


@app.command(rich_help_panel=JOBS)
def stop(
    job: OptionalJobId = None,
    *,
    head: Annotated[
        bool,
        typer.Option("--head", help="Stop the heads that `mfctl submit` started on this machine, with their jobs."),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Stop a job, or the local heads.

    Example: mfctl stop --head
    """

    def work() -> Any:
        from workflows.jobs import submit

        if (job is None) != head:
            raise UserInputError("name one thing to stop: `mfctl stop JOB` or `mfctl stop --head`")
        return submit.stop_local_heads() if job is None else submit.stop_job(job)

    output.run_command(work, as_json=json)
