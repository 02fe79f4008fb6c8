"""Pictures: a sweep's frontier, metrics over the length of a clip, a sheet of clips to look at, histograms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from workflows.utils.figures import MODE_COLORS, finish_figure, panel_grid, save_figure

matplotlib.use("Agg")

Rows = Sequence[Mapping[str, Any]]

PANELS = (  # metric, title, which way is better, logarithmic
    ("frechet", "Frechet distance", "lower is better", True),
    ("syllable_error", "syllable error", "lower is better", False),
    ("sync", "mouth-sound correlation", "higher is better", False),
    ("valid", "valid free choices", "higher is better", False),
    ("seam", "seam energy", "1: as in real clips", True),
    ("seconds_per_second", "seconds of clip per second", "higher is better", True),
)
OVER_TIME = ("frechet", "syllable_error", "sync", "valid", "seam", "identity_error")
_SHARES = ("syllable_error", "valid")
_MARKS = "osD^vP"  # by checkpoint
_LINES = ("-", "--", ":", "-.")  # by guidance
_REAL = "#4f4f4f"


def plot_frontier(rows: Rows, path: Path, title: str) -> Path:
    """Quality and speed against network evaluations; a dashed line shows what real clips score."""
    overall = [row for row in rows if row["window"] == "all"]
    shown = [panel for panel in PANELS if any(panel[0] in row["metrics"] for row in overall)]
    figure, axes = panel_grid(len(shown))
    for axis, (metric, name, better, log) in zip(axes, shown, strict=False):
        _frontier_panel(axis, overall, metric, log=log)
        axis.set_title(f"{name}  ({better})", fontsize=10, loc="left")
        axis.set_xlabel("network evaluations per chunk", fontsize=8)
    finish_figure(figure, axes, title, len(shown))
    return save_figure(figure, path)


def plot_latency(rows: Rows, path: Path, title: str) -> Path | None:
    """Quality against the seconds that one second of clip takes to make, one stream alone; None where none is timed."""
    timed = [row for row in rows if row["window"] == "all" and "real_time_factor" in row["metrics"]]
    shown = [panel for panel in PANELS[:-1] if any(panel[0] in row["metrics"] for row in timed)]
    if not shown:
        return None
    figure, axes = panel_grid(len(shown))
    for axis, (metric, name, better, log) in zip(axes, shown, strict=False):
        for label, style, curve in _curves(timed):
            points = _means([(row["nfe"], row["metrics"].get(metric)) for row in curve])
            times = _means([(row["nfe"], row["metrics"]["real_time_factor"]) for row in curve])
            cost = dict(times)
            line = sorted((cost[nfe], value) for nfe, value in points)
            if line:
                axis.plot(*zip(*line, strict=True), ms=5, lw=1.6, label=label, **style)
        _real_line(axis, rows, metric)
        if log:
            _log_where_wide(axis)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_title(f"{name}  ({better})", fontsize=10, loc="left")
        axis.set_xlabel("seconds of computation per second of clip", fontsize=8)
    finish_figure(figure, axes, title, len(shown))
    return save_figure(figure, path)


def plot_sync_offsets(rows: Rows, path: Path, title: str) -> Path | None:
    """How the offsets of sound and picture are spread, a row of points per setting; None without any."""
    known = [row for row in rows if any(x is not None for x in row.get("offsets", ()))]
    if not known:
        return None
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.26 * len(known)), layout="constrained")
    for place, row in enumerate(known):
        values = [1000 * x for x in row["offsets"] if x is not None]
        colour = MODE_COLORS.get(row["mode"], _REAL)
        axis.plot(values, [place] * len(values), "|", ms=11, color=colour, alpha=0.6)
        axis.plot(float(np.median(values)), place, "o", ms=5, color=colour)
    names = [_setting(row) + f"  ({sum(x is None for x in row['offsets'])} failed)" for row in known]
    axis.set_yticks(range(len(known)), names, fontsize=8)
    axis.invert_yaxis()
    axis.axvspan(-80, 80, color="#eeeeee", zorder=0)
    axis.set_xlabel("milliseconds by which the sound is late (grey: two frames at 25 per second); point: median")
    axis.set_title(title, fontsize=11, loc="left")
    return save_figure(figure, path)


def _setting(row: Mapping[str, Any]) -> str:
    if row["mode"] == "real":
        return "real, coded"
    guided = f", w = {row['guidance']:g}" if row["guidance"] != 1 else ""
    return f"{row['label']} {row['mode']}, {row['steps']}{guided}" + (f", seed {row['seed']}" if row["seed"] else "")


def _frontier_panel(axis: Axes, rows: Rows, metric: str, *, log: bool) -> None:
    for label, style, curve in _curves(rows):
        points = _means([(row["nfe"], row["metrics"].get(metric)) for row in curve])
        if points:
            axis.plot(*zip(*points, strict=True), ms=5, lw=1.6, label=label, **style)
    _real_line(axis, rows, metric)
    if log:
        _log_where_wide(axis)
    ticks = sorted({row["nfe"] for row in rows if row["nfe"]})
    axis.set_xscale("log", base=2)
    axis.set_xticks(_spread(ticks), [str(t) for t in _spread(ticks)])
    axis.minorticks_off()


def _log_where_wide(axis: Axes) -> None:
    """A logarithmic axis where the values span close to a decade."""
    values = [y for line in axis.get_lines() for y in np.atleast_1d(np.asarray(line.get_ydata(), float))]
    if values and min(values) > 0 and max(values) > 8 * min(values):
        axis.set_yscale("log")


def _real_line(axis: Axes, rows: Rows, metric: str) -> None:
    real = [r["metrics"].get(metric) for r in rows if r["mode"] == "real" and r["window"] == "all"]
    if real and real[0] is not None:
        axis.axhline(real[0], color=_REAL, ls="--", lw=1, label="real clips, coded")
    if metric in _SHARES:
        axis.set_ylim(-0.05, 1.05)


def _curves(rows: Rows) -> list[tuple[str, dict[str, Any], Rows]]:
    """Label, look and rows of every (checkpoint, mode, guidance)."""
    made = [row for row in rows if row["mode"] != "real"]
    subjects = list(dict.fromkeys(row["label"] for row in made))
    weights = sorted({(row["mode"], row["guidance"]) for row in made})
    keys = dict.fromkeys((row["label"], row["mode"], row["guidance"]) for row in made)
    out: list[tuple[str, dict[str, Any], Rows]] = []
    for label, mode, weight in keys:
        name = f"{mode}-step" + (f", guidance {weight:g}" if weight != 1 else "")
        curve = [r for r in made if (r["label"], r["mode"], r["guidance"]) == (label, mode, weight)]
        style = {
            "color": MODE_COLORS[mode],
            "marker": _MARKS[subjects.index(label) % len(_MARKS)],
            "linestyle": _LINES[[w for m, w in weights if m == mode].index(weight) % len(_LINES)],
        }
        out.append((f"{label}: {name}" if len(subjects) > 1 else name, style, curve))
    return out


def _means(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """The mean over seeds at every place, in order."""
    places = sorted({x for x, y in points if y is not None})
    return [(x, float(np.mean([y for at, y in points if at == x and y is not None]))) for x in places]


def _spread(ticks: Sequence[int]) -> list[int]:
    """Ticks that do not run into each other on a logarithmic axis."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick >= 1.4 * kept[-1]:
            kept.append(tick)
    return kept


