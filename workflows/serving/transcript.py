"""Transcript of a session: words with times since the start of the clip, appended while the clip is made."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mfcore.errors import UserInputError
from preprocessing.records import Word

START_SECONDS = 0.1  # before the first word of a clip
LEAD_SECONDS = 0.5  # between the start of the next chunk and the first word: the network reads words before they begin
GAP_SECONDS = 0.3  # between two texts
MAX_SCHEDULED_SECONDS = 600.0  # between now and the end of the last word


@dataclass(kw_only=True)
class ScheduledWords:
    """Words that are not past. Mutable: texts are appended and past words removed, so that cost is constant."""

    words: list[Word] = field(default_factory=list)
    end: float = 0.0  # of the last word ever scheduled, in seconds

    def append(self, words: Sequence[Word], now: float) -> tuple[float, float]:
        """Schedule words with times from 0 after all others and after `now`; return the first start and last end.

        Raises UserInputError if too much text waits.
        """
        if self.end - now > MAX_SCHEDULED_SECONDS:
            raise UserInputError(
                f"{self.end - now:.0f} s of text wait to be spoken: send more text when they are below "
                f"{MAX_SCHEDULED_SECONDS:.0f} s"
            )
        lead = LEAD_SECONDS if now else START_SECONDS
        start = max(now + lead, self.end + GAP_SECONDS if self.end else 0.0) - words[0].start
        moved = [replace(w, start=w.start + start, end=w.end + start) for w in words]
        self.words += moved
        self.end = moved[-1].end
        return moved[0].start, self.end

    def within(self, first: float, last: float) -> list[Word]:
        """Return the words with their middle between two times."""
        return [w for w in self.words if first <= (w.start + w.end) / 2 <= last]

    def forget_before(self, seconds: float) -> None:
        """Remove words that end before a time."""
        self.words = [w for w in self.words if w.end >= seconds]
