"""``mfctl evaluate``: the sweep. Part of the command line in ``cli.py``."""

from typing import Annotated, Any, Literal

import typer

from mfcore.metrics.windows import DEFAULT_WINDOWS
from workflows.cli import output
from workflows.cli.options import JsonFlag, parse_ints
from workflows.cli.traits import command
from workflows.utils import environment, progress

Checkpoints = Annotated[
    list[str], typer.Argument(parser=environment.resolve_path, metavar="CHECKPOINT...", help="Runs or checkpoints.")
]
Data = Annotated[
    str | None, typer.Option(parser=environment.resolve_path, metavar="DATASET", help="Whose held-out clips to use.")
]
Steps = Annotated[str, typer.Option(metavar="1,2,4", help="Solver steps to sweep.")]
Modes = Annotated[str, typer.Option("--modes", "--mode", metavar="few,multi", help="Modes to sweep.")]
Guidance = Annotated[str | None, typer.Option(metavar="1,5", help="Guidance weights of the multi-step mode.")]
Clips = Annotated[int, typer.Option(min=1, help="Held-out clips for each row of the sweep.")]
Seconds = Annotated[float | None, typer.Option(help="Length of each generated clip; default: the real one's.")]
Seeds = Annotated[
    str, typer.Option(metavar="N", help="Each setting with that many seeds of the noise, or with those: 0,5.")
]
Windows = Annotated[str, typer.Option(metavar="0-5,5-15", help="Parts of the clips, in seconds, scored apart.")]
Workers = Annotated[int, typer.Option(min=1, help="Ray workers, each with the network; 1: this process.")]
Weights = Annotated[
    list[str],
    typer.Option(
        metavar="KIND=PLACE",
        default_factory=list,
        show_default=False,
        help="Networks that measure: syncnet, whisper, pocketsphinx, videomae, clap, faces, sounds; repeatable.",
    ),
]
Precision = Annotated[
    Literal["fp32", "bf16"], typer.Option(help="In which samples are made; rows of bf16 say so in their label.")
]
Out = Annotated[
    str | None, typer.Option(parser=environment.resolve_path, metavar="FOLDER", help="Results, plots, samples.")
]


@command(writes_runs=True, driver_only=True, paths=("checkpoints", "data", "out"))
def evaluate(
    checkpoints: Checkpoints,
    *,
    data: Data = None,
    steps: Steps = "1,2,4,8,16,50",
    modes: Modes = "few,multi",
    guidance: Guidance = None,
    clips: Clips = 16,
    seconds: Seconds = None,
    seeds: Seeds = "1",
    windows: Windows = DEFAULT_WINDOWS,
    workers: Workers = 1,
    weights: Weights,
    precision: Precision = "fp32",
    out: Out = None,
    json: JsonFlag = False,
) -> None:
    """Sweep quality against network evaluations: one MLflow run per step count and mode under one parent."""

    def work() -> Any:
        how: dict[str, Any] = {
            "steps": parse_ints(steps, "--steps", least=1),
            "modes": modes.split(","),
            "guidance": parse_floats(guidance) if guidance else (),
            "seeds": parse_seeds(seeds),
        }
        from workflows.evaluation.evaluate import evaluate_checkpoints as run_evaluate

        with progress.progress_bar("evaluate") as show:
            return run_evaluate(
                checkpoints, data=data, clips=clips, seconds=seconds, windows=windows, workers=workers,
                weights=weights, precision=precision, out=out, progress=show, **how,
            )  # fmt: skip

    output.run_command(work, as_json=json)


def parse_seeds(text: str) -> list[int]:
    """One number: that many seeds from 0; several: those."""
    given = parse_ints(text, "--seeds", least=0)
    return given if len(given) > 1 else list(range(given[0])) or [0]


def parse_floats(text: str) -> list[float]:
    """Numbers separated by commas, or ValueError naming the option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--guidance takes numbers separated by commas, got {text!r}: {error}") from None
