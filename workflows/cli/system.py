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

    The demo makes clips and a dataset, trains four stages, generates samples and runs a sweep.

    Example: mfctl demo --out runs/demo
    """

    def work() -> Any:
        from workflows.demo import demo as run_demo

        return run_demo(out)

    output.run_command(work, as_json=json, render=lambda _: f"summary: {out}/summary.json")


def mlflow(
    *,
    host: Annotated[str, typer.Option(help="Address of the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the server.")] = 5000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and exit.")] = False,
) -> None:
    """Open the MLflow UI on the store of the runs: MLFLOW_TRACKING_URI, or runs/mlflow.db.

    Example: mfctl mlflow --port 5001
    """
    store = environment.tracking_uri()
    words = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--host", host, "--port", str(port)]
    if dry_run:
        print(shlex.join(words))
        return
    print(
        f"MLflow on http://{host}:{port}, store {store}. Press Ctrl-C to stop it. "
        "For charts choose 'Model training' at the top left; the browser keeps the choice",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, words)
