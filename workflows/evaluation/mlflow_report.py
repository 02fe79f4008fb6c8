"""Plots of a sweep, and its MLflow runs: a parent run and a child run per setting."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

from preprocessing.media.decoder import decode_range
from preprocessing.media.probe import probe
from workflows.evaluation import plots
from workflows.evaluation.results import ResultStore
from workflows.evaluation.rows import SettingResult, StoredSettingResult, SweepMetadata, SweepRow
from workflows.tracking.mlflow_sync import SYNC_STATE_FILE
from workflows.tracking.mlflow_tracker import DESCRIPTION_TAG, open_tracker
from workflows.tracking.tracker import Tracker
from workflows.utils import figures
from workflows.utils.json_io import read_json, write_json

EXPERIMENT = "evaluate"
DESCRIBED_METRICS = ("frechet", "sync", "valid", "identity_error", "wer", "seconds_per_second")
MAX_DESCRIBED_ROWS = 40  # of the table; a tag of MLflow holds 8,000 characters
PARAMETERS = ("checkpoint", "mode", "steps", "nfe", "guidance", "seed", "precision", "clips")  # of a child run


def draw_plots(
    results: Sequence[SettingResult], folder: Path, *, fps: Fraction, sample_rate: int, title: str
) -> list[Path]:
    """Write the plots and the contact sheet of a sweep and return their paths."""
    rows = [row for result in results for row in result["rows"]]
    clips = max(row["clips"] for row in rows)
    paths = [plots.plot_frontier(rows, folder / "frontier.png", f"{title}: quality against evaluations, {clips} clips")]
    paths += [x for x in [plots.plot_latency(rows, folder / "seconds.png", f"{title}: quality against time")] if x]
    over_time = plots.plot_over_time(rows, folder / "over_time.png", f"{title}: over the length of a clip")
    with_label = _has_several_labels(results)
    strips = [
        _read_strip(
            folder / result["samples"][0], _sheet_label(result["rows"][0], with_label=with_label), fps, sample_rate
        )
        for result in _select_for_sheet(results)
    ]
    offsets = plots.plot_sync_offsets(rows, folder / "offsets.png", f"{title}: A/V offsets")
    paths += [path for path in (over_time, offsets) if path]
    return [*paths, figures.contact_sheet(strips, folder / "sheet.png", f"{title}: the same prompt in every row")]


def _has_several_labels(results: Sequence[SettingResult]) -> bool:
    """Return True if the results have several labels: several checkpoints or precisions."""
    return len({result["rows"][0]["label"] for result in results if result["digest"] != "real"}) > 1


def _select_for_sheet(results: Sequence[SettingResult]) -> list[SettingResult]:
    """Return the real clips, then the settings of the first seed by label, mode and evaluations."""

    def position(result: SettingResult) -> tuple[bool, str, str, int]:
        row = result["rows"][0]
        return row["mode"] != "real", row["label"], row["mode"], row["nfe"]

    first = min(result["rows"][0]["seed"] for result in results)
    return sorted((p for p in results if p["rows"][0]["seed"] == first or p["digest"] == "real"), key=position)


def _sheet_label(row: SweepRow, *, with_label: bool) -> str:
    if row["mode"] == "real":
        return "real, coded"
    label = f"{row['label']}\n" if with_label else ""
    plural = "s" if row["steps"] > 1 else ""
    guided = f", w = {row['guidance']:g}" if row["guidance"] != 1 else ""
    return f"{label}{row['mode']}-step mode\n{row['steps']} step{plural}, {row['nfe']} NFE{guided}"


def _read_strip(path: Path, label: str, fps: Fraction, sample_rate: int) -> figures.ClipStrip:
    """Decode the stored mp4, so that the sheet shows the samples that the sweep keeps."""
    info = probe(path)
    size = (info.video.height, info.video.width) if info.video else (16, 16)
    seconds = float(info.duration or 0)
    frames, sound = decode_range(path, 0.0, seconds, fps=fps, size=size, sample_rate=sample_rate)
    return figures.ClipStrip(label=label, frames=frames, sound=sound, seconds=seconds)


def log_sweep_to_mlflow(
    results: Sequence[StoredSettingResult],
    images: Sequence[Path],
    store: ResultStore,
    *,
    uri: str,
    name: str,
    facts: SweepMetadata,
) -> str | None:
    """Log new results to MLflow and return the id of the parent run; None without MLflow."""
    record = store.folder / SYNC_STATE_FILE
    logged_before = read_json(record) if record.exists() else {}
    same_server = logged_before.get("uri") == uri
    run_id: str | None = logged_before["parent"] if same_server else None
    logged: list[str] = logged_before["logged"] if same_server else []
    pending = [result for result in results if result["key"] not in logged]
    if not pending:
        return run_id
    parent = open_tracker(
        uri=uri,
        folder=store.folder / "log",
        experiment=EXPERIMENT,
        name=name,
        run_id=run_id,
        tags={DESCRIPTION_TAG: describe_sweep(results, dataset=facts["dataset"])},
    )
    with closing_tracker(parent):
        if run_id is None:
            parent.params(facts)
        for result in pending:
            _log_result(result, results, parent=parent, store=store, uri=uri)
            logged.append(result["key"])
            write_json(record, {"uri": uri, "parent": parent.run_id, "logged": logged})
        for path in [*images, store.path]:
            parent.artifact(path)
    return parent.run_id


def describe_sweep(results: Sequence[SettingResult], *, dataset: str) -> str:
    """Return the frontier as a Markdown table, for the top of the page of the parent run.

    A row has the settings of one sweep point, by function evaluations, and the metrics of whole clips.
    """
    rows = [result["rows"][0] for result in results]
    names = [name for name in DESCRIBED_METRICS if any(name in row["metrics"] for row in rows)]
    lines = [
        f"Quality against function evaluations per chunk (NFE); held-out clips of `{dataset}`. Plots, samples and "
        "`report.html` are in the artifacts.\n",
        f"| checkpoint | mode | steps | NFE | seed | {' | '.join(names)} |",
        "|-" * (5 + len(names)) + "|",
    ]
    for row in sorted(rows, key=lambda row: (row["label"], row["mode"], row["nfe"], row["seed"]))[:MAX_DESCRIBED_ROWS]:
        values = [f"{row['metrics'][name]:.3g}" if name in row["metrics"] else "" for name in names]
        settings = (row["label"], row["mode"], row["steps"], row["nfe"], row["seed"], *values)
        lines.append(f"| {' | '.join(str(value) for value in settings)} |")
    return "\n".join(lines)


@contextmanager
def closing_tracker(tracker: Tracker) -> Iterator[Tracker]:
    """Finish the run on exit, as failed if the block raises."""
    try:
        yield tracker
    except BaseException:
        tracker.finish(failed=True)
        raise
    tracker.finish()


def _log_result(
    result: SettingResult, results: Sequence[SettingResult], *, parent: Tracker, store: ResultStore, uri: str
) -> None:
    """Log a point of the parent run and a child run; for real clips only the samples."""
    if result["digest"] == "real":
        _log_samples(parent, result, store)
        return
    _log_point(parent, result, results)
    child = open_tracker(
        uri=uri,
        folder=store.folder / "log" / result["name"],
        experiment=EXPERIMENT,
        name=result["name"],
        parent=parent.run_id,
    )
    row = result["rows"][0]
    with closing_tracker(child):
        child.params({name: value for name, value in row.items() if name in PARAMETERS})
        values: dict[str, float] = {}
        for windowed in result["rows"]:
            prefix = "" if windowed["window"] == "all" else f"{windowed['window']}/"
            values |= {prefix + name: value for name, value in windowed["metrics"].items()}
        child.log(row["nfe"], values)
        _log_samples(child, result, store)


def _log_point(parent: Tracker, result: SettingResult, results: Sequence[SettingResult]) -> None:
    """Log metrics of the parent run with the number of evaluations as step (``few/sync``): the frontier."""
    with_label = _has_several_labels(results)
    real = next((p["rows"][0]["metrics"] for p in results if p["digest"] == "real"), {})
    row = result["rows"][0]
    weights = {p["rows"][0]["guidance"] for p in results if p["rows"][0]["mode"] == row["mode"]}
    label = f"{row['label']}/" if with_label else ""
    guided = f"-w{row['guidance']:g}" if len(weights) > 1 else ""
    prefix = f"{label}{row['mode']}{guided}"
    values = {f"{prefix}/{k}": v for k, v in row["metrics"].items()}
    parent.log(row["nfe"], values | {f"real/{k}": v for k, v in real.items() if k in row["metrics"]})


def _log_samples(tracker: Tracker, result: SettingResult, store: ResultStore) -> None:
    for path in result["samples"]:
        tracker.artifact(store.folder / path, "samples")
