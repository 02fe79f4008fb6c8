"""Commands that make, inspect and decode datasets."""

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

MODELS = "Codecs and models"
CPUS = os.cpu_count() or 1
SOURCES_HELP = "Media files, folders, globs, s3:// prefixes or manifests (csv, jsonl, parquet)."


Clips = Annotated[int, typer.Option(min=1, max=10_000_000, help="Number of clips.")]
Seconds = Annotated[float, typer.Option(help="Length of a clip in seconds.")]
Size = Annotated[int, typer.Option(help="Width and height in pixels.")]
Fps = Annotated[int, typer.Option(help="Frames per second.")]
SampleRate = Annotated[int, typer.Option(help="Audio samples per second.")]
Seed = Annotated[int, typer.Option(help="Seed; clip i is a function of the seed and i.")]
Voice = Annotated[
    Literal["syllables", "english"],
    typer.Option(help="Invented syllables, or English sentences, which need the program flite."),
]
HeldOut = Annotated[
    bool, typer.Option("--held-out", help="Speak the English sentences that no training world contains.")
]
Jobs = Annotated[int, typer.Option(min=1, max=1024, show_default="number of CPUs", help="Concurrent renderers.")]


@command(paths=("out",))
def toyworld(
    out: OutputPath,
    *,
    clips: Clips = 256,
    seconds: Seconds = 10.0,
    size: Size = 64,
    fps: Fps = 24,
    sample_rate: SampleRate = 16000,
    seed: Seed = 0,
    voice: Voice = "syllables",
    held_out: HeldOut = False,
    jobs: Jobs = CPUS,
    json: JsonFlag = False,
) -> None:
    """Write mp4 clips of talking characters with known truth.

    Example: mfctl toyworld clips --clips 64 --seconds 5
    """

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
                voice=voice,
                held_out=held_out,
                jobs=jobs,
                progress_callback=show,
            )
        return {"path": out, "clips": len(written), "hours": len(written) * seconds / 3600}

    output.run_command(work, as_json=json)


Sources = Annotated[list[str], typer.Argument(parser=environment.resolve_path, metavar="SRC...", help=SOURCES_HELP)]
Modality = Annotated[
    Literal["paired", "video", "audio"] | None,
    typer.Option(show_default="paired", help="Required streams of a clip."),
]
Sizes = Annotated[
    str | None,
    typer.Option(
        metavar="HxW,HxW",
        show_default="64x64",
        help="Sizes of encoded frames in pixels; each source gets the nearest shape.",
    ),
]
AudioTrack = Annotated[
    int | None,
    typer.Option(min=0, show_default="the one that the file marks", help="Audio stream of each file; 0 is the first."),
]
CodecVideo = Annotated[
    str | None,
    typer.Option(metavar="dct|wan:DIR", rich_help_panel=MODELS, show_default="dct", help="Video codec."),
]
CodecAudio = Annotated[
    str | None,
    typer.Option(metavar="mel|oobleck:DIR", rich_help_panel=MODELS, show_default="mel", help="Audio codec."),
]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="words|t5:DIR",
        rich_help_panel=MODELS,
        show_default="words",
        help="Text encoder of captions and transcripts.",
    ),
]
Sync = Annotated[
    str | None,
    typer.Option(
        metavar="motion|syncnet:FILE|off",
        rich_help_panel=MODELS,
        show_default="motion, recorded only",
        help="Estimator of the A/V offset.",
    ),
]
Transcribe = Annotated[
    str | None,
    typer.Option(
        metavar="whisper:DIR|off",
        rich_help_panel=MODELS,
        show_default="off",
        help="ASR model for clips without a transcript.",
    ),
]


