"""Summary of a dataset: counts, rejects with examples, histograms, contact sheet; also as a run in MLflow."""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mfcore.errors import UserInputError
from mfcore.types import AUDIO, VIDEO
from preprocessing.dataset.near_duplicates import find_duplicates
from preprocessing.dataset.reader import ClipDataset, excluded_ids, open_dataset, read_metadata_json
from preprocessing.dataset.units import read_markers, read_units, sum_counts
from preprocessing.dataset.units import verify_dataset as verify_files
from preprocessing.io.hashing import canonical_json
from preprocessing.io.storage import Store, local_copy
from preprocessing.media.decoder import Decoder
from preprocessing.media.probe import MediaError, probe
from preprocessing.sources.discovery import split_fragment
from workflows.config.serialization import diff, flatten
from workflows.data.build import dataset_counts
from workflows.data.reconstruct import decode_latents
from workflows.tracking.mlflow_tracker import open_tracker
from workflows.utils import figures
from workflows.utils.environment import hide_passwords, tracking_uri

HISTOGRAM_COLUMNS = {"duration_sec": "duration, s", "source_fps": "frames per second of the source",
           "sync_offset_sec": "sound after picture, s", "loudness_db": "loudness, dBFS",
           "face_pixels": "face, pixels of the source", "face_frontal_share": "share of frontal frames",
           "face_sharpness": "sharpness of the face", "face_inside_share": "share of whole faces in crops",
           "speech_seconds": "speech, s", "speech_quality": "DNSMOS, 1 to 5",
           "voice_similarity": "similarity of both voice halves"}  # fmt: skip
BINS = 20
EXAMPLES = 3  # per reason
SHEET_ACCEPTED, SHEET_REJECTED = 8, 4
EXPERIMENT = "preprocess"


@dataclass
class RejectGroup:
    """Rejects of one step and reason: their number and some examples."""

    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


def inspect_dataset(
    dataset: str, *, verify: bool = False, sheet: str | None = None, near_duplicates: bool = False
) -> dict[str, Any]:
    """Return counts, rejects, histograms, codecs and clocks of a finished dataset.

    Args:
        dataset: folder or URI.
        verify: recompute checksums and accounting from the files; raises ValueError on a difference.
        sheet: path of a PNG to write with accepted and rejected clips: frames, waveform and transcript.
        near_duplicates: find clips that look, move and sound like another one, and exclude them from now on.
    """
    if sheet is not None and (Path(sheet).exists() or not Path(sheet).absolute().parent.is_dir()):
        raise UserInputError(f"--sheet {sheet}: choose a new file in an existing folder")
    store = Store(dataset)
    metadata = read_metadata_json(store)
    if not metadata["complete"]:
        raise UserInputError(f"{dataset} is unfinished: run the same `mfctl preprocess` command again")
    summary = dataset_counts(metadata)
    summary |= {"modality": metadata["config"]["modality"], "codecs": metadata["codecs"], "clocks": metadata["clocks"]}
    if verify:
        _verify(store, metadata)
        summary["verified"] = True
    if near_duplicates:
        find_duplicates(store)
    summary["near_duplicates"] = len(excluded_ids(store))
    rejects = group_rejects(store)
    summary["rejects"] = {
        name: {"count": found.count, "examples": [_example(row) for row in found.examples]}
        for name, found in rejects.items()
    }
    summary["histograms"] = {
        name: _histogram(values) for name, values in read_histogram_columns(store).items() if values
    }
    summary["transcripts"] = count_transcript_sources(store)
    if sheet is not None:
        contact_sheet(open_dataset(dataset), rejects, Path(sheet))
        summary["sheet"] = str(sheet)
    return summary


def _verify(store: Store, metadata: dict[str, Any]) -> None:
    problems = verify_files(store)
    units = read_units(store)
    if not problems:
        again = sum_counts(read_markers(store, units))
        if canonical_json(again) != canonical_json(metadata["counts"]):
            problems = diff(metadata["counts"], again, "counts.")
    if problems:
        lines = "\n  ".join(problems[:20])
        raise UserInputError(
            f"{store.uri} is inconsistent:\n  {lines}\n"
            "Run the same `mfctl preprocess` command again: it makes missing and incomplete files again"
        )


