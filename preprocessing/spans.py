"""Lengths and boundaries of the spans that clips are cut from."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil


@dataclass(frozen=True, kw_only=True)
class SpanPlan:
    """Lengths of spans in frames and samples, by number of whole chunks."""

    frames: Sequence[int]  # frames of k whole chunks, at index k, up to the longest span
    samples: Sequence[int]  # samples that the latents of k whole chunks describe, if the source has them
    step: int  # frames from the start of a full span to the start of the next
    min_chunks: int  # chunks of the shortest span
    chunk: Fraction  # frames of a chunk

    def next_boundary(self, frame: int) -> int:
        """Return the first chunk boundary at or after `frame`."""
        return ceil(ceil(frame / self.chunk) * self.chunk)
