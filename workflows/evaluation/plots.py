"""Plots of a sweep: frontier, quality against time, metrics over the clip, A/V offsets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from workflows.evaluation.rows import SweepRow
from workflows.utils.figures import MODE_COLORS, finish_figure, panel_grid, save_figure

matplotlib.use("Agg")

Rows = Sequence[SweepRow]


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One metric of a plot."""

    metric: str
    title: str
    better: str  # the good direction
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Rows of one checkpoint, mode and guidance."""

    label: str
    style: dict[str, Any]  # arguments of Axes.plot
    rows: Rows


PANELS = (
    _Panel(metric="frechet", title="Frechet distance", better="lower is better", log=True),
    _Panel(metric="syllable_error", title="syllable error", better="lower is better"),
    _Panel(metric="sync", title="mouth-sound correlation", better="higher is better"),
    _Panel(metric="valid", title="valid free choices", better="higher is better"),
    _Panel(metric="seam", title="seam energy", better="1: as in real clips", log=True),
    _Panel(metric="seconds_per_second", title="seconds of clip per second", better="higher is better", log=True),
)
IDENTITY_PANEL = _Panel(metric="identity_error", title="identity error", better="lower is better")
OVER_TIME = ("frechet", "syllable_error", "sync", "valid", "seam")
_SHARES = ("syllable_error", "valid")
_MARKS = "osD^vP"  # by checkpoint
_LINES = ("-", "--", ":", "-.")  # by guidance
_REAL = "#4f4f4f"


def plot_frontier(rows: Rows, path: Path, title: str) -> Path:
    """Plot quality and speed against function evaluations; a dashed line marks real clips."""
    overall = [row for row in rows if row["window"] == "all"]
    shown = _measured_panels(PANELS, overall)
    figure, axes = panel_grid(len(shown))
    for axis, panel in zip(axes, shown, strict=False):
        _frontier_panel(axis, overall, panel)
        _label_panel(axis, panel, "network evaluations per chunk")
    finish_figure(figure, axes, title, len(shown))
    return save_figure(figure, path)


def plot_latency(rows: Rows, path: Path, title: str) -> Path | None:
    """Plot quality against the real-time factor of a single stream; None without measured speed."""
    timed = [row for row in rows if row["window"] == "all" and "real_time_factor" in row["metrics"]]
    shown = _measured_panels(PANELS[:-1], timed)
    if not shown:
        return None
    figure, axes = panel_grid(len(shown))
    for axis, panel in zip(axes, shown, strict=False):
        for curve in _curves(timed):
            points = _means([(row["nfe"], row["metrics"].get(panel.metric)) for row in curve.rows])
            cost = dict(_means([(row["nfe"], row["metrics"]["real_time_factor"]) for row in curve.rows]))
            line = sorted((cost[nfe], value) for nfe, value in points)
            if line:
                axis.plot(*zip(*line, strict=True), ms=5, lw=1.6, label=curve.label, **curve.style)
        _real_line(axis, rows, panel)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        _label_panel(axis, panel, "seconds of computation per second of clip")
    finish_figure(figure, axes, title, len(shown))
    return save_figure(figure, path)


def plot_sync_offsets(rows: Rows, path: Path, title: str) -> Path | None:
    """Plot the A/V offsets, one row of points per setting; None without offsets."""
    names: list[str] = []
    offsets: list[list[float]] = []
    colors: list[str] = []
    for row in rows:
        found = [1000 * x for x in row.get("offsets", ()) if x is not None]
        if found:
            failed = len(row.get("offsets", ())) - len(found)
            names.append(f"{_setting_label(row)}  ({failed} failed)")
            offsets.append(found)
            colors.append(MODE_COLORS.get(row["mode"], _REAL))
    if not offsets:
        return None
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.26 * len(offsets)), layout="constrained")
    for y, (values, color) in enumerate(zip(offsets, colors, strict=True)):
        axis.plot(values, [y] * len(values), "|", ms=11, color=color, alpha=0.6)
        axis.plot(float(np.median(values)), y, "o", ms=5, color=color)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.axvspan(-80, 80, color="#eeeeee", zorder=0)
    axis.set_xlabel("audio lag in milliseconds (gray: two frames at 25 fps); point: median")
    axis.set_title(title, fontsize=11, loc="left")
    return save_figure(figure, path)


def _setting_label(row: SweepRow) -> str:
    if row["mode"] == "real":
        return "real, coded"
    guided = f", w = {row['guidance']:g}" if row["guidance"] != 1 else ""
    seed = f", seed {row['seed']}" if row["seed"] else ""
    return f"{row['label']} {row['mode']}, {row['steps']}{guided}{seed}"


def _measured_panels(panels: Sequence[_Panel], rows: Rows) -> list[_Panel]:
    return [panel for panel in panels if any(panel.metric in row["metrics"] for row in rows)]


def _label_panel(axis: Axes, panel: _Panel, x_label: str) -> None:
    axis.set_title(f"{panel.title}  ({panel.better})", fontsize=10, loc="left")
    axis.set_xlabel(x_label, fontsize=8)


def _frontier_panel(axis: Axes, rows: Rows, panel: _Panel) -> None:
    for curve in _curves(rows):
        points = _means([(row["nfe"], row["metrics"].get(panel.metric)) for row in curve.rows])
        if points:
            axis.plot(*zip(*points, strict=True), ms=5, lw=1.6, label=curve.label, **curve.style)
    _real_line(axis, rows, panel)
    ticks = sorted({row["nfe"] for row in rows if row["nfe"]})
    axis.set_xscale("log", base=2)
    axis.set_xticks(_thin_ticks(ticks), [str(t) for t in _thin_ticks(ticks)])
    axis.minorticks_off()


def _log_where_wide(axis: Axes) -> None:
    """Set a logarithmic axis if the values span close to a decade."""
    values = [y for line in axis.get_lines() for y in np.atleast_1d(np.asarray(line.get_ydata(), float))]
    if values and min(values) > 0 and max(values) > 8 * min(values):
        axis.set_yscale("log")


def _real_line(axis: Axes, rows: Rows, panel: _Panel) -> None:
    """Draw the score of real clips, then set the limits and scale of the value axis."""
    real = [r["metrics"].get(panel.metric) for r in rows if r["mode"] == "real" and r["window"] == "all"]
    if real and real[0] is not None:
        axis.axhline(real[0], color=_REAL, ls="--", lw=1, label="real clips, coded")
    if panel.metric in _SHARES:
        axis.set_ylim(-0.05, 1.05)
    if panel.log:
        _log_where_wide(axis)


def _curves(rows: Rows) -> list[_Curve]:
    """Return one curve per checkpoint, mode and guidance."""
    generated = [row for row in rows if row["mode"] != "real"]
    subjects = list(dict.fromkeys(row["label"] for row in generated))
    weights = sorted({(row["mode"], row["guidance"]) for row in generated})
    keys = dict.fromkeys((row["label"], row["mode"], row["guidance"]) for row in generated)
    curves: list[_Curve] = []
    for label, mode, weight in keys:
        name = f"{mode}-step" + (f", guidance {weight:g}" if weight != 1 else "")
        name = f"{label}: {name}" if len(subjects) > 1 else name
        of_curve = [r for r in generated if (r["label"], r["mode"], r["guidance"]) == (label, mode, weight)]
        style = {
            "color": MODE_COLORS[mode],
            "marker": _MARKS[subjects.index(label) % len(_MARKS)],
            "linestyle": _LINES[[w for m, w in weights if m == mode].index(weight) % len(_LINES)],
        }
        curves.append(_Curve(label=name, style=style, rows=of_curve))
    return curves


def _means(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """Return the mean y per x, sorted by x."""
    values: dict[float, list[float]] = {}
    for x, y in points:
        if y is not None:
            values.setdefault(x, []).append(y)
    return [(x, float(np.mean(values[x]))) for x in sorted(values)]


def _thin_ticks(ticks: Sequence[int]) -> list[int]:
    """Return the ticks that do not overlap on a logarithmic axis."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick >= 1.4 * kept[-1]:
            kept.append(tick)
    return kept


