"""Arguments and options that several verbs of the command line share."""

from typing import Annotated

import typer

from workflows.utils import environment

# Paths are made absolute here, once: Ray's workers have other current directories. URIs stay as they are.
Out = Annotated[str, typer.Argument(parser=environment.absolute, metavar="OUT", help="Where to write.")]
Dataset = Annotated[str, typer.Argument(parser=environment.absolute, metavar="DATASET", help="Folder or s3:// prefix.")]
Checkpoint = Annotated[
    str, typer.Argument(parser=environment.absolute, metavar="CHECKPOINT", help="A run, or one of its checkpoints.")
]
Mp4 = Annotated[str, typer.Argument(parser=environment.absolute, metavar="OUT.mp4", help="The file to write.")]
Json = Annotated[bool, typer.Option("--json", help="Standard output is one line, a JSON object.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there; without it nothing is replaced.")]
Preset = Annotated[str, typer.Option("--preset", metavar="NAME", help="tiny, small, base or full.")]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="a.b=value",
        default_factory=list,
        show_default=False,
        help="Change one value; may be repeated.",
    ),
]
Config = Annotated[
    str | None, typer.Option("--config", metavar="FILE", parser=environment.absolute, help="Values from a YAML file.")
]


def numbers(text: str, option: str, *, least: int) -> list[int]:
    """Whole numbers separated by commas, or ValueError naming the option and the part that is none."""
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < least:
            raise ValueError(f"{option} takes whole numbers from {least} up separated by commas, got {part!r}")
    return [int(part) for part in text.split(",")]


def pairs(text: str, option: str) -> list[list[int]]:
    """``192x336,336x192`` as [[192, 336], [336, 192]], or ValueError naming the option and the part that is none."""
    parts = [part.strip().lower().split("x") for part in text.split(",")]
    for part in parts:
        if len(part) != 2 or not all(edge.isdecimal() for edge in part):
            raise ValueError(f"{option} takes height x width pairs such as 192x336,336x192, got {'x'.join(part)!r}")
    return [[int(edge) for edge in part] for part in parts]


def one_pair(text: str, option: str) -> tuple[int, int]:
    """``192x336`` as (192, 336), or ValueError naming the option."""
    found = pairs(text, option)
    if len(found) != 1:
        raise ValueError(f"{option} takes one height x width such as 192x336, got {text!r}")
    return found[0][0], found[0][1]
