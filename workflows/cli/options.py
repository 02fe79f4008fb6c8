"""Arguments and options that several verbs of the command line share."""

from typing import Annotated

import typer

from workflows.utils import environment

# Paths are made absolute here, once: Ray's workers have other current directories. URIs stay as they are.
OutputPath = Annotated[str, typer.Argument(parser=environment.resolve_path, metavar="OUT", help="Where to write.")]
DatasetUri = Annotated[
    str, typer.Argument(parser=environment.resolve_path, metavar="DATASET", help="Folder or s3:// prefix.")
]
CheckpointPath = Annotated[
    str, typer.Argument(parser=environment.resolve_path, metavar="CHECKPOINT", help="A run, or one of its checkpoints.")
]
Mp4Path = Annotated[str, typer.Argument(parser=environment.resolve_path, metavar="OUT.mp4", help="The file to write.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Standard output is one line, a JSON object.")]
DryRunFlag = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")]
OverwriteFlag = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there; without it nothing is replaced.")
]
PresetName = Annotated[str, typer.Option("--preset", metavar="NAME", help="tiny, small, base or full.")]
ConfigOverrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="a.b=value",
        default_factory=list,
        show_default=False,
        help="Change one value; may be repeated.",
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", parser=environment.resolve_path, help="Values from a YAML file."),
]


def parse_ints(text: str, option: str, *, least: int) -> list[int]:
    """Whole numbers separated by commas, or ValueError naming the option and the part that is none."""
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < least:
            raise ValueError(f"{option} takes whole numbers from {least} up separated by commas, got {part!r}")
    return [int(part) for part in text.split(",")]


def parse_sizes(text: str, option: str) -> list[list[int]]:
    """``192x336,336x192`` as [[192, 336], [336, 192]], or ValueError naming the option and the part that is none."""
    parts = [part.strip().lower().split("x") for part in text.split(",")]
    for part in parts:
        if len(part) != 2 or not all(edge.isdecimal() for edge in part):
            raise ValueError(f"{option} takes height x width pairs such as 192x336,336x192, got {'x'.join(part)!r}")
    return [[int(edge) for edge in part] for part in parts]


def parse_size(text: str, option: str) -> tuple[int, int]:
    """``192x336`` as (192, 336), or ValueError naming the option."""
    found = parse_sizes(text, option)
    if len(found) != 1:
        raise ValueError(f"{option} takes one height x width such as 192x336, got {text!r}")
    return found[0][0], found[0][1]
