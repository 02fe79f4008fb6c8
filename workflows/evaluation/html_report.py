"""HTML report of a sweep: metrics, plots and samples in one self-contained file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from workflows.evaluation.csv_report import MetricRow
from workflows.evaluation.rows import SettingResult, SweepMetadata

MAX_PAGE_BYTES = 24 << 20  # total size of the samples before base64 encoding
COLUMNS = (  # metric, heading
    ("frechet", "Frechet distance"),
    ("frechet_bias", "bias of the distance"),
    ("sync", "sync"),
    ("lse_c", "LSE-C"),
    ("sync_within_80ms", "within 80 ms"),
    ("syllable_error", "syllable error"),
    ("wer", "WER"),
    ("valid", "valid"),
    ("entropy", "entropy"),
    ("seam", "seam energy"),
    ("lag1", "lag-1"),
    ("history_use_video", "history use, video"),
    ("history_use_audio", "history use, audio"),
    ("identity_error", "identity error"),
    ("sharpness_over_real", "sharpness / real"),
    ("loudness_db", "loudness, dB"),
    ("silence", "silence"),
    ("frames_per_second", "frames per s"),
    ("first_chunk_s", "first chunk, s"),
    ("failed", "failed clips"),
)
PLOT_HEADINGS = {  # file name without suffix
    "frontier": "Against network evaluations",
    "seconds": "Against seconds of computation",
    "over_time": "Over the length of a clip",
    "offsets": "A/V offsets",
    "sheet": "The same prompt",
}


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """One sampling setting, the key of a table row."""

    label: str
    mode: str
    steps: int
    nfe: int
    guidance: float

    @property
    def text(self) -> str:
        if self.mode == "real":
            return "real clips, coded"
        plural = "s" if self.steps > 1 else ""
        guided = f", w = {self.guidance:g}" if self.guidance != 1 else ""
        return f"{self.label}: {self.mode}, {self.steps} step{plural}{guided}"


def write_html_report(
    folder: Path,
    title: str,
    *,
    facts: SweepMetadata,
    results: Sequence[SettingResult],
    metric_rows: Sequence[MetricRow],
    plots: Sequence[Path],
) -> Path:
    """Write ``report.html`` into ``folder`` and return its path."""
    overall = [metric_row for metric_row in metric_rows if metric_row.window == "all"]
    columns = [(metric, name) for metric, name in COLUMNS if _is_measured(overall, metric)]
    samples, left_out = _samples(folder, results)
    page = _template().render(
        title=title,
        facts=facts,
        headings=[name for _, name in columns],
        table=_table(overall, [metric for metric, _ in columns]),
        plots=[{"heading": PLOT_HEADINGS.get(p.stem, p.stem), "uri": _data_uri(p, "image/png")} for p in plots],
        samples=samples,
        samples_left_out=left_out,
        samples_folder=folder / "samples",
        missing=_missing(metric_rows),
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def _template() -> Template:
    path = Path(__file__).with_suffix(".html.jinja")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = _figure
    return environment.from_string(path.read_text())


def _is_measured(metric_rows: Sequence[MetricRow], metric: str) -> bool:
    return any(metric_row.metric == metric and metric_row.value is not None for metric_row in metric_rows)


def _setting_of(metric_row: MetricRow) -> _Setting:
    return _Setting(
        label=metric_row.label,
        mode=metric_row.mode,
        steps=metric_row.steps,
        nfe=metric_row.nfe,
        guidance=metric_row.guidance,
    )


def _table(metric_rows: Sequence[MetricRow], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per setting with one cell per metric; None: the setting has no such metric."""
    found = {(_setting_of(metric_row), metric_row.metric): metric_row for metric_row in metric_rows}
    settings = dict.fromkeys(_setting_of(metric_row) for metric_row in metric_rows)
    return [
        {
            "is_real": setting.mode == "real",
            "setting": setting.text,
            "nfe": setting.nfe,
            "cells": [found.get((setting, metric)) for metric in metrics],
        }
        for setting in settings
    ]


def _figure(value: float) -> str:
    """Return ``value`` with three digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _samples(folder: Path, results: Sequence[SettingResult]) -> tuple[list[dict[str, str]], int]:
    """Return captions and data URIs of samples up to ``MAX_PAGE_BYTES``, and the number of samples left out.

    The first prompt of every setting comes before the second prompts.
    """
    samples: list[dict[str, str]] = []
    bytes_left = MAX_PAGE_BYTES
    most = max(len(result["samples"]) for result in results)
    queue: list[tuple[SettingResult, str]] = []
    for i in range(most):
        queue += [(result, result["samples"][i]) for result in results if len(result["samples"]) > i]
    for result, name in queue:
        file, row = folder / name, result["rows"][0]
        if file.stat().st_size > bytes_left:
            continue
        bytes_left -= file.stat().st_size
        setting = _Setting(
            label=row["label"], mode=row["mode"], steps=row["steps"], nfe=row["nfe"], guidance=row["guidance"]
        )
        seed = f", seed {row['seed']}" if row["seed"] else ""
        samples.append({"caption": setting.text + seed, "uri": _data_uri(file, "video/mp4")})
    return samples, len(queue) - len(samples)


def _missing(metric_rows: Sequence[MetricRow]) -> dict[str, str]:
    """Return the metrics without a value in any setting, with the reason."""
    known = {metric_row.metric for metric_row in metric_rows if metric_row.value is not None}
    return {metric_row.metric: metric_row.note for metric_row in metric_rows if metric_row.metric not in known}


def _data_uri(path: Path, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"
