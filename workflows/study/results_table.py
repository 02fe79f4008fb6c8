from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from workflows.study.methods import METHODS

Rows = Sequence[Mapping[str, Any]]
COLUMNS = (
    "frechet", "valid", "syllable_error", "sync", "offset_ms", "identity_error", "voice_error", "voice_changes",
    "voice_entropy", "entropy", "seam", "lag1", "motion", "loudness", "failed",
)  # fmt: skip
DRIFT_COLUMNS = ("frechet", "identity_error", "voice_error")
EARLY, LATE = "0-5", "15-25"


@dataclass(frozen=True, kw_only=True)
class SeedStatistic:
    """A number over seeds."""

    mean: float
    spread: float  # standard deviation over seeds; 0 for one
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" +- {self.spread:.3f}" if self.seeds > 1 else "")


def seed_statistic(values: Iterable[float]) -> SeedStatistic:
    some = list(values)
    return SeedStatistic(mean=mean(some), spread=stdev(some) if len(some) > 1 else 0.0, seeds=len(some))


class ResultTable:
    """Metrics by (method, mode, steps, guided, window)."""

    def __init__(self, rows: Rows, costs: Rows) -> None:
        self._made_of = rows, costs
        values: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            key = (row["method"], row["mode"], row["steps"], row["guidance"] != 1.0, row["window"])
            for name, value in row["metrics"].items():
                values[key][name].append(value)
        self._values = {key: {n: seed_statistic(v) for n, v in some.items()} for key, some in values.items()}
        grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for cost in costs:
            grouped[cost["method"]].append(cost)
        self.costs = dict(grouped)

    @property
    def order(self) -> list[tuple[Any, ...]]:
        """Keys, method after method as they stand in ``METHODS``."""
        order = ["real", "joint", *METHODS]
        return sorted(self._values, key=lambda k: (order.index(k[0]), k[1], k[3], k[2]))

    def has(self, *key: Any) -> bool:
        return key in self._values

    def seeds(self, *methods: str) -> set[int]:
        """The seeds that any of ``methods`` has rows of."""
        return {row["seed"] for row in self._made_of[0] if row["method"] in methods}

    def trained(self, method: str) -> set[int]:
        """The seeds of its trainings on record."""
        return {cost["seed"] for cost in self.costs.get(method, ())}

    def with_seeds(self, seeds: Collection[int]) -> "ResultTable":
        """The same, of some seeds."""
        rows, costs = ([r for r in some if r["seed"] in seeds] for some in self._made_of)
        return ResultTable(rows, costs)

    def get(
        self, metric: str, method: str, mode: str, steps: int, window: str, *, guided: bool = False
    ) -> SeedStatistic:
        return self._values[method, mode, steps, guided, window][metric]

    def row(self, *key: Any) -> Mapping[str, SeedStatistic]:
        """All metrics of one key."""
        return self._values[key]

    def cost(self, method: str, of: Callable[[Mapping[str, Any]], float]) -> SeedStatistic:
        return seed_statistic(of(c) for c in self.costs[method])

    def history_use(self, method: str, modality: str) -> SeedStatistic:
        """Loss on another clip's history over loss on the clip's own, of the multi-step mode."""
        return self.cost(method, lambda c: c["history_use"][modality])


def method_title(method: str) -> str:
    """A method's name in tables, with its letter."""
    return f"{METHODS[method].key}) {METHODS[method].title}" if method in METHODS else method