def _files(store: Store, kind: str) -> list[str]:
    markers = (json.loads(store.read(name)) for name in store.list_files("_done"))
    return [file["name"] for marker in markers for file in marker["files"] if file["kind"] == kind]


def read_histogram_columns(store: Store) -> dict[str, list[float]]:
    """Return the values of HISTOGRAM_COLUMNS by column, of every accepted clip that has one."""
    values: dict[str, list[float]] = {name: [] for name in HISTOGRAM_COLUMNS}
    for name in _files(store, "clips"):
        with store.open(name) as handle:
            file = pq.ParquetFile(handle)
            present = [column for column in HISTOGRAM_COLUMNS if column in file.schema_arrow.names]
            table = file.read(present, use_threads=False)
        for column in present:
            values[column] += [value for value in table[column].to_pylist() if value is not None]
    return values


def count_transcript_sources(store: Store) -> dict[str, int]:
    """Return the number of accepted clips per transcript source; older datasets without the column give {}."""
    found: Counter[str] = Counter()
    for name in _files(store, "clips"):
        with store.open(name) as handle:
            file = pq.ParquetFile(handle)
            if "transcript_source" in file.schema_arrow.names:
                sources = file.read(["transcript_source"], use_threads=False)["transcript_source"].to_pylist()
                found.update(source or "missing" for source in sources)
    return dict(sorted(found.items()))


def group_rejects(store: Store) -> dict[str, RejectGroup]:
    """Group the rejects by ``step/reason``, the most frequent first."""
    found: dict[str, RejectGroup] = {}
    for name in _files(store, "rejects"):
        with store.open(name) as handle:
            rows = pq.ParquetFile(handle).read(use_threads=False).to_pylist()
        for row in rows:
            group = found.setdefault(f"{row['step']}/{row['reason']}", RejectGroup())
            group.count += 1
            if len(group.examples) < EXAMPLES:
                group.examples.append(row)
    return dict(sorted(found.items(), key=lambda item: (-item[1].count, item[0])))


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("uri", "span_start_sec", "span_end_sec", "detail")}


def _histogram(values: Sequence[float]) -> dict[str, Any]:
    counts, edges = np.histogram(values, BINS)
    return {"counts": counts.tolist(), "edges": edges.tolist(), "median": float(np.median(values))}


def format_summary(summary: Mapping[str, Any]) -> str:
    """Format the summary as a text report."""
    lines = [
        f"{summary['sources']} sources = {summary['spans']} spans: {summary['accepted']} accepted "
        f"({summary['hours']:.2f} hours), {summary['rejected']} rejected",
        f"{summary['modality']}, codecs {', '.join(summary['codecs'].values())}, fingerprint {summary['fingerprint']}",
    ]
    for name, found in summary["rejects"].items():
        first = found["examples"][0]
        lines.append(f"{found['count']:8d} {name}: for example {first['uri']} ({first['detail'][:100]})")
    for name, drawn in summary["histograms"].items():
        edges = drawn["edges"]
        lines.append(f"{HISTOGRAM_COLUMNS[name]:>32}  {edges[0]:9.3g} {_bars(drawn['counts'])} {edges[-1]:<9.3g}")
        lines[-1] += f" median {drawn['median']:.3g}"
    lines += ["files, checksums and accounting are correct"] if summary.get("verified") else []
    return "\n".join([*lines, *([f"sheet: {summary['sheet']}"] if "sheet" in summary else [])])


