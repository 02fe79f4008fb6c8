"""Arguments and options that several commands share, and parsers of option values."""

from math import isfinite
from typing import Annotated, Literal

import typer

from mfcore.errors import UserInputError
from workflows.checkpoints.packaged import DEFAULT_MODEL, resolve_checkpoint
from workflows.utils import environment

CONFIGURATION = "Configuration"
NETWORK = "Network"
OUTPUT = "Output"
"""Panels of the help text."""

# Paths become absolute here, once: Ray workers have other current directories. URIs stay unchanged.
OutputPath = Annotated[str, typer.Argument(parser=environment.resolve_path, metavar="OUT", help="Output folder.")]
DatasetUri = Annotated[
    str, typer.Argument(parser=environment.resolve_dataset, metavar="DATASET", help="Dataset: folder or s3:// prefix.")
]
CheckpointAndMp4 = Annotated[
    list[str],
    typer.Argument(
        parser=resolve_checkpoint,
        metavar="[CHECKPOINT] OUT.mp4",
        help=f"Run, checkpoint, export folder or packaged model (default: {DEFAULT_MODEL}), and the output file.",
    ),
]
OptionalCheckpoint = Annotated[
    str | None,
    typer.Argument(
        parser=resolve_checkpoint,
        metavar="CHECKPOINT",
        show_default=DEFAULT_MODEL,
        help="Run, checkpoint or export folder, or the name of a packaged model.",
    ),
]
Mp4Path = Annotated[str, typer.Argument(parser=environment.resolve_path, metavar="OUT.mp4", help="Output file.")]
JsonFlag = Annotated[
    bool,
    typer.Option(
        "--json", rich_help_panel=OUTPUT, help="Print the result as one line with a JSON object on standard output."
    ),
]
DryRunFlag = Annotated[
    bool, typer.Option("--dry-run", rich_help_panel=OUTPUT, help="Print the resolved configuration and exit.")
]
OverwriteFlag = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace an existing output file.")
]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset", metavar="NAME", rich_help_panel=CONFIGURATION, help="Preset: tiny, toy, small, base or full."
    ),
]
ConfigOverrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="a.b=value",
        default_factory=list,
        show_default=False,
        rich_help_panel=CONFIGURATION,
        help="Change of one setting, the value in YAML; repeatable.",
    ),
]
SolverSteps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        rich_help_panel=NETWORK,
        show_default="4 in few-step mode, 50 in multi-step mode",
        help="Solver steps per chunk.",
    ),
]
Device = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option("--device", rich_help_panel=NETWORK, show_default="cuda if available", help="Device."),
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        parser=environment.resolve_path,
        rich_help_panel=CONFIGURATION,
        help="Settings from a YAML or JSON file; --set overrides them.",
    ),
]


def parse_ints(text: str, option: str, *, least: int) -> list[int]:
    """Parse whole numbers separated by commas; ValueError names the option and the wrong part."""
    parts = text.split(",")
    for part in parts:
        if not part.strip().isdecimal() or int(part) < least:
            raise UserInputError(f"{option} takes whole numbers from {least} up separated by commas, got {part!r}")
    return [int(part) for part in parts]


def parse_floats(text: str, option: str) -> list[float]:
    """Parse numbers separated by commas; ValueError names the option and the text."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserInputError(f"{option} takes numbers separated by commas, got {text!r}: {error}") from None
    if not all(isfinite(value) for value in values):
        raise UserInputError(f"{option} takes finite numbers, got {text!r}")
    return values


def parse_sizes(text: str, option: str) -> list[list[int]]:
    """Parse ``192x336,336x192`` to [[192, 336], [336, 192]]; ValueError names the option and the wrong part."""
    parts = [part.strip().lower().split("x") for part in text.split(",")]
    for part in parts:
        if len(part) != 2 or not all(edge.isdecimal() for edge in part):
            raise UserInputError(f"{option} takes height x width pairs such as 192x336,336x192, got {'x'.join(part)!r}")
    return [[int(edge) for edge in part] for part in parts]


def parse_size(text: str, option: str) -> tuple[int, int]:
    """Parse ``192x336`` to (192, 336); ValueError names the option."""
    found = parse_sizes(text, option)
    if len(found) != 1:
        raise UserInputError(f"{option} takes one height x width such as 192x336, got {text!r}")
    return found[0][0], found[0][1]
