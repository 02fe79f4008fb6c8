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
    """Say what works on this machine, and what to type for what does not."""
    from workflows import doctor as checks

    output.run_command(
        checks.run_checks, as_json=json, render=checks.format_report, code=lambda report: 0 if report["ok"] else 1
    )


@command(writes_runs=True, paths=("out",))
def demo(
    *,
    out: Annotated[
        str, typer.Option(parser=environment.resolve_path, help="Folder of everything the story makes.")
    ] = DEFAULT_DEMO_DIR,
    json: JsonFlag = False,
) -> None:
    """The whole story on the toy world: clips, dataset, four trained stages, samples, sweep. Under ten minutes."""

    def work() -> Any:
        from workflows.demo import demo as run_demo

        return run_demo(out)

    output.run_command(work, as_json=json, render=lambda _: f"summary: {out}/summary.json")


def mlflow(
    *,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 5000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and stop.")] = False,
) -> None:
    """Open MLflow on the store of our runs: MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    store = environment.tracking_uri()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--host", host, "--port", str(port)]
    if dry_run:
        print(shlex.join(command))
        return
    print(
        f"MLflow on http://{host}:{port}, store {store}; Ctrl-C ends it. "
        "Charts: choose 'Model training' at the top left, the browser remembers it",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, command)
