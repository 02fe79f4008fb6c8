"""Table of a sweep with one row per metric, for spreadsheets."""

import csv
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from workflows.evaluation.rows import SweepRow


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric of one setting in one window, averaged over seeds."""

    label: str
    mode: str
    steps: int
    nfe: int
    guidance: float
    window: str
    metric: str
    value: float | None  # mean over seeds; None: not measured
    spread: float | None  # standard deviation over seeds
    seeds: int
    clips: int  # of all seeds, including failed ones
    failed: int  # clips that count with the worst score
    low: float | None  # of the 90% bootstrap interval over clips, mean over seeds
    high: float | None
    note: str  # the reason if the metric is not measured


def to_rows(rows: Sequence[SweepRow]) -> list[MetricRow]:
    """Return one row per setting, window and metric; seeds are averaged."""
    by_setting: dict[Hashable, list[SweepRow]] = {}
    for row in rows:
        by_setting.setdefault(_setting_key(row), []).append(row)
    found: list[MetricRow] = []
    for seeds in by_setting.values():
        found += [_metric_row(seeds, metric) for metric in _metric_names(seeds)]
    return found


def _setting_key(row: SweepRow) -> Hashable:
    return row["label"], row["mode"], row["steps"], row["nfe"], row["guidance"], row["window"]


def _metric_names(rows: Sequence[SweepRow]) -> list[str]:
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys([*row["metrics"], *row["not_measured"]])
    return list(names)


def _metric_row(rows: Sequence[SweepRow], metric: str) -> MetricRow:
    measured = [row for row in rows if metric in row["metrics"]]
    values = [row["metrics"][metric] for row in measured]
    details = [row["detail"][metric] for row in measured if metric in row["detail"]]
    bounds = [(d["low"], d["high"]) for d in details if "low" in d and "high" in d]
    low, high = np.mean(bounds, axis=0).tolist() if bounds else (None, None)
    first = rows[0]
    return MetricRow(
        label=first["label"],
        mode=first["mode"],
        steps=first["steps"],
        nfe=first["nfe"],
        guidance=first["guidance"],
        window=first["window"],
        metric=metric,
        value=float(np.mean(values)) if values else None,
        spread=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        seeds=len(rows),
        clips=sum(d["count"] for d in details),
        failed=sum(d["failed"] for d in details),
        low=low,
        high=high,
        note="" if measured else rows[0]["not_measured"][metric],
    )


def write_csv(found: Sequence[MetricRow], path: Path) -> Path:
    """Write a CSV file with a header; missing values are empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(MetricRow)])
        writer.writeheader()
        writer.writerows(asdict(line) for line in found)
    return path
