"""Plots of a study: quality against evaluations, and drift over the length of a clip."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workflows.study.methods import METHODS

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
STEPS_SHOWN = 4  # of the plot over time
_DPI = 120


def draw(rows: Rows, folder: Path) -> list[Path]:
    """``frontier.png`` (first window) and ``drift.png`` (4 steps, all windows)."""
    windows = sorted({row["window"] for row in rows}, key=lambda w: float(w.split("-")[0]))
    lines = _lines(rows)
    made = [_page(folder / "frontier.png", f"{windows[0]} s, against network evaluations", lines, "nfe", windows[:1])]
    if len(windows) > 1:
        at = {k: v for k, v in lines.items() if k[1] == "few" or k[0] in ("joint", "teacher_forcing")}
        made.append(_page(folder / "drift.png", f"{STEPS_SHOWN} steps per chunk, over time", at, "window", windows))
    return made


def _lines(rows: Rows) -> dict[tuple[str, str, bool], list[Mapping[str, Any]]]:
    lines: dict[tuple[str, str, bool], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["steps"]:
            lines[row["method"], row["mode"], row["guidance"] != 1.0].append(row)
    return lines


def _page(path: Path, title: str, lines: Mapping[Any, Rows], against: str, windows: Sequence[str]) -> Path:
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.5), constrained_layout=True)
    for axis, (metric, name) in zip(axes.flat, PANELS, strict=True):
        for number, (key, rows) in enumerate(lines.items()):
            _line(axis, key, rows, metric, against, windows, number)
        axis.set_title(name, fontsize=10, loc="left")
        if against == "nfe":
            axis.set_xscale("log", base=2)
        else:
            axis.set_xticks(range(len(windows)), windows)
        if metric in ("frechet", "identity_error", "voice_error", "seam"):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title)
    return _saved(figure, path)


def _line(
    axis: Axes, key: tuple[str, str, bool], rows: Rows, metric: str, against: str, windows: Sequence[str], number: int
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
    (drawn,) = axis.plot(xs, middle, style, marker="o", markersize=3, label=label, color=f"C{number % 10}")
    axis.fill_between(xs, middle - spread, middle + spread, color=drawn.get_color(), alpha=0.15)


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
