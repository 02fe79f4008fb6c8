"""A sweep as one line per number: what a reviewer loads into a spreadsheet."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric of one setting in one window."""

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
    clips: int  # of all seeds, the failed ones included
    failed: int  # of these, counted with the worst score
    low: float | None  # of the 90% bootstrap interval over clips, mean over seeds
    high: float | None
    note: str  # what a number that is not measured needs


def to_rows(rows: Rows) -> list[MetricRow]:
    """Seeds of one setting together; every metric of the sweep in every setting."""
    keys = dict.fromkeys(_key(row) for row in rows)
    return [line for key in keys for line in _of_setting([row for row in rows if _key(row) == key])]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("label", "mode", "steps", "nfe", "guidance", "window"))


def _of_setting(rows: Rows) -> list[MetricRow]:
    names = dict.fromkeys(name for row in rows for kind in ("metrics", "not_measured") for name in row[kind])
    return [_line(rows, name) for name in names]


def _line(rows: Rows, metric: str) -> MetricRow:
    known = [row for row in rows if metric in row["metrics"]]
    values = [row["metrics"][metric] for row in known]
    details = [row["detail"][metric] for row in known if metric in row["detail"]]
    bounds = [(d["low"], d["high"]) for d in details if "low" in d]
    low, high = np.mean(bounds, axis=0).tolist() if bounds else (None, None)
    first = rows[0]
    return MetricRow(
        **{name: first[name] for name in ("label", "mode", "steps", "nfe", "guidance", "window")},
        metric=metric,
        value=float(np.mean(values)) if values else None,
        spread=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        seeds=len(rows),
        clips=sum(d["count"] for d in details),
        failed=sum(d["failed"] for d in details),
        low=low,
        high=high,
        note="" if known else rows[0]["not_measured"][metric],
    )


def write_csv(found: Sequence[MetricRow], path: Path) -> Path:
    """CSV with a head line; empty where there is no value."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(MetricRow)])
        writer.writeheader()
        writer.writerows(asdict(line) for line in found)
    return path