def plot_over_time(rows: Rows, path: Path, title: str) -> Path | None:
    """Plot metrics by time window; None if no clip reaches a second window."""
    windowed = [row for row in rows if row["window"] != "all" and row["mode"] != "real"]
    windows = sorted({row["window"] for row in windowed}, key=lambda name: float(name.split("-")[0]))
    over_time = [panel for panel in PANELS if panel.metric in OVER_TIME]
    shown = _measured_panels([*over_time, IDENTITY_PANEL], windowed)
    if len(windows) < 2 or not shown:
        return None
    figure, axes = panel_grid(len(shown))
    for axis, panel in zip(axes, shown, strict=False):
        _window_panel(axis, windowed, windows, panel.metric)
        _real_line(axis, rows, panel)
        _label_panel(axis, panel, "seconds of the clip")
    finish_figure(figure, axes, title, len(shown))
    return save_figure(figure, path)


def _window_panel(axis: Axes, rows: Rows, windows: Sequence[str], metric: str) -> None:
    """Draw one line per setting, darker with more evaluations."""
    for curve in _curves(rows):
        counts = sorted({row["nfe"] for row in curve.rows})
        for nfe in counts:
            line = [(windows.index(r["window"]), r["metrics"].get(metric)) for r in curve.rows if r["nfe"] == nfe]
            points = _means(line)
            alpha = 0.3 + 0.7 * (counts.index(nfe) + 1) / len(counts)
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, alpha=alpha, ms=4, lw=1.4, label=f"{curve.label}, {nfe} NFE", **curve.style)
    axis.set_xticks(range(len(windows)), windows)
