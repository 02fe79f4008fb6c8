from typing import Annotated, Any, Literal

import typer

from workflows.cli import output
from workflows.cli.options import CheckpointPath, JsonFlag, Mp4Path, OverwriteFlag
from workflows.cli.traits import command
from workflows.utils import environment


@command(driver_only=True, paths=("checkpoint", "out", "first_frame", "voice"))
def generate(
    checkpoint: CheckpointPath,
    out: Mp4Path,
    *,
    first_frame: Annotated[
        str | None, typer.Option(parser=environment.resolve_path, metavar="IMAGE", help="The clip begins with it.")
    ] = None,
    transcript: Annotated[
        str | None, typer.Option(metavar="TEXT|JSON", help="Words, or a JSON file with times.")
    ] = None,
    caption: Annotated[str, typer.Option(help="What is to be seen and heard.")] = "",
    voice: Annotated[
        str | None, typer.Option(parser=environment.resolve_path, metavar="CLIP", help="Speak as in this clip.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of the clip.")] = 10.0,
    steps: Annotated[int | None, typer.Option(help="Solver steps per chunk; default: as the mode needs.")] = None,
    mode: Annotated[
        Literal["few", "multi"] | None, typer.Option(help="Which of the model's two modes; default: as its stage can.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight of the multi-step mode.")] = None,
    trust: Annotated[float | None, typer.Option(help="How far history is taken for generated; 0: as real.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    weights: Annotated[Literal["ema", "raw"], typer.Option(help="Which weights of the checkpoint.")] = "ema",
    precision: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Of weights and products; default: bf16 on CUDA, else fp32.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Blocks through torch.compile.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="On a GPU: a chunk's passes as CUDA graphs.")] = False,
    overwrite: OverwriteFlag = False,
    json: JsonFlag = False,
) -> None:
    """Stream a clip chunk by chunk from a checkpoint into an mp4 file."""

    def work() -> Any:
        from workflows.inference.generate import generate_clip as run_generate

        return run_generate(
            checkpoint,
            first_frame=first_frame,
            transcript=transcript,
            caption=caption,
            voice=voice,
            seconds=seconds,
            steps=steps,
            mode=mode,
            guidance=guidance,
            trust=trust,
            seed=seed,
            out=out,
            weights=weights,
            precision=precision,
            compile=compile,
            graphs=graphs,
            overwrite=overwrite,
        )

    output.run_command(work, as_json=json)
