"""`mfctl doctor`, `mfctl demo` and `mfctl mlflow`."""

import os
import shlex
import sys
from typing import Annotated, Any

import typer

from workflows.cli import output
from workflows.cli.options import JsonFlag
from workflows.cli.traits import command
from workflows.utils import environment

DEFAULT_DEMO_DIR = "runs/demo"


def doctor(*, json: JsonFlag = False) -> None:
    """Check this machine and print the fix for each missing part.

    The exit code is 1 if a required part is missing.

    Example: mfctl doctor
    """
    from workflows import doctor as checks

    output.run_command(
        checks.run_checks, as_json=json, render=checks.format_report, code=lambda report: 0 if report["ok"] else 1
    )


@command(writes_runs=True, paths=("out",))
def demo(
    *,
    out: Annotated[
        str, typer.Option(parser=environment.resolve_path, metavar="DIR", help="Output folder.")
    ] = DEFAULT_DEMO_DIR,
    json: JsonFlag = False,
) -> None:
    """Run the end-to-end demo on the toy world in less than ten minutes. Rerun the same command to resume.

    The packaged model speaks first. Then the demo makes clips and a dataset, trains four stages, generates samples and
    runs a sweep.

    Example: mfctl demo --out runs/demo
    """

    def work() -> Any:
        from workflows.demo import demo as run_demo

        return run_demo(out)

    output.run_command(work, as_json=json, render=lambda _: f"summary: {out}/summary.json")


def mlflow(
    *,
    host: Annotated[str, typer.Option(help="Address of the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 5000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and exit.")] = False,
) -> None:
    """Open the MLflow UI on the store of the runs: MLFLOW_TRACKING_URI, or runs/mlflow.db.

    Example: mfctl mlflow --port 5001
    """
    store = environment.tracking_uri()
    words = [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port)]
    # the store is not an argument: every user of the machine can read the arguments of a process, and it may have a
    # password. Job workers (8 processes, 2 GB) serve evaluations of language models only
    variables = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    shown = environment.hide_passwords(store)
    if dry_run:
        assignments = [f"{name}={environment.hide_passwords(value)}" for name, value in variables.items()]
        output.write_stdout(shlex.join([*assignments, *words]) + "\n")
        return
    print(
        f"MLflow on http://{host}:{port}, store {shown}. Press Ctrl-C to stop it. "
        "For charts choose 'Model training' at the top left; the browser keeps the choice",
        file=sys.stderr,
        flush=True,
    )
    os.execve(sys.executable, words, {**os.environ, **variables})
