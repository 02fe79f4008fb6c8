"""`mfctl generate`: stream one clip from a checkpoint into an mp4 file."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from mfcore.errors import UserInputError
from workflows.checkpoints import packaged
from workflows.cli import output
from workflows.cli.options import CheckpointAndMp4, JsonFlag, OverwriteFlag
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
        show_default="a drawn character, for networks of the toy world",
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
Speed = Annotated[
    float, typer.Option(rich_help_panel=CONDITIONS, help="Factor on the rate of speech of a text, 0.5 to 2.")
]
Pauses = Annotated[float, typer.Option(rich_help_panel=CONDITIONS, help="Factor on the pauses of a text, 0 to 10.")]
Seconds = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        show_default="that of the transcript, 10 without one",
        help="Length of the clip in seconds.",
    ),
]
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
Sampler = Annotated[
    Literal["deterministic", "renoise", "mixed"] | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        show_default="renoise in few-step mode, deterministic in multi-step mode",
        help="Follow the flow, or end each step at the clean chunk and add noise again.",
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
Seed = Annotated[int, typer.Option(rich_help_panel=SAMPLING, help="Seed of the noise and of a drawn first frame.")]
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
Server = Annotated[
    str | None,
    typer.Option(metavar="URL", rich_help_panel=EXECUTION, help="Make the clip on a server of `mfctl serve`."),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", rich_help_panel=EXECUTION, help="Compile transformer blocks with torch.compile."),
]
Graphs = Annotated[
    bool,
    typer.Option("--graphs", rich_help_panel=EXECUTION, help="Run the passes of a chunk as CUDA graphs (GPU only)."),
]


@command(driver_only=True, paths=("checkpoint_and_out", "first_frame", "voice"))
def generate(
    checkpoint_and_out: CheckpointAndMp4,
    *,
    first_frame: FirstFrame = None,
    transcript: Transcript = None,
    caption: Caption = "",
    voice: Voice = None,
    speed: Speed = 1.0,
    pauses: Pauses = 1.0,
    seconds: Seconds = None,
    steps: Steps = None,
    mode: Mode = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    trust: Trust = None,
    seed: Seed = 0,
    weights: Weights = "ema",
    precision: Precision = None,
    compile: Compile = False,
    graphs: Graphs = False,
    server: Server = None,
    overwrite: OverwriteFlag = False,
    json: JsonFlag = False,
) -> None:
    """Stream a clip chunk by chunk from a checkpoint, or from the packaged model, into an mp4 file.

    Example: mfctl generate clip.mp4 --transcript "Nice to meet you."
    """

    def work() -> Any:
        from workflows.inference.generate import ClipPrompt, RuntimeOptions, generate_clip

        prompt = ClipPrompt(
            first_frame=first_frame,
            transcript=transcript,
            caption=caption,
            voice=voice,
            seconds=seconds,
            speed=speed,
            pauses=pauses,
        )
        if server is not None:
            from workflows.serving.remote import generate_remotely

            given = any(value is not None for value in (steps, mode, sampler, guidance, trust, precision))
            local = given or weights != "ema" or compile or graphs
            out = check_remote_options(checkpoint_and_out, has_local_options=local)
            return generate_remotely(server, prompt, out=out, seed=seed, overwrite=overwrite)
        checkpoint, out = split_paths(checkpoint_and_out)
        return generate_clip(
            checkpoint,
            prompt,
            out=out,
            runtime=RuntimeOptions(weights=weights, precision=precision, compile=compile, graphs=graphs),
            steps=steps,
            mode=mode,
            sampler=sampler,
            guidance=guidance,
            trust=trust,
            seed=seed,
            overwrite=overwrite,
        )

    output.run_command(work, as_json=json)


def check_remote_options(paths: Sequence[str], *, has_local_options: bool) -> str:
    """Return the output file of ``--server``. Raises UserInputError with options that the server decides."""
    if len(paths) != 1 or has_local_options:
        raise UserInputError(
            "--server: the server has its checkpoint and execution options. Give the output file alone, and no "
            "--steps, --mode, --sampler, --guidance, --trust, --weights, --precision, --compile or --graphs."
        )
    return paths[0]


def split_paths(paths: Sequence[str]) -> tuple[str, str]:
    """Return the checkpoint, by default the packaged model, and the output file.

    Raises UserInputError for another number of paths, and for one path that is not an mp4 file.
    """
    usage = "Use mfctl generate [CHECKPOINT] OUT.mp4"
    if len(paths) > 2:
        raise UserInputError(f"{len(paths)} paths are given: {' '.join(paths)}. {usage}")
    if len(paths) == 2:
        return paths[0], paths[1]
    if not paths[0].lower().endswith(".mp4"):
        raise UserInputError(f"the output file is missing: {paths[0]} does not end in .mp4. {usage}")
    return packaged.default_model(), paths[0]
