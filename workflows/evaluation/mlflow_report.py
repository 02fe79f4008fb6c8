"""A sweep's plots, and its pages in MLflow: a parent run, and a child run for every setting."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from preprocessing.media.decoder import decode_range
from preprocessing.media.probe import probe
from workflows.evaluation import plots
from workflows.evaluation.results import ResultStore
from workflows.tracking.mlflow_sync import SYNC_STATE_FILE
from workflows.tracking.mlflow_tracker import open_tracker
from workflows.tracking.tracker import Tracker
from workflows.utils import figures
from workflows.utils.json_io import read_json, write_json

EXPERIMENT = "evaluate"

Part = Mapping[str, Any]


def draw_plots(parts: Sequence[Part], folder: Path, fps: Fraction, sample_rate: int, title: str) -> list[Path]:
    """Frontier, metrics over time (where clips are long enough), comparison sheet."""
    rows = [row for part in parts for row in part["rows"]]
    clips = max(row["clips"] for row in rows)
    made = [plots.plot_frontier(rows, folder / "frontier.png", f"{title}: quality against evaluations, {clips} clips")]
    made += [x for x in [plots.plot_latency(rows, folder / "seconds.png", f"{title}: quality against time")] if x]
    over_time = plots.plot_over_time(rows, folder / "over_time.png", f"{title}: over the length of a clip")
    many = _several(parts)
    strips = [_strip(folder / part["samples"][0], part, fps, sample_rate, many) for part in _for_the_eye(parts)]
    apart = plots.plot_sync_offsets(rows, folder / "offsets.png", f"{title}: offsets of sound and picture")
    made += [path for path in (over_time, apart) if path]
    return [*made, figures.contact_sheet(strips, folder / "sheet.png", f"{title}: the same prompt in every row")]


def _several(parts: Sequence[Part]) -> bool:
    """Whether there is more than one checkpoint, or one in more than one precision: their labels tell them apart."""
    return len({part["rows"][0]["label"] for part in parts if part["digest"] != "real"}) > 1


def _for_the_eye(parts: Sequence[Part]) -> list[Part]:
    """The real clip, then each checkpoint's modes by step count; the first seed only."""

    def place(part: Part) -> tuple[bool, str, str, int]:
        row = part["rows"][0]
        return row["mode"] != "real", row["label"], row["mode"], row["nfe"]

    first = min(part["rows"][0]["seed"] for part in parts)
    return sorted((p for p in parts if p["rows"][0]["seed"] == first or p["digest"] == "real"), key=place)


def _strip(path: Path, part: Part, fps: Fraction, sample_rate: int, named: bool) -> figures.ClipStrip:
    """Read back from the sample's file: what a sweep keeps is what its sheet shows."""
    row, info = part["rows"][0], probe(path)
    size = (info.video.height, info.video.width) if info.video else (16, 16)
    seconds = float(info.duration or 0)
    frames, sound = decode_range(path, 0.0, seconds, fps=fps, size=size, sample_rate=sample_rate)
    nfe = (
        (f"{row['label']}\n" if named else "")
        + f"{row['mode']}-step mode\n{row['steps']} step{'s' * (row['steps'] > 1)}, {row['nfe']} NFE"
        + (f", w = {row['guidance']:g}" if row["guidance"] != 1 else "")
    )
    label = "real, coded" if row["mode"] == "real" else nfe
    return figures.ClipStrip(label=label, frames=frames, sound=sound, seconds=seconds)


def log_sweep_to_mlflow(
    parts: Sequence[Part], images: Sequence[Path], results: ResultStore, uri: str, name: str, facts: Mapping[str, Any]
) -> str | None:
    """Put what MLflow does not have yet under the sweep's parent run; its id, None without MLflow."""
    note = results.folder / SYNC_STATE_FILE
    known = read_json(note) if note.exists() else {}
    here = known.get("uri") == uri
    run_id: str | None = known["parent"] if here else None
    logged: list[str] = known["logged"] if here else []
    new = [part for part in parts if part["key"] not in logged]
    if not new:
        return run_id
    parent = open_tracker(uri=uri, folder=results.folder / "log", experiment=EXPERIMENT, name=name, run_id=run_id)
    with closing_tracker(parent):
        if run_id is None:
            parent.params(facts)
        for part in new:
            _log_part(part, parts, parent, results, uri)
            logged.append(part["key"])
            write_json(note, {"uri": uri, "parent": parent.run_id, "logged": logged})
        for path in [*images, results.path]:
            parent.artifact(path)
    return parent.run_id


@contextmanager
def closing_tracker(tracker: Tracker) -> Iterator[Tracker]:
    """Ends a run, as failed where the block raised."""
    try:
        yield tracker
    except BaseException:
        tracker.finish(failed=True)
        raise
    tracker.finish()


def _log_part(part: Part, parts: Sequence[Part], parent: Tracker, results: ResultStore, uri: str) -> None:
    """A point on the parent's curves and a child run; of the real clips only the samples."""
    if part["digest"] == "real":
        _log_samples(parent, part, results)
        return
    _log_point(parent, part, parts)
    child = open_tracker(
        uri=uri,
        folder=results.folder / "log" / part["name"],
        experiment=EXPERIMENT,
        name=part["name"],
        parent=parent.run_id,
    )
    row = part["rows"][0]
    with closing_tracker(child):
        names = ("checkpoint", "mode", "steps", "nfe", "guidance", "seed", "precision", "clips")
        child.params({key: row[key] for key in names if key in row})
        values: dict[str, float] = {}
        for windowed in part["rows"]:
            prefix = "" if windowed["window"] == "all" else f"{windowed['window']}/"
            values |= {prefix + name: value for name, value in windowed["metrics"].items()}
        child.log(row["nfe"], values)
        _log_samples(child, part, results)


def _log_point(parent: Tracker, part: Part, parts: Sequence[Part]) -> None:
    """``few/sync`` against the number of evaluations: the UI's own chart of the parent is the frontier."""
    many = _several(parts)
    real = next((p["rows"][0]["metrics"] for p in parts if p["digest"] == "real"), {})
    row = part["rows"][0]
    weights = {p["rows"][0]["guidance"] for p in parts if p["rows"][0]["mode"] == row["mode"]}
    prefix = (f"{row['label']}/" if many else "") + row["mode"] + (f"-w{row['guidance']:g}" * (len(weights) > 1))
    shown = {f"{prefix}/{k}": v for k, v in row["metrics"].items()}
    parent.log(row["nfe"], shown | {f"real/{k}": v for k, v in real.items() if k in row["metrics"]})


def _log_samples(tracker: Tracker, part: Part, results: ResultStore) -> None:
    for path in part["samples"]:
        tracker.artifact(results.folder / path, "samples")
