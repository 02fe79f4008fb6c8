"""Plots of a study: quality against evaluations, drift over the length of a clip, and what one change does."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workflows.study.methods import ABLATIONS, BASELINES, METHODS

matplotlib.use("Agg")

Rows = Sequence[Mapping[str, Any]]
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
STEPS_SHOWN = 4  # of the plots over time and of ablations
_DPI = 120
_LOG = ("frechet", "identity_error", "voice_error", "seam")
_COLORS = {name: f"C{number}" for number, name in enumerate(BASELINES)} | {"joint": "k"}  # alike on all plots


def draw_plots(rows: Rows, folder: Path) -> list[Path]:
    """``frontier.png`` (first window), ``drift.png`` (all windows), ``ablations.png``, as far as there are rows."""
    windows = sorted({row["window"] for row in rows}, key=lambda w: float(w.split("-")[0]))
    lines = _lines(rows)
    table = {k: v for k, v in lines.items() if k[0] not in ABLATIONS}
    made = [_page(folder / "frontier.png", f"{windows[0]} s, against network evaluations", table, "nfe", windows[:1])]
    if len(windows) > 1:
        at = {k: v for k, v in table.items() if k[1] == "few" or k[0] in ("joint", "teacher_forcing")}
        made.append(_page(folder / "drift.png", f"{STEPS_SHOWN} steps per chunk, over time", at, "window", windows))
    if changed := [name for name in ABLATIONS if _at(rows, name, windows[0])]:
        made.append(_changes(folder / "ablations.png", rows, changed, windows))
    return made


def _at(rows: Rows, method: str, window: str) -> list[Mapping[str, float]]:
    """Metrics of the few-step mode at ``STEPS_SHOWN`` steps, of each seed."""
    asked = (method, "few", STEPS_SHOWN, window)
    return [r["metrics"] for r in rows if (r["method"], r["mode"], r["steps"], r["window"]) == asked]


def _changes(path: Path, rows: Rows, names: Sequence[str], windows: Sequence[str]) -> Path:
    """A row per ablation; behind it the range of the unchanged method's seeds."""
    figure, axes = plt.subplots(2, 4, figsize=(17, 3 + 0.42 * len(names)), constrained_layout=True, sharey=True)
    late = next((w for w in reversed(windows) if float(w.split("-")[1]) <= 25.0), windows[-1])  # with all the clips
    for axis, (metric, name) in zip(axes.flat, PANELS, strict=True):
        for window, color in dict(zip((windows[0], late), ("C0", "C3"), strict=True)).items():
            whole = [m[metric] for m in _at(rows, "mutual", window)]
            if whole:
                axis.axvspan(min(whole), max(whole), color=color, alpha=0.15)
                axis.axvline(float(np.mean(whole)), color=color, lw=0.8)
            values = [float(np.mean([m[metric] for m in _at(rows, n, window)])) for n in names]
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
    return _saved(figure, path)


def _lines(rows: Rows) -> dict[tuple[str, str, bool], list[Mapping[str, Any]]]:
    lines: dict[tuple[str, str, bool], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["steps"]:
            lines[row["method"], row["mode"], row["guidance"] != 1.0].append(row)
    order = ["joint", *METHODS]
    return {key: lines[key] for key in sorted(lines, key=lambda key: (order.index(key[0]), key[1:]))}


def _page(path: Path, title: str, lines: Mapping[Any, Rows], against: str, windows: Sequence[str]) -> Path:
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.5), constrained_layout=True)
    for axis, (metric, name) in zip(axes.flat, PANELS, strict=True):
        for key, rows in lines.items():
            _line(axis, key, rows, metric, against, windows)
        axis.set_title(name, fontsize=10, loc="left")
        if against == "nfe":
            axis.set_xscale("log", base=2)
        else:
            axis.set_xticks(range(len(windows)), windows)
        if metric in _LOG:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title)
    return _saved(figure, path)


def _line(
    axis: Axes, key: tuple[str, str, bool], rows: Rows, metric: str, against: str, windows: Sequence[str]
) -> None:
    points: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if row["window"] in windows and (against == "nfe" or row["steps"] == STEPS_SHOWN):
            x = row["nfe"] if against == "nfe" else windows.index(row["window"])
            points[x].append(row["metrics"][metric])
    if not points:
        return
    xs = sorted(points)
    middle, spread = (np.array([f(points[x]) for x in xs]) for f in (np.mean, np.std))
    method, mode, guided = key
    title = METHODS[method].title if method in METHODS else method
    label = title + {"few": "", "multi": ", guided" if guided else ", Euler"}[mode]
    style = {"few": "-", "multi": ":" if guided else "--"}[mode]
    (drawn,) = axis.plot(
        xs,
        middle,
        style,
        marker="o",
        markersize=3,
        label=label,
        color=_COLORS[method],
        lw=2.5 if method == "mutual" else 1.2,
    )
    axis.fill_between(xs, middle - spread, middle + spread, color=drawn.get_color(), alpha=0.15)


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
