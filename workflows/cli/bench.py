"""`mfctl bench`: measure speed on this hardware next to its limits."""

import os
from typing import Annotated, Any, Literal

import typer

from mfcore.errors import UserInputError
from workflows.checkpoints import packaged
from workflows.cli import output
from workflows.cli.errors import FAILED
from workflows.cli.options import (
    ConfigOverrides,
    Device,
    JsonFlag,
    OptionalCheckpoint,
    PresetName,
    SolverSteps,
    parse_ints,
    parse_size,
    parse_sizes,
)
from workflows.cli.traits import command
from workflows.config.stage_names import Stage
from workflows.utils import environment

app = typer.Typer(name="bench", help="Measure speed on this hardware next to its limits.", no_args_is_help=True)

MEASUREMENT = "Measurement"
EXECUTION = "Execution"
FrameSize = Annotated[
    str | None,
    typer.Option(
        metavar="HxW", show_default="64x64 for tiny, 96x96 for toy, else 192x336", help="Frame size in pixels."
    ),
]
Rounds = Annotated[
    int, typer.Option(min=1, rich_help_panel=MEASUREMENT, help="Interleaved measurement rounds of each variant.")
]
DEFAULT_VARIANTS = "bare,ray_torch,ray_zero0,ray_zero1,ray_zero2,ray_zero3"


@app.command("train")
def train(
    *,
    preset: PresetName = "tiny",
    stage: Annotated[Stage, typer.Option(help="Training stage to time.")] = "joint",
    size: FrameSize = None,
    workers: Annotated[int, typer.Option(help="Processes: one per GPU, or CPU processes.")] = 1,
    tokens: Annotated[
        int, typer.Option(rich_help_panel=MEASUREMENT, help="Minimum latent tokens per rank and step.")
    ] = 3000,
    rounds: Rounds = 5,
    turn: Annotated[int, typer.Option(rich_help_panel=MEASUREMENT, help="Optimizer steps per round.")] = 3,
    variants: Annotated[
        str, typer.Option(metavar="A,B", rich_help_panel=MEASUREMENT, help="Variants to compare with the bare loop.")
    ] = DEFAULT_VARIANTS,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", rich_help_panel=MEASUREMENT, help="Print a profile of the first and the last variant."
        ),
    ] = False,
    sets: ConfigOverrides,
    json: JsonFlag = False,
) -> None:
    """Measure the step time of a bare torch loop, of TorchEngine and of DeepSpeed under Ray Train.

    All variants run interleaved.

    Example: mfctl bench train --stage joint --preset tiny --rounds 3
    """

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
        from workflows.bench.train import format_table

        return format_table(result)

    output.run_command(work, as_json=json, render=render)


@app.command("stream")
def stream(
    *,
    preset: PresetName = "tiny",
    size: FrameSize = None,
    steps: Annotated[int, typer.Option(help="Network evaluations per chunk.")] = 4,
    chunks: Annotated[int, typer.Option(rich_help_panel=MEASUREMENT, help="Chunks of the long stream.")] = 500,
    rounds: Rounds = 15,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(rich_help_panel=EXECUTION, show_default="cuda if available", help="Device."),
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(
            rich_help_panel=EXECUTION,
            show_default="bf16 on CUDA, else fp32",
            help="Precision of weights and products.",
        ),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option("--compile", rich_help_panel=EXECUTION, help="Compile transformer blocks with torch.compile."),
    ] = False,
    graphs: Annotated[
        bool, typer.Option("--graphs", rich_help_panel=EXECUTION, help="Run the passes of a chunk as CUDA graphs.")
    ] = False,
    sets: ConfigOverrides,
    json: JsonFlag = False,
) -> None:
    """Measure streaming with random weights: speed, latency, and the cost of a chunk over time.

    Example: mfctl bench stream --preset tiny --chunks 100
    """

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
        from workflows.bench.stream_table import format_table

        return format_table(result)

    output.run_command(work, as_json=json, render=render)


@app.command("gpu")
@command(driver_only=True, paths=("out",))
def gpu(
    *,
    out: Annotated[
        str,
        typer.Option(parser=environment.resolve_path, metavar="DIR", help="Folder of the results: four files."),
    ],
    minutes: Annotated[float, typer.Option(help="Time of this command, in minutes.")] = 8.0,
    parts: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            show_default="all",
            rich_help_panel=MEASUREMENT,
            help="Parts: facts, parity, stream, train, study, profile.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default="full for streaming, base for training",
            rich_help_panel=MEASUREMENT,
            help="Network of all parts: tiny for a rehearsal.",
        ),
    ] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(rich_help_panel=EXECUTION, help="Device.")] = "cuda",
    json: JsonFlag = False,
) -> None:
    """Measure one GPU: parity, streaming, training, study steps, profiles. The same command continues.

    Each part is a process with its own time limit. Results are written as soon as they are measured.

    Example: mfctl bench gpu --minutes 8 --out runs/gpu
    """

    def work() -> Any:
        from workflows.bench.gpu.command import bench_gpu

        names = None if parts is None else [name.strip() for name in parts.split(",")]
        return bench_gpu(out=out, minutes=minutes, device=device, preset=preset, parts=names)

    def render(result: Any) -> str:
        from workflows.bench.gpu.command import format_table

        return format_table(result)

    output.run_command(work, as_json=json, render=render, code=lambda result: FAILED if result["failed"] else 0)


