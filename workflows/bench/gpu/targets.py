"""Targets of the GPU measurements. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict


class TargetResult(TypedDict):
    """One target with its measured value."""

    target: float
    measured: float | None  # None: not measured
    met: bool | None


@dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """Bound on one number of a case, or on its ratio to the same number of another case."""

    part: str
    case: str
    key: str
    over: str | None = None  # case of the denominator
    bound: float
    kind: Literal["at least", "at most"] = "at least"

    def value(self, records: Sequence[Mapping[str, Any]]) -> float | None:
        """Return the measured value, None if it is missing."""
        own = self._number(records, self.case)
        if self.over is None or own is None:
            return own
        other = self._number(records, self.over)
        return own / other if other else None

    def is_met(self, value: float) -> bool:
        """Return True if the value is within the bound."""
        return value >= self.bound if self.kind == "at least" else value <= self.bound

    def _number(self, records: Sequence[Mapping[str, Any]], case: str) -> float | None:
        for record in records:
            if (record.get("part"), record.get("case"), record.get("status")) == (self.part, case, "done"):
                return record.get("result", {}).get(self.key)
        return None


SMALLEST = "full 192x336"
TARGETS = {
    **{
        f"frames per second at {size}": GpuTarget(part="stream", case=f"full {size} graphs", key="fps", bound=bound)
        for size, bound in (("192x336", 60.0), ("480x768", 24.0), ("704x1280", 7.0))
    },
    "first chunk in seconds": GpuTarget(
        part="stream", case=f"{SMALLEST} graphs", key="first_chunk_s", bound=0.3, kind="at most"
    ),
    "chunk 500 over chunk 20": GpuTarget(
        part="stream", case=f"{SMALLEST} graphs", key="late_over_early", bound=1.05, kind="at most"
    ),
    "memory at chunk 500 over chunk 20": GpuTarget(
        part="stream", case=f"{SMALLEST} graphs", key="memory_late_over_early", bound=1.001, kind="at most"
    ),
    **{
        f"speed-up of {switches.replace('-', ' and ')}": GpuTarget(
            part="stream", case=f"{SMALLEST} {switches}", over=f"{SMALLEST} eager", key="fps", bound=1.02
        )
        for switches in ("graphs", "compile", "compile-graphs")
    },
    "MFU of base, joint": GpuTarget(part="train", case="base joint", key="mfu", bound=0.45),
    "MFU of base, joint, compiled": GpuTarget(part="train", case="base joint compile", key="mfu", bound=0.45),
}
"""Targets by name; only cases of the presets ``full`` and ``base`` have them."""


def check_targets(records: Sequence[Mapping[str, Any]]) -> dict[str, TargetResult]:
    """Return all targets with their measured values."""
    found: dict[str, TargetResult] = {}
    for name, target in TARGETS.items():
        value = target.value(records)
        met = None if value is None else target.is_met(value)
        found[name] = {"target": target.bound, "measured": value, "met": met}
    return found
