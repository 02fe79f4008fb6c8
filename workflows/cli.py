"""The command line. Each verb reads its arguments and calls one function, imported inside the verb.

`mfctl --help` therefore loads neither torch nor Ray, and a verb works where another one's libraries are missing.

Exit codes: 0 done, 1 failed, 2 wrong usage or wrong input. See ``console.py`` for what is printed where.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from workflows import cli_bench, cli_cluster, cli_evaluate, cli_study, console, environment
from workflows.options import (
    Checkpoint,
    Config,
    Dataset,
    DryRun,
    Json,
    Mp4,
    Out,
    Overwrite,
    Preset,
    Sets,
    pairs,
)

app = typer.Typer(
    name="mfctl",
    help="Mutual Forcing: media files in, a streaming audio-video model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEMO = "runs/demo"
SOURCES = "Media files, folders, globs, s3:// prefixes, or manifests (csv, jsonl, parquet)."


@app.command()
def doctor(*, json: Json = False) -> None:
    """Say what works on this machine, and what to type for what does not."""
    from workflows import doctor as checks

    console.run(checks.doctor, as_json=json, render=checks.render, code=lambda report: 0 if report["ok"] else 1)


@app.command()
def demo(
    *,
    out: Annotated[str, typer.Option(parser=environment.absolute, help="Folder of everything the story makes.")] = DEMO,
    json: Json = False,
) -> None:
    """The whole story on the toy world: clips, dataset, four trained stages, samples, sweep. Under ten minutes."""

    def work() -> Any:
        from workflows.demo import demo as run_demo

        return run_demo(out)

    console.run(work, as_json=json, render=lambda _: f"summary: {out}/summary.json")


@app.command()
def toyworld(
    out: Out,
    *,
    clips: Annotated[int, typer.Option(min=1, help="How many clips.")] = 256,
    seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 10.0,
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 64,
    fps: Annotated[int, typer.Option(help="Frames per second.")] = 24,
    sample_rate: Annotated[int, typer.Option(help="Audio samples per second.")] = 16000,
    seed: Annotated[int, typer.Option(help="Clip i depends on the seed and i alone.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Clips rendered side by side.")] = os.cpu_count() or 1,
    json: Json = False,
) -> None:
    """Write mp4 clips of talking characters with known truth."""

    def work() -> Any:
        from preprocessing.toyworld import write_toyworld

        with console.progress("toyworld") as show:
            written = write_toyworld(
                Path(out),
                clips=clips,
                seconds=seconds,
                size=size,
                fps=fps,
                sample_rate=sample_rate,
                seed=seed,
                jobs=jobs,
                progress_callback=show,
            )
        return {"path": out, "clips": len(written), "hours": len(written) * seconds / 3600}

    console.run(work, as_json=json)


@app.command()
def preprocess(
    sources: Annotated[list[str], typer.Argument(parser=environment.absolute, metavar="SRC...", help=SOURCES)],
    out: Dataset,
    *,
    modality: Annotated[Literal["paired", "video", "audio"] | None, typer.Option(help="What a clip must have.")] = None,
    sizes: Annotated[
        str | None, typer.Option(metavar="HxW,HxW", help="Sizes of pictures; each source gets the nearest shape.")
    ] = None,
    audio_track: Annotated[
        int | None, typer.Option(min=0, help="Which sound of a file, 0 the first; default: the one it marks.")
    ] = None,
    codec_video: Annotated[str | None, typer.Option(metavar="dct|wan:DIR", help="Video codec; default: dct.")] = None,
    codec_audio: Annotated[str | None, typer.Option(metavar="mel|oobleck:DIR", help="Audio codec.")] = None,
    text: Annotated[str | None, typer.Option(metavar="words|t5:DIR", help="Encoder of captions and words.")] = None,
    sync: Annotated[
        str | None, typer.Option(metavar="motion|syncnet:FILE|off", help="Sync filter; default: motion, recorded only.")
    ] = None,
    transcribe: Annotated[
        str | None, typer.Option(metavar="whisper:DIR|off", help="What hears words that no file brings; default: off.")
    ] = None,
    sets: Sets,
    config: Config = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Cut media files into clips and encode them: a Parquet dataset of latents. The same command again resumes."""

    def work() -> Any:
        from preprocessing.config import PreprocessConfig
        from workflows.config_io import change, parse_sets, read_file
        from workflows.preprocess import preprocess as run_preprocess
        from workflows.preprocess import with_codecs, with_sync, with_transcripts

        plain = with_sync(with_codecs(PreprocessConfig(), codec_video, codec_audio, text), sync)
        plain = with_transcripts(plain, transcribe)
        written = change(plain, read_file(config) if config else {})
        named = {"modality": modality, "sizes": sizes and pairs(sizes, "--sizes"), "audio_track": audio_track}
        values = parse_sets(sets) | {name: value for name, value in named.items() if value is not None}
        spent: dict[str, float] = {}
        counts = run_preprocess(sources, out, change(written, values), dry_run=dry_run, spent=spent)
        if spent:  # something was done
            from workflows.inspection import record

            counts["mlflow_run"] = record(out, spent, environment.absolute("runs"))
        return counts

    console.run(work, as_json=json)


