"""Result rows of a study, and their means over seeds."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import NotRequired, TypedDict

from mfcore.solver import Mode, SamplerName
from workflows.study.methods import METHODS

COLUMNS = (
    "frechet", "valid", "syllable_error", "sync", "offset_ms", "identity_error", "voice_error", "voice_changes",
    "voice_entropy", "entropy", "seam", "lag1", "motion", "loudness", "failed",
)  # fmt: skip
DRIFT_COLUMNS = ("frechet", "identity_error", "voice_error")
EARLY, LATE = "0-5", "15-25"


class StudyRow(TypedDict):
    """Scores of one window, as stored in ``rows/*.json``."""

    method: str
    mode: Mode
    steps: int  # per chunk; 0: real clips
    nfe: int
    guidance: float
    sampler: NotRequired[SamplerName]  # not in rows of the deterministic sampler
    seed: int
    window: str
    clips: NotRequired[int]
    metrics: dict[str, float]


class TrainingCost(TypedDict):
    """Cost of one training, as stored in ``train.json``."""

    method: str
    seed: int
    steps: int
    history_use: dict[str, float]  # by modality
    state_bytes: int
    peak_memory_bytes: NotRequired[int]
    cpu_seconds: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ResultSeries:
    """One method in one mode: a line of a plot, an MLflow run."""

    method: str
    mode: Mode
    guided: bool
    sampler: SamplerName = "deterministic"

    @classmethod
    def of_row(cls, row: StudyRow) -> "ResultSeries":
        """Return the series of a stored row."""
        sampler = row.get("sampler", "deterministic")
        return cls(method=row["method"], mode=row["mode"], guided=row["guidance"] != 1.0, sampler=sampler)

    @property
    def mode_title(self) -> str:
        """Return mode, guidance and sampler as shown in tables."""
        if self.mode == "multi":
            return "Euler, guided" if self.guided else "Euler"
        return "few-step" if self.sampler == "deterministic" else f"few-step, {self.sampler}"

    @property
    def order(self) -> tuple[str, bool, str]:
        """Return the sort key of the series of a method."""
        return self.mode, self.guided, self.sampler


@dataclass(frozen=True, kw_only=True)
class ResultKey:
    """One line of a result table."""

    series: ResultSeries
    steps: int
    window: str


@dataclass(frozen=True, kw_only=True)
class SeedStatistic:
    """Mean and spread over seeds."""

    mean: float
    spread: float  # standard deviation; 0 for one seed
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" +- {self.spread:.3f}" if self.seeds > 1 else "")


def seed_statistic(values: Iterable[float]) -> SeedStatistic:
    """Return mean and spread of one value per seed."""
    by_seed = list(values)
    spread = stdev(by_seed) if len(by_seed) > 1 else 0.0
    return SeedStatistic(mean=mean(by_seed), spread=spread, seeds=len(by_seed))


class ResultTable:
    """Metrics by method, mode, guidance, steps and window, over seeds."""

    def __init__(self, rows: Sequence[StudyRow], costs: Sequence[TrainingCost]) -> None:
        self.rows = rows
        self._costs = costs
        values: dict[ResultKey, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            key = ResultKey(series=ResultSeries.of_row(row), steps=row["steps"], window=row["window"])
            for name, value in row["metrics"].items():
                values[key][name].append(value)
        self._values: dict[ResultKey, dict[str, SeedStatistic]] = {}
        for key, metrics in values.items():
            self._values[key] = {name: seed_statistic(by_seed) for name, by_seed in metrics.items()}
        grouped: dict[str, list[TrainingCost]] = defaultdict(list)
        for cost in costs:
            grouped[cost["method"]].append(cost)
        self.costs = dict(grouped)

    @property
    def keys(self) -> list[ResultKey]:
        """Return the keys in the order of ``METHODS``."""
        order = ["real", "joint", *METHODS]
        return sorted(self._values, key=lambda k: (order.index(k.series.method), *k.series.order, k.steps))

    def has(self, method: str, mode: Mode, *, steps: int, window: str, guided: bool = False) -> bool:
        """Return True if there are rows of this key."""
        series = ResultSeries(method=method, mode=mode, guided=guided)
        return ResultKey(series=series, steps=steps, window=window) in self._values

    def seeds(self, *methods: str) -> set[int]:
        """Return the seeds of the rows of any of ``methods``."""
        return {row["seed"] for row in self.rows if row["method"] in methods}

    def trained(self, method: str) -> set[int]:
        """Return the seeds of the recorded trainings of a method."""
        return {cost["seed"] for cost in self.costs.get(method, ())}

    def with_seeds(self, seeds: Collection[int]) -> "ResultTable":
        """Return a table of some seeds only."""
        rows = [row for row in self.rows if row["seed"] in seeds]
        costs = [cost for cost in self._costs if cost["seed"] in seeds]
        return ResultTable(rows, costs)

    def get(
        self, metric: str, method: str, mode: Mode, *, steps: int, window: str, guided: bool = False
    ) -> SeedStatistic:
        """Return one metric. Raises KeyError without rows of this key."""
        series = ResultSeries(method=method, mode=mode, guided=guided)
        return self._values[ResultKey(series=series, steps=steps, window=window)][metric]

    def row(self, key: ResultKey) -> Mapping[str, SeedStatistic]:
        """Return all metrics of one key."""
        return self._values[key]

    def cost(self, method: str, value: Callable[[TrainingCost], float]) -> SeedStatistic:
        """Return a value of the training costs over seeds."""
        return seed_statistic(value(cost) for cost in self.costs[method])

    def history_use(self, method: str, modality: str) -> SeedStatistic:
        """Return the loss on another clip's history over that on the true history."""
        return self.cost(method, lambda c: c["history_use"][modality])


def method_title(method: str) -> str:
    """Return the title of a method in tables, with its letter."""
    return f"{METHODS[method].key}) {METHODS[method].title}" if method in METHODS else method
