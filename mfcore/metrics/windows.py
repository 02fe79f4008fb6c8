"""Named windows of time, so that drift shows: 0-5, 5-15, 15-25 and 60- seconds."""

import re
from dataclasses import dataclass
from math import ceil, inf

DEFAULT_WINDOWS = "0-5,5-15,15-25,25-60,60-120"
"""The windows of METHOD 9: papers test 25 s, drift shows beyond."""

_FORM = re.compile(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)?")


@dataclass(frozen=True, kw_only=True)
class TimeWindow:
    """The times [start, end) in seconds; an ``end`` of infinity is the end of the clip."""

    start: float
    end: float = inf

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"a window from {self.start} to {self.end} s is empty: give 0 <= start < end")

    @property
    def name(self) -> str:
        return f"{self.start:g}-" + ("" if self.end == inf else f"{self.end:g}")

    def slice(self, rate: float, count: int) -> slice:
        """Indices of the values, of ``count`` at ``rate`` per second, that start in the window; value i at i / rate."""
        return slice(
            min(count, _first(self.start, rate)), count if self.end == inf else min(count, _first(self.end, rate))
        )


def parse_windows(text: str) -> tuple[TimeWindow, ...]:
    """Windows of a list such as ``0-5,5-15,60-``."""
    return tuple(_parse(part.strip()) for part in text.split(","))


def _parse(text: str) -> TimeWindow:
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no window of time: write start-end in seconds, e.g. 0-5, or 60- for the rest")
    start, end = match.groups()
    return TimeWindow(start=float(start), end=inf if end is None else float(end))


def _first(seconds: float, rate: float) -> int:
    # The tolerance is far below any clock's step and above the rounding of seconds * rate.
    return ceil(seconds * rate - 1e-6)
