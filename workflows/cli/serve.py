"""`mfctl serve`: stream talking clips to browsers and programs."""

import json as jsonlib
from typing import Annotated, Literal

import typer

from workflows.checkpoints import packaged
from workflows.cli import output
from workflows.cli.options import JsonFlag, OptionalCheckpoint
from workflows.cli.traits import command
from workflows.utils import environment

NETWORK = "Network"
SESSIONS = "Sessions"


@command(driver_only=True, paths=("checkpoint", "snapshots"))
def serve(
    checkpoint: OptionalCheckpoint = None,
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen at. One that other machines can reach needs --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="MFCTL_SERVE_TOKEN", help="Secret that clients must send: ?token=TOKEN in the address."),
    ] = None,
    sessions: Annotated[
        int, typer.Option(rich_help_panel=SESSIONS, help="Largest number of sessions; less if memory is short.")
    ] = 4,
    snapshots: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|S3",
            parser=environment.resolve_path,
            rich_help_panel=SESSIONS,
            show_default="in memory",
            help="Folder or s3:// prefix of snapshots, from which other servers resume sessions.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=NETWORK,
            show_default="4 in few-step mode, 50 in multi-step mode",
            help="Solver steps per chunk.",
        ),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(rich_help_panel=NETWORK, show_default="cuda if available", help="Device."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Serve a page that talks, and an API for programs, until stopped. Prints one line with the URL when ready.

    Example: mfctl serve runs/mutual --port 8080
    """

    def work() -> None:
        from workflows.serving.server import serve_checkpoint

        serve_checkpoint(
            checkpoint or packaged.default_model(),
            host=host,
            port=port,
            token=token,
            sessions=sessions,
            snapshots=snapshots,
            steps=steps,
            device=device,
            on_ready=lambda url: output.write_stdout(
                jsonlib.dumps({"url": url}) + "\n" if json else f"ready: open {url} in a browser\n"
            ),
        )

    output.run_until_stopped(work, as_json=json)