def plot_over_time(rows: Rows, path: Path, title: str) -> Path | None:
    """Metrics by window of time; None when no clip is long enough for two windows."""
    windowed = [row for row in rows if row["window"] != "all" and row["mode"] != "real"]
    windows = sorted({row["window"] for row in windowed}, key=lambda name: float(name.split("-")[0]))
    shown = [panel for panel in PANELS if panel[0] in OVER_TIME and any(panel[0] in r["metrics"] for r in windowed)]
    shown += [("identity_error", "identity error", "lower is better", False)] * any(
        "identity_error" in row["metrics"] for row in windowed
    )
    if len(windows) < 2 or not shown:
        return None
    figure, axes = panel_grid(len(shown))
    for axis, (metric, name, better, log) in zip(axes, shown, strict=False):
        _window_panel(axis, windowed, windows, metric)
        _real_line(axis, rows, metric)
        if log:
            _log_where_wide(axis)
        axis.set_title(f"{name}  ({better})", fontsize=10, loc="left")
        axis.set_xlabel("seconds of the clip", fontsize=8)
    finish_figure(figure, axes, title, len(shown))
    return save_figure(figure, path)


def _window_panel(axis: Axes, rows: Rows, windows: Sequence[str], metric: str) -> None:
    """One line per setting, darker with more evaluations."""
    for label, style, curve in _curves(rows):
        counts = sorted({row["nfe"] for row in curve})
        for nfe in counts:
            line = [(windows.index(r["window"]), r["metrics"].get(metric)) for r in curve if r["nfe"] == nfe]
            points = _means(line)
            strength = 0.3 + 0.7 * (counts.index(nfe) + 1) / len(counts)
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, alpha=strength, ms=4, lw=1.4, label=f"{label}, {nfe} NFE", **style)
    axis.set_xticks(range(len(windows)), windows)
