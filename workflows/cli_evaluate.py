"""``mfctl evaluate``: the sweep. Part of the command line in ``cli.py``."""

from typing import Annotated, Any

import typer

from workflows import console, environment
from workflows.options import Json, numbers

WINDOWS = "0-5,5-15,15-25,25-60,60-120"


def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(parser=environment.absolute, metavar="CHECKPOINT...", help="Runs or checkpoints.")
    ],
    *,
    data: Annotated[
        str | None, typer.Option(parser=environment.absolute, metavar="DATASET", help="Whose held-out clips to use.")
    ] = None,
    steps: Annotated[str, typer.Option(metavar="1,2,4", help="Solver steps to sweep.")] = "1,2,4,8,16,50",
    modes: Annotated[str, typer.Option("--modes", "--mode", metavar="few,multi", help="Modes to sweep.")] = "few,multi",
    guidance: Annotated[
        str | None, typer.Option(metavar="1,5", help="Guidance weights of the multi-step mode.")
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Held-out clips for each row of the sweep.")] = 16,
    seconds: Annotated[
        float | None, typer.Option(help="Length of each generated clip; default: the real one's.")
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N", help="Each setting with that many seeds of the noise, or with those: 0,5.")
    ] = "1",
    windows: Annotated[
        str, typer.Option(metavar="0-5,5-15", help="Parts of the clips, in seconds, scored apart.")
    ] = WINDOWS,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers, each with the network; 1: this process.")] = 1,
    weights: Annotated[
        list[str],
        typer.Option(
            metavar="KIND=PLACE",
            default_factory=list,
            show_default=False,
            help="Networks that measure: syncnet, whisper, pocketsphinx, videomae, clap, faces, sounds; repeatable.",
        ),
    ],
    out: Annotated[
        str | None, typer.Option(parser=environment.absolute, metavar="FOLDER", help="Results, plots, samples.")
    ] = None,
    json: Json = False,
) -> None:
    """Sweep quality against network evaluations: one MLflow run per step count and mode under one parent."""

    def work() -> Any:
        counts, draws = numbers(steps, "--steps", least=1), numbers(seeds, "--seeds", least=0)
        if len(draws) == 1:
            draws = list(range(draws[0])) or [0]
        from workflows.evaluate import evaluate as run_evaluate

        with console.progress("evaluate") as show:
            return run_evaluate(
                checkpoints,
                data=data,
                steps=counts,
                modes=modes.split(","),
                guidance=guidance_weights(guidance) if guidance else (),
                clips=clips,
                seconds=seconds,
                out=out,
                seeds=draws,
                windows=windows,
                workers=workers,
                weights=weights,
                progress=show,
            )

    console.run(work, as_json=json)


def guidance_weights(text: str) -> list[float]:
    """Numbers separated by commas, or ValueError naming the option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--guidance takes numbers separated by commas, got {text!r}: {error}") from None
