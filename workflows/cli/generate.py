"""`mfctl generate`: stream one clip from a checkpoint into an mp4 file."""

from typing import Annotated, Any, Literal

import typer

from workflows.cli import output
from workflows.cli.options import CheckpointPath, JsonFlag, Mp4Path, OverwriteFlag
from workflows.cli.traits import command
from workflows.utils import environment

CONDITIONS = "Conditions"
SAMPLING = "Sampling"
EXECUTION = "Execution"


FirstFrame = Annotated[
    str | None,
    typer.Option(
        parser=environment.resolve_path,
        metavar="IMAGE",
        rich_help_panel=CONDITIONS,
        help="Image or video with the first frame of the clip.",
    ),
]
Transcript = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT|JSON",
        rich_help_panel=CONDITIONS,
        help="Spoken words: text, or a file with times (.json, .srt, .vtt, .txt).",
    ),
]
Caption = Annotated[str, typer.Option(rich_help_panel=CONDITIONS, help="Caption of the clip.", show_default="empty")]
Voice = Annotated[
    str | None,
    typer.Option(
        parser=environment.resolve_path,
        metavar="CLIP",
        rich_help_panel=CONDITIONS,
        help="Media file with the reference voice.",
    ),
]
Seconds = Annotated[float, typer.Option(rich_help_panel=SAMPLING, help="Length of the clip in seconds.")]
Steps = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        show_default="4 in few-step mode, 50 in multi-step mode",
        help="Solver steps per chunk.",
    ),
]
Mode = Annotated[
    Literal["few", "multi"] | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        show_default="few for stage mutual, else multi",
        help="Few-step or multi-step mode.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        show_default="1 in few-step mode, 1.5 in multi-step mode",
        help="Guidance weight.",
    ),
]
Trust = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        show_default="1 in few-step mode, none in multi-step mode",
        help="Trust label of the history; 0: real, 1: generated.",
    ),
]
Seed = Annotated[int, typer.Option(rich_help_panel=SAMPLING, help="Seed of the noise.")]
Weights = Annotated[
    Literal["ema", "raw"],
    typer.Option(rich_help_panel=EXECUTION, help="Weights of the checkpoint: moving average or last step."),
]
Precision = Annotated[
    Literal["fp32", "bf16"] | None,
    typer.Option(
        rich_help_panel=EXECUTION,
        show_default="bf16 on CUDA, else fp32",
        help="Precision of weights and products.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", rich_help_panel=EXECUTION, help="Compile transformer blocks with torch.compile."),
]
Graphs = Annotated[
    bool,
    typer.Option("--graphs", rich_help_panel=EXECUTION, help="Run the passes of a chunk as CUDA graphs (GPU only)."),
]


@command(driver_only=True, paths=("checkpoint", "out", "first_frame", "voice"))
def generate(
    checkpoint: CheckpointPath,
    out: Mp4Path,
    *,
    first_frame: FirstFrame = None,
    transcript: Transcript = None,
    caption: Caption = "",
    voice: Voice = None,
    seconds: Seconds = 10.0,
    steps: Steps = None,
    mode: Mode = None,
    guidance: Guidance = None,
    trust: Trust = None,
    seed: Seed = 0,
    weights: Weights = "ema",
    precision: Precision = None,
    compile: Compile = False,
    graphs: Graphs = False,
    overwrite: OverwriteFlag = False,
    json: JsonFlag = False,
) -> None:
    """Stream a clip chunk by chunk from a checkpoint into an mp4 file.

    Example: mfctl generate runs/mutual clip.mp4 --transcript "hello there" --seconds 20
    """

    def work() -> Any:
        from workflows.inference.generate import ClipPrompt, RuntimeOptions, generate_clip

        return generate_clip(
            checkpoint,
            ClipPrompt(first_frame=first_frame, transcript=transcript, caption=caption, voice=voice, seconds=seconds),
            out=out,
            runtime=RuntimeOptions(weights=weights, precision=precision, compile=compile, graphs=graphs),
            steps=steps,
            mode=mode,
            guidance=guidance,
            trust=trust,
            seed=seed,
            overwrite=overwrite,
        )

    output.run_command(work, as_json=json)
