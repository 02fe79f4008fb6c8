"""Matplotlib figures of several commands: contact sheets, histograms, panels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

MODE_COLORS = {"few": "#d1495b", "multi": "#30638e"}
_DPI = 130


@dataclass(frozen=True, kw_only=True)
class ClipStrip:
    """One clip of a contact sheet."""

    label: str
    frames: NDArray[np.uint8] | None  # (n, H, W, 3)
    sound: NDArray[np.float32] | None
    seconds: float
    words: str = ""  # under the waveform
    alarming: bool = False  # drawn in red

    def frame_at(self, at: float) -> NDArray[np.uint8] | None:
        """Return the frame at ``at`` seconds, None after the end."""
        if self.frames is None or at > self.seconds:
            return None
        return self.frames[round(at / max(self.seconds, 1e-6) * (len(self.frames) - 1))]


def contact_sheet(strips: Sequence[ClipStrip], path: Path, title: str, columns: int = 10) -> Path:
    """Draw one row per clip: frames at equal times, waveform below; return ``path``."""
    strips = [s for s in strips if s.frames is not None or s.sound is not None]
    has_video = any(s.frames is not None for s in strips)
    figure, axes = plt.subplots(
        2 * len(strips) if has_video else len(strips),
        1,
        figsize=(11, 0.5 + (1.42 if has_video else 0.8) * len(strips)),
        gridspec_kw={"height_ratios": [3, 1] * len(strips)} if has_video else None,
        squeeze=False,
        layout="constrained",
    )
    longest = max(s.seconds for s in strips)
    for i, strip in enumerate(strips):
        _draw_strip(list(axes[:, 0][2 * i : 2 * i + 2]) if has_video else [None, axes[i, 0]], strip, columns, longest)
    axes[-1, 0].tick_params(labelbottom=True, labelsize=8)
    axes[-1, 0].set_xlabel("seconds", fontsize=8)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return save_figure(figure, path)


def _draw_strip(axes: Sequence[Axes | None], strip: ClipStrip, columns: int, longest: float) -> None:
    """Draw frames and waveform on the time axis of the longest clip."""
    above, below = axes
    if above is not None:
        above.axis("off")
        if strip.frames is not None:
            white = np.full_like(strip.frames[0], 255)
            shown = [strip.frame_at(at) for at in np.linspace(0, longest - 1e-3, columns)]
            gap = white[:, :2]
            tiles: list[NDArray[np.uint8]] = []
            for frame in shown:
                tiles += [white if frame is None else frame, gap]
            row = np.concatenate(tiles[:-1], axis=1)
            above.imshow(row, aspect="auto", interpolation="nearest")
    assert below is not None
    if strip.sound is not None:
        times = np.arange(len(strip.sound)) / max(len(strip.sound), 1) * strip.seconds
        below.plot(times, strip.sound, lw=0.4, color=MODE_COLORS["few"] if strip.alarming else "#333333")
    below.set_xlim(0, longest)
    below.set_ylim(-0.6, 0.6)
    below.set_yticks([])
    below.tick_params(labelbottom=False, length=2)
    below.spines[["top", "right", "left"]].set_visible(False)
    target = above or below
    color = MODE_COLORS["few"] if strip.alarming else "black"
    target.text(-0.008, 0.5, strip.label, transform=target.transAxes, ha="right", va="center", fontsize=8, color=color)
    if strip.words:
        shown = strip.words.encode("ascii", "replace").decode()[:150].replace("$", r"\$")
        below.text(0, -0.05, shown, transform=below.transAxes, ha="left", va="top", fontsize=6, color=color)


def plot_histograms(values: Mapping[str, Sequence[float]], path: Path, title: str) -> Path:
    """Draw one histogram per name; return ``path``."""
    figure, axes = panel_grid(len(values))
    for axis, (name, numbers) in zip(axes, values.items(), strict=False):
        axis.hist(numbers, bins=30, color=MODE_COLORS["multi"])
        axis.set_title(name, fontsize=9)
    finish_figure(figure, axes, title, len(values))
    return save_figure(figure, path)


def panel_grid(panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with at least ``panels`` axes, three per row."""
    wide = min(3, panels)
    tall = -(-panels // wide)
    figure, axes = plt.subplots(
        tall, wide, figsize=(3.7 * wide + 0.2, 2.7 * tall + 0.9), squeeze=False, layout="constrained"
    )
    return figure, list(axes.ravel())


def finish_figure(figure: Figure, axes: Sequence[Axes], title: str, used: int) -> None:
    """Add grid, title and one legend below the first ``used`` panels; hide the other panels."""
    for axis in axes[:used]:
        axis.grid(color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[used:]:
        axis.axis("off")
    entries: dict[str, Any] = {}
    for axis in axes[:used]:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure, close it and return ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