@app.command()
def inspect(
    dataset: Dataset,
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Check files, checksums and the accounting.")] = False,
    sheet: Annotated[
        str | None, typer.Option(parser=environment.absolute, metavar="PNG", help="Write a contact sheet.")
    ] = None,
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="Find clips that are alike; training leaves them out.")
    ] = False,
    json: Json = False,
) -> None:
    """Counts, rejects by reason and statistics of a dataset."""

    def work() -> Any:
        from workflows.inspection import inspect as run_inspect

        return run_inspect(dataset, verify=verify, sheet=sheet, near_duplicates=near_duplicates)

    def render(summary: Any) -> str:
        from workflows.inspection import render as table

        return table(summary)

    console.run(work, as_json=json, render=render)


@app.command()
def manifest(
    layout: Annotated[str, typer.Argument(help="emilia, panda70m, speakervid or seamless.")],
    folder: Annotated[str, typer.Argument(parser=environment.absolute, metavar="FOLDER")],
    out: Annotated[str, typer.Argument(parser=environment.absolute, metavar="OUT.jsonl")],
    json: Json = False,
) -> None:
    """Make the manifest of a known corpus, for `mfctl preprocess OUT.jsonl DATASET`."""

    def work() -> Any:
        from preprocessing.corpora import write_manifest

        return {"path": out, "rows": write_manifest(layout, folder, out)}

    console.run(work, as_json=json)


@app.command()
def reconstruct(
    dataset: Dataset,
    clip_id: Annotated[str, typer.Argument(metavar="CLIP_ID", help="A clip's id, as `mfctl inspect` lists it.")],
    out: Mp4,
    *,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Decode a row of a dataset back to a playable file."""

    def work() -> Any:
        from workflows.preprocess import reconstruct as run_reconstruct

        return run_reconstruct(dataset, clip_id, out, overwrite)

    console.run(work, as_json=json)


@app.command()
def train(
    *,
    stage: Annotated[Literal["video", "audio", "joint", "mutual"], typer.Option(help="What to train.")],
    data: Annotated[
        str | None,
        typer.Option(parser=environment.absolute, metavar="DATASET", help="Default: the newest dataset under runs/."),
    ] = None,
    init_from: Annotated[
        list[str],
        typer.Option(
            "--from",
            parser=environment.absolute_if_present,
            metavar="RUN",
            default_factory=list,
            show_default=False,
            help="Finished runs to start from; default: the latest ones under runs/. May be repeated.",
        ),
    ],
    init_video_from: Annotated[
        str | None,
        typer.Option(
            parser=environment.absolute, metavar="DIR", help="Start from Wan's video weights in this folder (base)."
        ),
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run; the same name resumes.")] = None,
    preset: Preset = "tiny",
    sets: Sets,
    config: Config = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train one stage on Ray Train and DeepSpeed. The same command again resumes."""

    def work() -> Any:
        from json import dumps as quoted

        from workflows.train import train as run_train
        from workflows.training.samples import training_samples

        return run_train(
            stage,
            data=data,
            init_from=init_from,
            preset=preset,
            sets=[*sets, *([f"init_video={quoted(init_video_from)}"] if init_video_from else [])],
            config_file=config,
            run=run,
            dry_run=dry_run,
            sample=training_samples,
        )

    console.run(work, as_json=json)


@app.command()
def generate(
    checkpoint: Checkpoint,
    out: Mp4,
    *,
    first_frame: Annotated[
        str | None, typer.Option(parser=environment.absolute, metavar="IMAGE", help="The clip begins with it.")
    ] = None,
    transcript: Annotated[
        str | None, typer.Option(metavar="TEXT|JSON", help="Words, or a JSON file with times.")
    ] = None,
    caption: Annotated[str, typer.Option(help="What is to be seen and heard.")] = "",
    voice: Annotated[
        str | None, typer.Option(parser=environment.absolute, metavar="CLIP", help="Speak as in this clip.")
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
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Stream a clip chunk by chunk from a checkpoint into an mp4 file."""

    def work() -> Any:
        from workflows.generate import generate as run_generate

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

    console.run(work, as_json=json)


@app.command()
def mlflow(
    *,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 5000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and stop.")] = False,
) -> None:
    """Open MLflow on the store of our runs: MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    store = environment.tracking_uri()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--host", host, "--port", str(port)]
    if dry_run:
        print(shlex.join(command))
        return
    print(
        f"MLflow on http://{host}:{port}, store {store}; Ctrl-C ends it. "
        "Charts: choose 'Model training' at the top left, the browser remembers it",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, command)


app.command()(cli_evaluate.evaluate)
app.command()(cli_study.study)
app.add_typer(cli_bench.app)
app.add_typer(cli_cluster.app)


def main() -> None:
    """Entry point of `mfctl` and of `python -m workflows.cli`."""
    environment.apply_defaults()
    environment.enter_base_directory()
    app(prog_name="mfctl")


if __name__ == "__main__":
    main()