def _bars(counts: Sequence[int]) -> str:
    """Draw a histogram as one line of ASCII: denser characters are higher counts."""
    shades = " .:-=+*#%@"
    most = max(counts)
    return "[" + "".join(shades[-(-count * (len(shades) - 1) // most)] for count in counts) + "]"


def contact_sheet(clips: ClipDataset, rejects: Mapping[str, RejectGroup], path: Path) -> None:
    """Draw clips spread evenly over the dataset, decoded from latents, and rejected spans of different reasons."""
    count = min(SHEET_ACCEPTED, len(clips))
    strips = [_accepted_strip(clips, i * len(clips) // count) for i in range(count)]
    spans = [(reason, row) for reason, found in rejects.items() for row in found.examples[:1]]
    config = clips.meta.config
    strips += [_rejected_strip(reason, row, config) for reason, row in spans[:SHEET_REJECTED]]
    figures.contact_sheet(strips, path, f"{len(clips)} clips; below, in red, what was rejected", columns=8)


def _accepted_strip(clips: ClipDataset, number: int) -> figures.ClipStrip:
    clip = clips.clip(number)
    frames, sound = decode_latents(clips, clip.video, VIDEO), decode_latents(clips, clip.audio, AUDIO)
    text = " ".join(word.word for word in clip.transcript) or clip.caption or "(no words)"
    return figures.ClipStrip(
        label=f"{clip.id[:8]}\n{clip.chunks * float(clips.meta.chunk_seconds):g} s",
        frames=frames,
        sound=sound,
        seconds=clip.chunks * float(clips.meta.chunk_seconds),
        words=text,
    )


def _rejected_strip(reason: str, row: Mapping[str, Any], config: Mapping[str, Any]) -> figures.ClipStrip:
    """Draw the rejected span of its source, or a blank frame if the source is missing or damaged."""
    start, end = row["span_start_sec"] or 0.0, row["span_end_sec"]
    seconds = min(10.0, (end or start + 4.0) - start)
    frames, sound = _decode_span(row["uri"], start, seconds, config)
    blank = np.full((32, 32, 3), 200, np.uint8)
    return figures.ClipStrip(
        label=reason.replace("/", "\n"),
        frames=blank[None] if frames is None or not len(frames) else frames,
        sound=sound,
        seconds=max(seconds, 0.1),
        words=f"{row['uri'].rsplit('/', 1)[-1]}: {row['detail']}",
        alarming=True,
    )


def _decode_span(uri: str, start: float, seconds: float, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return frames and audio of a part of a source, each None if it has none or cannot be decoded."""
    size = tuple(config.get("sizes", [config.get("size")])[0])
    try:
        with local_copy(split_fragment(uri)[0]) as path:
            info = probe(path, timeout=10.0)
            rate, at = int(config["audio"]["sample_rate"]), info.origin + start
            with Decoder(
                path,
                info,
                fps=Fraction(12),
                size=size,
                sample_rate=rate,
                fit="pad",
                start=at,
                stall_seconds=10.0,
                wall_seconds=20.0,  # a rejected source may be endless
            ) as decoder:
                return decoder.read(max(1, round(12 * seconds)))
    except (MediaError, OSError, KeyError):
        return None, None


def log_dataset_to_mlflow(dataset: str, spent: Mapping[str, float], runs_dir: str) -> str | None:
    """Log the dataset's counts, settings and plots as one run; return its id, None after a failure.

    A failure is printed and not raised: the dataset is complete.
    """
    try:
        return _log_run(dataset, spent, runs_dir)
    except Exception as error:  # server unreachable, store of another version, ...
        print(f"warning: the dataset is not logged to MLflow: {hide_passwords(str(error))}", file=sys.stderr)
        return None


def _log_run(dataset: str, spent: Mapping[str, float], runs_dir: str) -> str | None:
    store = Store(dataset)
    metadata = read_metadata_json(store)
    values = read_histogram_columns(store)
    rejects = group_rejects(store)
    summary = dataset_counts(metadata)
    name = dataset.rstrip("/").rsplit("/", 1)[-1]
    tracker = open_tracker(
        uri=tracking_uri(runs_dir), folder=Path(runs_dir) / EXPERIMENT / name, experiment=EXPERIMENT, name=name
    )
    tracker.params({"dataset": dataset, "fingerprint": metadata["fingerprint"], **flatten(metadata["config"])})
    numbers = {key: float(value) for key, value in summary.items() if isinstance(value, int | float)}
    numbers |= {f"rejected/{reason}": float(found.count) for reason, found in rejects.items()}
    numbers |= {f"seconds/{step}": value for step, value in spent.items()}
    numbers |= {f"median/{key}": float(np.median(found)) for key, found in values.items() if found}
    tracker.log(0, numbers)
    with tempfile.TemporaryDirectory() as folder:
        shown = {HISTOGRAM_COLUMNS[key]: found for key, found in values.items() if found}
        if shown:
            tracker.artifact(figures.plot_histograms(shown, Path(folder, "histograms.png"), name))
        sheet = Path(folder, "sheet.png")
        contact_sheet(open_dataset(dataset), rejects, sheet)
        tracker.artifact(sheet)
    tracker.finish()
    return tracker.run_id
