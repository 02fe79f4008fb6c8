"""Plots of a study: quality against NFE, drift over a clip, and ablations."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workflows.study.methods import ABLATIONS, BASELINES, METHODS
from workflows.study.results_table import ResultSeries, StudyRow

matplotlib.use("Agg")

Rows = Sequence[StudyRow]
PANELS = (
    ("frechet", "Frechet distance (lower is better)"),
    ("valid", "valid chunks (higher)"),
    ("syllable_error", "syllable error (lower)"),
    ("sync", "mouth-sound correlation (higher)"),
    ("identity_error", "identity error (lower)"),
    ("voice_error", "voice error (lower)"),
    ("seam", "seam energy over the data's (1)"),
    ("lag1", "lag-1 correlation of pose over the data's (1)"),
)
STEPS_SHOWN = 4  # in the plots over time and of ablations
_DPI = 120
_LOG = ("frechet", "identity_error", "voice_error", "seam")
_COLORS = {name: f"C{number}" for number, name in enumerate(BASELINES)} | {"joint": "k"}  # equal in all plots


def draw_plots(rows: Rows, folder: Path) -> list[Path]:
    """Write ``frontier.png``, ``drift.png`` and ``ablations.png`` if rows exist; return paths."""
    windows = sorted({row["window"] for row in rows}, key=lambda w: float(w.split("-")[0]))
    lines = _group_rows(rows)
    table = {series: own for series, own in lines.items() if series.method not in ABLATIONS}
    title = f"{windows[0]} s, against network evaluations"
    paths = [_draw_page(folder / "frontier.png", title, table, axis="nfe", windows=windows[:1])]
    if len(windows) > 1:
        title = f"{STEPS_SHOWN} steps per chunk, over time"
        shown = {s: own for s, own in table.items() if s.mode == "few" or s.method in ("joint", "teacher_forcing")}
        paths.append(_draw_page(folder / "drift.png", title, shown, axis="window", windows=windows))
    changed = [name for name in ABLATIONS if _metrics_at(rows, name, windows[0])]
    if changed:
        paths.append(_draw_ablations(folder / "ablations.png", rows, changed, windows))
    return paths


def _metrics_at(rows: Rows, method: str, window: str) -> list[Mapping[str, float]]:
    """Return the metrics of the few-step mode at ``STEPS_SHOWN`` steps, per seed."""
    series = ResultSeries(method=method, mode="few", guided=False)
    of_method = [row for row in rows if ResultSeries.of_row(row) == series]
    return [row["metrics"] for row in of_method if row["steps"] == STEPS_SHOWN and row["window"] == window]


def _draw_ablations(path: Path, rows: Rows, names: Sequence[str], windows: Sequence[str]) -> Path:
    """Plot one row per ablation over the range of the unchanged method's seeds."""
    figure, axes = plt.subplots(2, 4, figsize=(17, 3 + 0.42 * len(names)), constrained_layout=True, sharey=True)
    late = next((w for w in reversed(windows) if float(w.split("-")[1]) <= 25.0), windows[-1])  # with all the clips
    for axis, (metric, name) in zip(axes.flat, PANELS, strict=True):
        for window, color in dict(zip((windows[0], late), ("C0", "C3"), strict=True)).items():
            whole = [m[metric] for m in _metrics_at(rows, "mutual", window)]
            if whole:
                axis.axvspan(min(whole), max(whole), color=color, alpha=0.15)
                axis.axvline(float(np.mean(whole)), color=color, lw=0.8)
            values: list[float] = []
            for method in names:
                by_seed = [metrics[metric] for metrics in _metrics_at(rows, method, window)]
                values.append(float(np.mean(by_seed)))
            axis.plot(values, range(len(names)), "o", color=color, markersize=4, label=f"{window} s")
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_yticks(range(len(names)), [f"{METHODS[n].key}) {METHODS[n].title}" for n in names], fontsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.margins(y=0.5 / len(names))
        axis.grid(alpha=0.3)
    axes.flat[0].invert_yaxis()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"one change at a time, {STEPS_SHOWN} steps per chunk; bands: seeds of Mutual Forcing unchanged")
    return _save(figure, path)


def _group_rows(rows: Rows) -> dict[ResultSeries, list[StudyRow]]:
    lines: dict[ResultSeries, list[StudyRow]] = defaultdict(list)
    for row in rows:
        if row["steps"]:
            lines[ResultSeries.of_row(row)].append(row)
    order = ["joint", *METHODS]
    ranked = sorted(lines, key=lambda series: (order.index(series.method), *series.order))
    return {series: lines[series] for series in ranked}


def _draw_page(
    path: Path,
    title: str,
    lines: Mapping[ResultSeries, Rows],
    *,
    axis: Literal["nfe", "window"],
    windows: Sequence[str],
) -> Path:
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.5), constrained_layout=True)
    for panel, (metric, name) in zip(axes.flat, PANELS, strict=True):
        for series, rows in lines.items():
            _draw_series(panel, series, _points(rows, metric, axis=axis, windows=windows))
        panel.set_title(name, fontsize=10, loc="left")
        if axis == "nfe":
            panel.set_xscale("log", base=2)
        else:
            panel.set_xticks(range(len(windows)), windows)
        if metric in _LOG:
            panel.set_yscale("log")
        panel.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title)
    return _save(figure, path)


def _points(
    rows: Rows, metric: str, *, axis: Literal["nfe", "window"], windows: Sequence[str]
) -> dict[int, list[float]]:
    points: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["window"] in windows and (axis == "nfe" or row["steps"] == STEPS_SHOWN):
            x = row["nfe"] if axis == "nfe" else windows.index(row["window"])
            points[x].append(row["metrics"][metric])
    return points


def _draw_series(panel: Axes, series: ResultSeries, points: Mapping[int, Sequence[float]]) -> None:
    if not points:
        return
    xs = sorted(points)
    middle = np.array([np.mean(points[x]) for x in xs])
    spread = np.array([np.std(points[x]) for x in xs])
    title = METHODS[series.method].title if series.method in METHODS else series.method
    few = "" if series.sampler == "deterministic" else f", {series.sampler}"
    label = title + {"few": few, "multi": ", guided" if series.guided else ", Euler"}[series.mode]
    few_style = "-" if series.sampler == "deterministic" else "-."
    style = {"few": few_style, "multi": ":" if series.guided else "--"}[series.mode]
    (drawn,) = panel.plot(
        xs,
        middle,
        style,
        marker="o",
        markersize=3,
        label=label,
        color=_COLORS[series.method],
        lw=2.5 if series.method == "mutual" else 1.2,
    )
    panel.fill_between(xs, middle - spread, middle + spread, color=drawn.get_color(), alpha=0.15)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
