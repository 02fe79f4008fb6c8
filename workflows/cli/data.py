import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from workflows.cli import output
from workflows.cli.options import (
    ConfigFile,
    ConfigOverrides,
    DatasetUri,
    DryRunFlag,
    JsonFlag,
    Mp4Path,
    OutputPath,
    OverwriteFlag,
    parse_sizes,
)
from workflows.cli.traits import command
from workflows.utils import environment, progress

SOURCES_HELP = "Media files, folders, globs, s3:// prefixes, or manifests (csv, jsonl, parquet)."


@command(paths=("out",))
def toyworld(
    out: OutputPath,
    *,
    clips: Annotated[int, typer.Option(min=1, help="How many clips.")] = 256,
    seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 10.0,
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 64,
    fps: Annotated[int, typer.Option(help="Frames per second.")] = 24,
    sample_rate: Annotated[int, typer.Option(help="Audio samples per second.")] = 16000,
    seed: Annotated[int, typer.Option(help="Clip i depends on the seed and i alone.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Clips rendered side by side.")] = os.cpu_count() or 1,
    json: JsonFlag = False,
) -> None:
    """Write mp4 clips of talking characters with known truth."""

    def work() -> Any:
        from preprocessing.toyworld.world import write_toyworld

        with progress.progress_bar("toyworld") as show:
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

    output.run_command(work, as_json=json)


@command(paths=("sources", "out", "config"))
def preprocess(
    sources: Annotated[list[str], typer.Argument(parser=environment.resolve_path, metavar="SRC...", help=SOURCES_HELP)],
    out: DatasetUri,
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
    sets: ConfigOverrides,
    config: ConfigFile = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Cut media files into clips and encode them: a Parquet dataset of latents. The same command again resumes."""

    def work() -> Any:
        from preprocessing.config import PreprocessConfig
        from workflows.config.serialization import apply_overrides, load_config_file, parse_overrides
        from workflows.data.build import build_dataset as run_preprocess
        from workflows.data.codec_options import apply_codec_options, apply_sync_option, apply_transcript_option

        plain = apply_sync_option(apply_codec_options(PreprocessConfig(), codec_video, codec_audio, text), sync)
        plain = apply_transcript_option(plain, transcribe)
        written = apply_overrides(plain, load_config_file(config) if config else {})
        named = {"modality": modality, "sizes": sizes and parse_sizes(sizes, "--sizes"), "audio_track": audio_track}
        values = parse_overrides(sets) | {name: value for name, value in named.items() if value is not None}
        spent: dict[str, float] = {}
        counts = run_preprocess(sources, out, apply_overrides(written, values), dry_run=dry_run, spent=spent)
        if spent:  # something was done
            from workflows.data.inspect import log_dataset_to_mlflow

            counts["mlflow_run"] = log_dataset_to_mlflow(out, spent, environment.resolve_path("runs"))
        return counts

    output.run_command(work, as_json=json)


@command(paths=("dataset", "sheet"))
def inspect(
    dataset: DatasetUri,
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Check files, checksums and the accounting.")] = False,
    sheet: Annotated[
        str | None, typer.Option(parser=environment.resolve_path, metavar="PNG", help="Write a contact sheet.")
    ] = None,
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="Find clips that are alike; training leaves them out.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Counts, rejects by reason and statistics of a dataset."""

    def work() -> Any:
        from workflows.data.inspect import inspect_dataset as run_inspect

        return run_inspect(dataset, verify=verify, sheet=sheet, near_duplicates=near_duplicates)

    def render(summary: Any) -> str:
        from workflows.data.inspect import format_summary as table

        return table(summary)

    output.run_command(work, as_json=json, render=render)


@command(paths=("folder", "out"))
def manifest(
    layout: Annotated[str, typer.Argument(help="emilia, panda70m, speakervid or seamless.")],
    folder: Annotated[str, typer.Argument(parser=environment.resolve_path, metavar="FOLDER")],
    out: Annotated[str, typer.Argument(parser=environment.resolve_path, metavar="OUT.jsonl")],
    json: JsonFlag = False,
) -> None:
    """Make the manifest of a known corpus, for `mfctl preprocess OUT.jsonl DATASET`."""

    def work() -> Any:
        from preprocessing.sources.corpora import write_manifest

        return {"path": out, "rows": write_manifest(layout, folder, out)}

    output.run_command(work, as_json=json)


@command(paths=("dataset", "out"))
def reconstruct(
    dataset: DatasetUri,
    clip_id: Annotated[str, typer.Argument(metavar="CLIP_ID", help="A clip's id, as `mfctl inspect` lists it.")],
    out: Mp4Path,
    *,
    overwrite: OverwriteFlag = False,
    json: JsonFlag = False,
) -> None:
    """Decode a row of a dataset back to a playable file."""

    def work() -> Any:
        from workflows.data.reconstruct import reconstruct_clip as run_reconstruct

        return run_reconstruct(dataset, clip_id, out, overwrite)

    output.run_command(work, as_json=json)
