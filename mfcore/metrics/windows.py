"""Windows of time that are scored separately, such as 0-5, 5-15, 15-25 and 60- seconds."""

import re
from dataclasses import dataclass
from math import ceil, inf

from mfcore.errors import UserInputError

DEFAULT_WINDOWS = "0-5,5-15,15-25,25-60,60-120"
"""Windows of METHOD 9: papers test 25 s, drift appears later."""

_FORM = re.compile(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)?")


@dataclass(frozen=True, kw_only=True)
class TimeWindow:
    """Times [start, end) in seconds; an ``end`` of infinity is the end of the clip."""

    start: float
    end: float = inf

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise UserInputError(f"time window {self.start} to {self.end} s is empty: give 0 <= start < end")

    @property
    def name(self) -> str:
        """The window as written on the command line, such as ``5-15``."""
        return f"{self.start:g}-" + ("" if self.end == inf else f"{self.end:g}")

    def slice(self, rate: float, count: int) -> slice:
        """Return the indices of ``count`` values at ``rate`` per second that start in the window."""
        stop = count if self.end == inf else min(count, _first_index(self.end, rate))
        return slice(min(count, _first_index(self.start, rate)), stop)


def parse_windows(text: str) -> tuple[TimeWindow, ...]:
    """Return the windows of a list such as ``0-5,5-15,60-``."""
    return tuple(_parse(part.strip()) for part in text.split(","))


def _parse(text: str) -> TimeWindow:
    match = _FORM.fullmatch(text)
    if match is None:
        raise UserInputError(
            f"invalid time window '{text}': write start-end in seconds, such as 0-5, or 60- for the rest"
        )
    start, end = match.groups()
    return TimeWindow(start=float(start), end=inf if end is None else float(end))


def _first_index(seconds: float, rate: float) -> int:
    # The tolerance is far below the step of any clock and above the rounding of seconds * rate.
    return ceil(seconds * rate - 1e-6)
