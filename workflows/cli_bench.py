"""The verbs of ``mfctl bench``: speed on this hardware, against the limits. Part of the command line in ``cli.py``."""

from typing import Annotated, Any, Literal

import typer

from workflows import console
from workflows.options import Json, Preset, Sets

app = typer.Typer(name="bench", help="Speed on this hardware, against the limits.", no_args_is_help=True)

ALL = "bare,ray_torch,ray_zero0,ray_zero1,ray_zero2,ray_zero3"


@app.command("train")
def train(
    *,
    preset: Preset = "tiny",
    stage: Annotated[Literal["video", "audio", "joint", "mutual"], typer.Option(help="Whose step.")] = "joint",
    workers: Annotated[int, typer.Option(help="Processes: one per GPU, or CPU processes that share the cores.")] = 1,
    tokens: Annotated[int, typer.Option(help="Latent tokens per rank and step, at least.")] = 3000,
    rounds: Annotated[int, typer.Option(help="How often every variant has its turn.")] = 5,
    turn: Annotated[int, typer.Option(help="Steps of a turn.")] = 3,
    variants: Annotated[str, typer.Option(metavar="A,B", help="Which variants, besides the bare loop.")] = ALL,
    profile: Annotated[bool, typer.Option("--profile", help="Show where bare and last variant spend time.")] = False,
    sets: Sets,
    json: Json = False,
) -> None:
    """Step time of a bare torch loop, of TorchEngine and of DeepSpeed under Ray Train, interleaved in one run."""

    def work() -> Any:
        from workflows.bench.train import bench_train

        return bench_train(
            stage=stage,
            preset=preset,
            workers=workers,
            tokens=tokens,
            rounds=rounds,
            turn=turn,
            variants=variants.split(","),
            profile=profile,
            sets=sets,
        )

    def render(result: Any) -> str:
        from workflows.bench.train import render as table

        return table(result)

    console.run(work, as_json=json, render=render)