@command(paths=("sources", "out", "config"))
def preprocess(
    sources: Sources,
    out: DatasetUri,
    *,
    modality: Modality = None,
    sizes: Sizes = None,
    audio_track: AudioTrack = None,
    codec_video: CodecVideo = None,
    codec_audio: CodecAudio = None,
    text: Text = None,
    sync: Sync = None,
    transcribe: Transcribe = None,
    caption: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|measured",
            rich_help_panel=MODELS,
            show_default="off",
            help="Captions of clips without one: vision-language model, or a sentence from measured values.",
        ),
    ] = None,
    people: Annotated[
        bool,
        typer.Option(
            "--people",
            rich_help_panel=MODELS,
            help="Select clips in which one person speaks, and crop them to the face (extra: people).",
        ),
    ] = False,
    sets: ConfigOverrides,
    config: ConfigFile = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Cut media files into clips and encode them into a Parquet dataset. Rerun the same command to resume.

    Example: mfctl preprocess clips runs/toy --sizes 64x64 --dry-run
    """

    def work() -> Any:
        from preprocessing.config import PreprocessConfig
        from workflows.config.serialization import apply_overrides, load_config_file, parse_overrides
        from workflows.data.build import build_dataset
        from workflows.data.codec_options import (
            apply_caption_option,
            apply_codec_options,
            apply_people_option,
            apply_sync_option,
            apply_transcript_option,
        )

        plain = apply_sync_option(apply_codec_options(PreprocessConfig(), codec_video, codec_audio, text), sync)
        plain = apply_people_option(apply_transcript_option(plain, transcribe), people)
        plain = apply_caption_option(plain, caption)
        written = apply_overrides(plain, load_config_file(config) if config else {})
        named = {"modality": modality, "sizes": sizes and parse_sizes(sizes, "--sizes"), "audio_track": audio_track}
        values = parse_overrides(sets) | {name: value for name, value in named.items() if value is not None}
        spent: dict[str, float] = {}
        counts = build_dataset(sources, out, apply_overrides(written, values), dry_run=dry_run, spent=spent)
        if spent:  # at least one unit was processed
            from workflows.data.inspect import log_dataset_to_mlflow

            counts["mlflow_run"] = log_dataset_to_mlflow(out, spent, environment.resolve_path("runs"))
        return counts

    output.run_command(work, as_json=json)


@command(paths=("dataset", "sheet"))
def inspect(
    dataset: DatasetUri,
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute checksums and counts from the files.")] = False,
    sheet: Annotated[
        str | None,
        typer.Option(parser=environment.resolve_path, metavar="PNG", help="New file for a contact sheet of the clips."),
    ] = None,
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="Find near-duplicate clips; training skips them.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Print counts, rejects by reason and statistics of a dataset.

    Example: mfctl inspect runs/toy --verify
    """

    def work() -> Any:
        from workflows.data.inspect import inspect_dataset

        return inspect_dataset(dataset, verify=verify, sheet=sheet, near_duplicates=near_duplicates)

    def render(summary: Any) -> str:
        from workflows.data.inspect import format_summary

        return format_summary(summary)

    output.run_command(work, as_json=json, render=render)


@command(paths=("folder", "out"))
def manifest(
    layout: Annotated[str, typer.Argument(metavar="LAYOUT", help="Corpus: emilia, panda70m, speakervid or seamless.")],
    folder: Annotated[
        str, typer.Argument(parser=environment.resolve_path, metavar="FOLDER", help="Folder of the corpus.")
    ],
    out: Annotated[
        str, typer.Argument(parser=environment.resolve_path, metavar="OUT.jsonl", help="New manifest file.")
    ],
    json: JsonFlag = False,
) -> None:
    """Write the manifest of a known corpus, a source of `mfctl preprocess`.

    Example: mfctl manifest emilia corpora/emilia emilia.jsonl
    """

    def work() -> Any:
        from preprocessing.sources.corpora import write_manifest

        return {"path": out, "rows": write_manifest(layout, folder, out)}

    output.run_command(work, as_json=json)


@command(paths=("dataset", "out"))
def reconstruct(
    dataset: DatasetUri,
    clip_id: Annotated[str, typer.Argument(metavar="CLIP_ID", help="Id of a clip.")],
    out: Mp4Path,
    *,
    overwrite: OverwriteFlag = False,
    json: JsonFlag = False,
) -> None:
    """Decode one clip of a dataset into an mp4 file.

    Example: mfctl reconstruct runs/toy CLIP_ID clip.mp4
    """

    def work() -> Any:
        from workflows.data.reconstruct import reconstruct_clip

        return reconstruct_clip(dataset, clip_id, out, overwrite)

    output.run_command(work, as_json=json)
