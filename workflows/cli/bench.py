"""The verbs of ``mfctl bench``: speed on this hardware, against the limits. Part of the command line in ``cli.py``."""

import os
from typing import Annotated, Any, Literal

import typer

from workflows.cli import output
from workflows.cli.options import ConfigOverrides, JsonFlag, PresetName, parse_ints, parse_size, parse_sizes
from workflows.cli.traits import command
from workflows.config.stage_names import Stage
from workflows.utils import environment

app = typer.Typer(name="bench", help="Speed on this hardware, against the limits.", no_args_is_help=True)

DEFAULT_VARIANTS = "bare,ray_torch,ray_zero0,ray_zero1,ray_zero2,ray_zero3"


@app.command("train")
def train(
    *,
    preset: PresetName = "tiny",
    stage: Annotated[Stage, typer.Option(help="Whose step.")] = "joint",
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Picture; default 64x64 or 192x336.")] = None,
    workers: Annotated[int, typer.Option(help="Processes: one per GPU, or CPU processes that share the cores.")] = 1,
    tokens: Annotated[int, typer.Option(help="Latent tokens per rank and step, at least.")] = 3000,
    rounds: Annotated[int, typer.Option(help="How often every variant has its turn.")] = 5,
    turn: Annotated[int, typer.Option(help="Steps of a turn.")] = 3,
    variants: Annotated[
        str, typer.Option(metavar="A,B", help="Which variants, besides the bare loop.")
    ] = DEFAULT_VARIANTS,
    profile: Annotated[bool, typer.Option("--profile", help="Show where bare and last variant spend time.")] = False,
    sets: ConfigOverrides,
    json: JsonFlag = False,
) -> None:
    """Step time of a bare torch loop, of TorchEngine and of DeepSpeed under Ray Train, interleaved in one run."""

    def work() -> Any:
        from workflows.bench.train import bench_train

        return bench_train(
            stage=stage,
            preset=preset,
            size=None if size is None else parse_size(size, "--size"),
            workers=workers,
            tokens=tokens,
            rounds=rounds,
            turn=turn,
            variants=variants.split(","),
            profile=profile,
            sets=sets,
        )

    def render(result: Any) -> str:
        from workflows.bench.train import format_table as table

        return table(result)

    output.run_command(work, as_json=json, render=render)


@app.command("stream")
def stream(
    *,
    preset: PresetName = "tiny",
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Picture; default 64x64 or 192x336.")] = None,
    steps: Annotated[int, typer.Option(help="Evaluations of the network per chunk.")] = 4,
    chunks: Annotated[int, typer.Option(help="Chunks of the long stream.")] = 500,
    rounds: Annotated[int, typer.Option(help="Of what is measured in turns.")] = 15,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Default: CUDA where there is one.")] = None,
    precision: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="Default: bf16 on CUDA.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Blocks through torch.compile.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Passes over a chunk as CUDA graphs.")] = False,
    sets: ConfigOverrides,
    json: JsonFlag = False,
) -> None:
    """Frames per second of streaming with random weights, and whether that stays so for ever."""

    def work() -> Any:
        from workflows.bench.stream import bench_stream

        return bench_stream(
            preset=preset,
            size=None if size is None else parse_size(size, "--size"),
            steps=steps,
            chunks=chunks,
            rounds=rounds,
            device=device,
            precision=precision,
            compile=compile,
            graphs=graphs,
            sets=sets,
        )

    def render(result: Any) -> str:
        from workflows.bench.stream import format_table as table

        return table(result)

    output.run_command(work, as_json=json, render=render)


@app.command("preprocess")
@command(paths=("folder",))
def preprocess(
    folder: Annotated[
        str | None,
        typer.Argument(parser=environment.resolve_path, metavar="DIR", help="Media files; a minute or more each."),
    ] = None,
    *,
    rounds: Annotated[int, typer.Option(min=1, help="How often every way has its turn.")] = 3,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per CPU.")] = None,
    size: Annotated[str, typer.Option(metavar="HxW", help="Size of the encoded picture.")] = "144x256",
    plain: Annotated[bool, typer.Option(help="Also a plain Ray Data pipeline.")] = True,
    memory: Annotated[
        str | None, typer.Option(metavar="FEW,MANY", help="Instead: memory for so many made-up clips, e.g. 500,10000.")
    ] = None,
    sets: ConfigOverrides,
    json: JsonFlag = False,
) -> None:
    """Speed of preprocessing against ffmpeg alone and a plain Ray Data pipeline, interleaved in one run."""

    def work() -> Any:
        from preprocessing.config import PreprocessConfig
        from workflows.bench import preprocess_memory as growth
        from workflows.bench.preprocess import bench_preprocess
        from workflows.config.serialization import apply_overrides, parse_overrides

        processes = workers or os.cpu_count() or 1
        if memory is not None:
            few, many = sorted(parse_ints(memory, "--memory", least=1))
            return growth.bench_memory(few=few, many=many, workers=processes)
        if not folder:
            raise ValueError("name a folder of media files, or --memory FEW,MANY")
        config = apply_overrides(PreprocessConfig(), {"sizes": parse_sizes(size, "--size")} | parse_overrides(sets))
        return bench_preprocess(folder, config=config, workers=processes, rounds=rounds, with_plain=plain)

    def render(result: Any) -> str:
        from workflows.bench import preprocess_memory as growth
        from workflows.bench.preprocess import format_table as table

        return growth.format_table(result) if memory is not None else table(result)

    output.run_command(work, as_json=json, render=render)
