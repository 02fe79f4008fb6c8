"""`mfctl evaluate`: sweep quality over the number of network evaluations."""

from typing import Annotated, Any, Literal

import typer

from mfcore.metrics.windows import DEFAULT_WINDOWS
from workflows.checkpoints.packaged import resolve_checkpoint
from workflows.cli import output
from workflows.cli.options import OUTPUT, JsonFlag, parse_floats, parse_ints
from workflows.cli.traits import command
from workflows.utils import environment, progress

SWEEP = "Sweep"
EXECUTION = "Execution"

Checkpoints = Annotated[
    list[str],
    typer.Argument(
        parser=resolve_checkpoint,
        metavar="CHECKPOINT...",
        help="Runs, checkpoints or packaged models (`mfctl models`).",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        parser=environment.resolve_dataset,
        metavar="DATASET",
        show_default="dataset of the first checkpoint",
        help="Dataset of the held-out clips.",
    ),
]
Steps = Annotated[str, typer.Option(metavar="1,2,4", rich_help_panel=SWEEP, help="Solver steps per chunk.")]
Modes = Annotated[
    str, typer.Option("--modes", "--mode", metavar="few,multi", rich_help_panel=SWEEP, help="Sampling modes.")
]
Guidance = Annotated[
    str | None,
    typer.Option(
        metavar="1,5", rich_help_panel=SWEEP, show_default="1.5", help="Guidance weights of the multi-step mode."
    ),
]
Samplers = Annotated[
    str | None,
    typer.Option(
        "--samplers",
        "--sampler",
        metavar="renoise,deterministic",
        rich_help_panel=SWEEP,
        show_default="renoise",
        help="Samplers of the few-step mode: renoise, deterministic, mixed.",
    ),
]
Clips = Annotated[int, typer.Option(min=1, help="Held-out clips per sweep point.")]
Seconds = Annotated[
    float | None, typer.Option(show_default="length of each real clip", help="Length of the samples in seconds.")
]
Seeds = Annotated[
    str, typer.Option(metavar="N", rich_help_panel=SWEEP, help="Number of noise seeds, or a list such as 0,5.")
]
Windows = Annotated[str, typer.Option(metavar="0-5,5-15", help="Windows of the clips in seconds, scored separately.")]
Workers = Annotated[
    int, typer.Option(min=1, rich_help_panel=EXECUTION, help="Ray workers, each with one network; 1: this process.")
]
Weights = Annotated[
    list[str],
    typer.Option(
        metavar="KIND=PLACE",
        default_factory=list,
        show_default=False,
        rich_help_panel=EXECUTION,
        help="Feature model, repeatable: syncnet, whisper, pocketsphinx, people, videomae, clap, faces, sounds.",
    ),
]
Precision = Annotated[
    Literal["fp32", "bf16"],
    typer.Option(rich_help_panel=EXECUTION, help="Precision of sampling; labels of bf16 rows contain it."),
]
Out = Annotated[
    str | None,
    typer.Option(
        parser=environment.resolve_path,
        metavar="FOLDER",
        rich_help_panel=OUTPUT,
        show_default="below runs/evaluate/",
        help="Output folder of results, plots and samples.",
    ),
]


@command(writes_runs=True, driver_only=True, paths=("checkpoints", "data", "out"))
def evaluate(
    checkpoints: Checkpoints,
    *,
    data: Data = None,
    steps: Steps = "1,2,4,8,16,50",
    modes: Modes = "few,multi",
    guidance: Guidance = None,
    samplers: Samplers = None,
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
    """Sweep quality over the number of network evaluations. Rerun the same command to resume.

    MLflow gets one run per sweep point below one parent run.

    Example: mfctl evaluate runs/mutual runs/joint --steps 1,2,4,8 --clips 64
    """

    def work() -> Any:
        sweep: dict[str, Any] = {
            "steps": parse_ints(steps, "--steps", least=1),
            "modes": modes.split(","),
            "guidance": parse_floats(guidance, "--guidance") if guidance else (),
            "samplers": samplers.split(",") if samplers else (),
            "seeds": parse_seeds(seeds),
        }
        from workflows.evaluation.evaluate import evaluate_checkpoints

        with progress.progress_bar("evaluate") as show:
            return evaluate_checkpoints(
                checkpoints, data=data, clips=clips, seconds=seconds, windows=windows, workers=workers,
                weights=weights, precision=precision, out=out, progress=show, **sweep,
            )  # fmt: skip

    output.run_command(work, as_json=json)


def parse_seeds(text: str) -> list[int]:
    """Return the seeds: one number counts them from 0, several are a list."""
    given = parse_ints(text, "--seeds", least=0)
    return given if len(given) > 1 else list(range(given[0])) or [0]
