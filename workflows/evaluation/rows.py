"""Types of a sweep's results: rows of ``results.json``, files in ``rows/``, metadata of the sweep."""

from collections.abc import Mapping
from typing import NotRequired, TypedDict

from mfcore.solver import SamplerName
from workflows.evaluation.contamination import OverlapSummary
from workflows.inference.precision import Precision


class SettingColumns(TypedDict):
    """Columns of a row that identify its setting."""

    checkpoint: str  # path as given; "real" for real clips
    mode: str  # few, multi or real
    steps: int
    sampler: NotRequired[SamplerName]  # not in rows of real clips and of earlier versions
    nfe: int  # function evaluations per chunk
    guidance: float
    seed: int
    precision: NotRequired[Precision]  # not in rows of real clips
    label: str
    workers: NotRequired[int]  # not in rows of real clips


class MetricDetail(TypedDict):
    """Clips behind one metric of a row, and its interval."""

    count: int
    failed: int
    low: NotRequired[float]  # bounds of the 90% bootstrap interval over clips
    high: NotRequired[float]


class SweepRow(SettingColumns):
    """All metrics of one setting, seed and window."""

    window: str  # "all": whole clips
    clips: int
    metrics: dict[str, float]
    detail: dict[str, MetricDetail]
    failures: dict[str, int]  # kind of failure -> clips
    not_measured: dict[str, str]  # metric -> reason
    offsets: NotRequired[list[float | None]]  # A/V offset per clip, seconds; only in rows of whole clips


class SettingResult(TypedDict):
    """Rows and kept samples of one setting."""

    digest: str  # of the weights; "real" for real clips
    name: str
    rows: list[SweepRow]  # whole clips first, then windows
    samples: list[str]  # paths below the folder of the sweep


class StoredSettingResult(SettingResult):
    """Content of one file in ``rows/``."""

    scope: str  # hash of clips, windows and feature models
    key: str


class SweepMetadata(TypedDict):
    """Facts about a whole sweep, for the report and the parent run."""

    dataset: str
    clips: int
    scope: str
    skipped: list[str]
    doubts: list[str]
    repeated: bool
    reference: str
    overlap: Mapping[str, OverlapSummary]  # label -> overlap with its training set
    weights: list[str]
