from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil


@dataclass(frozen=True, kw_only=True)
class SpanPlan:
    """How long spans are."""

    frames: Sequence[int]  # frames that k whole chunks take, at index k, up to the longest span
    samples: Sequence[int]  # samples that the latents of k whole chunks describe, where the source has them
    step: int  # frames from the start of a full span to the start of the next
    min_chunks: int  # chunks of the shortest span
    chunk: Fraction  # frames of a chunk

    def next_boundary(self, frame: int) -> int:
        """The first frame from this one on with which a chunk begins."""
        return ceil(ceil(frame / self.chunk) * self.chunk)
