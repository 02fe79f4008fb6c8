"""`mfctl export` and `mfctl register`: checkpoints as folders of the hub and as versions in MLflow's registry."""

from typing import Annotated, Any, Literal

import typer

from workflows.checkpoints.packaged import resolve_checkpoint
from workflows.cli import output
from workflows.cli.options import JsonFlag, OutputPath
from workflows.cli.traits import command
from workflows.utils import environment

CARD = "Model card"
HUB = "Hub"

Checkpoint = Annotated[
    str,
    typer.Argument(
        parser=resolve_checkpoint,
        metavar="CHECKPOINT",
        help="Run, checkpoint, exported folder, packaged model, or models:/NAME@ALIAS.",
    ),
]
Sweep = Annotated[
    str | None,
    typer.Option(
        "--sweep",
        metavar="FOLDER",
        parser=environment.resolve_path,
        rich_help_panel=CARD,
        help="Output folder of `mfctl evaluate` with results of this checkpoint.",
    ),
]
License = Annotated[
    str | None, typer.Option("--license", metavar="SPDX", rich_help_panel=CARD, help="License of the weights.")
]


@command(driver_only=True, paths=("checkpoint", "out", "sweep", "card"))
def export(
    checkpoint: Checkpoint,
    out: OutputPath,
    *,
    weights: Annotated[
        Literal["ema", "raw"], typer.Option(help="Weights of the checkpoint: moving average or last step.")
    ] = "ema",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision of matrices in the file.")
    ] = "float32",
    sweep: Sweep = None,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            parser=environment.resolve_path,
            rich_help_panel=CARD,
            help="YAML file with fields of the card, such as summary, language and limits.",
        ),
    ] = None,
    license: License = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", rich_help_panel=HUB, help="Upload the folder to this repository of the hub."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", rich_help_panel=HUB, help="Create the repository as private.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Write a checkpoint as a folder of the Hugging Face hub: config.json, safetensors, model card.

    Example: mfctl export runs/mutual talker --sweep runs/evaluate/mutual --license Apache-2.0
    """

    def work() -> Any:
        from pathlib import Path

        from workflows.checkpoints.export import export_checkpoint
        from workflows.checkpoints.hub_push import open_hub, push_folder
        from workflows.config.serialization import load_config_file

        hub = open_hub(push) if push else None
        made = export_checkpoint(
            checkpoint, out, weights=weights, dtype=dtype, sweep=sweep, license=license,
            card=load_config_file(card) if card else None, hide_folders=push is not None,
        )  # fmt: skip
        if push is None:
            return made
        return made | {"url": push_folder(hub, Path(out), push, private=private)}

    output.run_command(work, as_json=json)


@command(driver_only=True, paths=("checkpoint", "sweep"))
def register(
    checkpoint: Checkpoint,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model in the registry.")],
    *,
    alias: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="Alias of the version, such as champion; it may move.")
    ] = None,
    sweep: Sweep = None,
    license: License = None,
    json: JsonFlag = False,
) -> None:
    """Register a checkpoint in MLflow. Then models:/NAME@ALIAS is a checkpoint.

    Example: mfctl register runs/mutual talker --alias champion
    """

    def work() -> Any:
        from workflows.checkpoints.register import register_checkpoint

        return register_checkpoint(checkpoint, name, alias=alias, sweep=sweep, license=license)

    output.run_command(work, as_json=json)
