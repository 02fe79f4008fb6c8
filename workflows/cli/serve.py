"""`mfctl serve`: stream talking clips to browsers and programs."""

import json as jsonlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mfcore.errors import UserInputError
from workflows.checkpoints import packaged
from workflows.cli import output
from workflows.cli.options import Device, JsonFlag, OptionalCheckpoint, SolverSteps
from workflows.cli.traits import command
from workflows.utils import environment

if TYPE_CHECKING:
    from workflows.serving.server import ServerOptions

SESSIONS = "Sessions"
REPLICAS = "Replicas on Ray Serve"
Host = Annotated[str, typer.Option(help="Address to listen at. One that other machines can reach needs --token.")]
Token = Annotated[
    str | None,
    typer.Option(envvar="MFCTL_SERVE_TOKEN", help="Secret that clients must send: ?token=TOKEN in the address."),
]
Sessions = Annotated[
    int,
    typer.Option(
        rich_help_panel=SESSIONS, help="Largest number of sessions, of each replica; less if memory is short."
    ),
]
Snapshots = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|S3",
        parser=environment.resolve_path,
        rich_help_panel=SESSIONS,
        show_default="in memory, with --ray a temporary folder",
        help="Folder or s3:// prefix of snapshots, from which other servers resume sessions.",
    ),
]
Ray = Annotated[bool, typer.Option("--ray", rich_help_panel=REPLICAS, help="Serve with replicas on Ray Serve.")]
Replicas = Annotated[int | None, typer.Option(rich_help_panel=REPLICAS, show_default="1", help="Number of replicas.")]
MaxReplicas = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=REPLICAS,
        show_default="that of --replicas",
        help="Add replicas up to this number while sessions fill the others.",
    ),
]


@command(driver_only=True, paths=("checkpoint", "snapshots"))
def serve(
    checkpoint: OptionalCheckpoint = None,
    *,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any free one.")] = 8000,
    token: Token = None,
    sessions: Sessions = 4,
    snapshots: Snapshots = None,
    ray: Ray = False,
    replicas: Replicas = None,
    max_replicas: MaxReplicas = None,
    steps: SolverSteps = None,
    device: Device = None,
    json: JsonFlag = False,
) -> None:
    """Serve a page that talks, and an API for programs, until stopped. Prints one line with the URL when ready.

    Example: mfctl serve runs/mutual --port 8080
    """

    def work() -> None:
        from workflows.serving.engine import EngineLimits
        from workflows.serving.server import ServerOptions, serve_checkpoint

        if not ray and (replicas, max_replicas) != (None, None):
            raise UserInputError("--replicas and --max-replicas: one process has no replicas. Add --ray.")
        options = ServerOptions(
            host=host, port=port, token=token, snapshots=snapshots, limits=EngineLimits(sessions=sessions)
        )
        path = checkpoint or packaged.default_model()
        network: dict[str, Any] = {"checkpoint": path, "steps": steps, "device": device}
        if ray:
            count = 1 if replicas is None else replicas
            _serve_on_ray(options, show, replicas=count, max_replicas=max_replicas, **network)
        else:
            serve_checkpoint(options, on_ready=show, **network)

    def show(url: str) -> None:
        output.write_stdout(jsonlib.dumps({"url": url}) + "\n" if json else f"ready: open {url} in a browser\n")

    output.run_until_stopped(work, as_json=json)


def _serve_on_ray(options: "ServerOptions", show: Callable[[str], None], **arguments: Any) -> None:
    try:
        from workflows.serving.deployment import LiveArguments, serve_on_ray
    except ModuleNotFoundError as error:
        raise UserInputError(
            f"--ray: Ray Serve is not complete, {error.name} is missing. Install the extra: "
            "pip install 'mutual-forcing[serve]'."
        ) from None
    serve_on_ray(options, LiveArguments(**arguments, sessions=options.limits.sessions), on_ready=show)