@app.command("serve")
@command(driver_only=True, paths=("checkpoint",))
def serve(
    checkpoint: OptionalCheckpoint = None,
    *,
    sessions: Annotated[
        str, typer.Option(metavar="N,M", rich_help_panel=MEASUREMENT, help="Numbers of sessions to measure.")
    ] = "1,2,4",
    seconds: Annotated[
        float, typer.Option(rich_help_panel=MEASUREMENT, help="Seconds of each clip; each is made twice.")
    ] = 20.0,
    rounds: Rounds = 10,
    steps: SolverSteps = None,
    device: Device = None,
    json: JsonFlag = False,
) -> None:
    """Measure a live server with clients on this machine: first chunk, chunk period, texts, batched sessions.

    Example: mfctl bench serve runs/mutual --sessions 1,4
    """

    def work() -> Any:
        from workflows.serving.benchmark import bench_serve
        from workflows.serving.talker import Talker

        counts = parse_ints(sessions, "--sessions", least=1)
        path = checkpoint or packaged.default_model()
        talker = Talker.from_checkpoint(path, name=os.path.basename(path), steps=steps, device=device)
        return bench_serve(talker, sessions=counts, seconds=seconds, rounds=rounds)

    def render(result: Any) -> str:
        from workflows.serving.benchmark import format_table

        return format_table(result)

    output.run_command(work, as_json=json, render=render)


@app.command("preprocess")
@command(paths=("folder",))
def preprocess(
    folder: Annotated[
        str | None,
        typer.Argument(
            parser=environment.resolve_path, metavar="DIR", help="Folder of media files, a minute or longer each."
        ),
    ] = None,
    *,
    rounds: Rounds = 3,
    workers: Annotated[int | None, typer.Option(min=1, show_default="one per CPU", help="Processes.")] = None,
    size: Annotated[str, typer.Option(metavar="HxW", help="Frame size in pixels.")] = "144x256",
    plain: Annotated[
        bool, typer.Option(rich_help_panel=MEASUREMENT, help="Also measure a plain Ray Data pipeline.")
    ] = True,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="FEW,MANY",
            rich_help_panel=MEASUREMENT,
            help="Instead: memory for two numbers of synthetic clips, e.g. 500,10000.",
        ),
    ] = None,
    encoder: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0.001,
            rich_help_panel=MEASUREMENT,
            help="Instead: how busy a stand-in encoder of so many seconds per clip is behind the workers.",
        ),
    ] = None,
    sets: ConfigOverrides,
    json: JsonFlag = False,
) -> None:
    """Measure preprocessing next to ffmpeg alone and a plain Ray Data pipeline, interleaved in one run.

    Example: mfctl bench preprocess clips --workers 2
    """

    def work() -> Any:
        from preprocessing.config import PreprocessConfig
        from workflows.bench import encoder_pool, preprocess_memory
        from workflows.bench.preprocess import bench_preprocess
        from workflows.config.serialization import apply_overrides, parse_overrides

        processes = workers or os.cpu_count() or 1
        if memory is not None:
            few, many = sorted(parse_ints(memory, "--memory", least=1))
            return preprocess_memory.bench_memory(few=few, many=many, workers=processes)
        if not folder:
            raise UserInputError("name a folder of media files, or --memory FEW,MANY")
        config = apply_overrides(PreprocessConfig(), {"sizes": parse_sizes(size, "--size")} | parse_overrides(sets))
        if encoder is not None:
            return encoder_pool.bench_encoder_pool(folder, config=config, decoders=processes, seconds=encoder)
        return bench_preprocess(folder, config=config, workers=processes, rounds=rounds, with_plain=plain)

    def render(result: Any) -> str:
        from workflows.bench import encoder_pool, preprocess_memory
        from workflows.bench.preprocess import format_table

        if encoder is not None:
            return encoder_pool.format_table(result)
        return preprocess_memory.format_table(result) if memory is not None else format_table(result)

    output.run_command(work, as_json=json, render=render)
