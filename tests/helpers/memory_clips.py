"""Clips in memory with reproducible latents."""

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import torch

from mfcore.codecs.stats import LatentStats
from mfcore.timeline import Timeline, audio_clock, video_clock
from mfcore.types import AUDIO, VIDEO
from workflows.data.batches import ClipSplit
from workflows.data.collate import BatchCollator

TIMELINE = Timeline(
    clocks={VIDEO: video_clock(Fraction(24), 4), AUDIO: audio_clock(16000, 1024)}, chunk_seconds=Fraction(1, 2)
)
STATS = {
    VIDEO: LatentStats(mean=(1.0,) * 6, std=(2.0,) * 6, head_mean=(3.0,) * 6, head_std=(4.0,) * 6),
    AUDIO: LatentStats(mean=(1.0,) * 5, std=(2.0,) * 5),
}
ASSEMBLY = BatchCollator(timeline=TIMELINE, stats=STATS)


class FakeClip:
    def __init__(self, number: int, chunks: int, size: int = 4) -> None:
        draw = torch.Generator().manual_seed(number)
        self.id = f"clip-{number}"
        self.chunks = chunks
        self.video = torch.randn(1 + TIMELINE.count(VIDEO, chunks), 6, size, size, generator=draw)
        self.audio = torch.randn(TIMELINE.count(AUDIO, chunks), 5, generator=draw)
        self.caption_embedding = torch.randn(1 + number % 3, 8, generator=draw)
        self.words = torch.randn(number % 4, 8, generator=draw)
        self.word_times = torch.rand(number % 4, 2, generator=draw, dtype=torch.float64)


def clips(count: int, first: int = 0, shortest: int = 6) -> ClipSplit:
    """Return ``count`` clips of 6, 7, 8, 6 ... chunks."""
    made = [FakeClip(first + i, shortest + i % 3) for i in range(count)]
    return ClipSplit(lengths=[c.chunks for c in made], read=made.__getitem__)


class RowGroupClips:
    """Clips in row groups that count how often each group is read."""

    def __init__(self, lengths: Sequence[int], sizes: Sequence[int], group: int) -> None:
        self.made = [FakeClip(i, *of) for i, of in enumerate(zip(lengths, sizes, strict=True))]
        self.group = group  # clips in a row group
        self.read: Counter[int] = Counter()

    def clips(self) -> ClipSplit:
        return ClipSplit(
            lengths=[c.chunks for c in self.made],
            read=self.made.__getitem__,
            groups=[i // self.group for i in range(len(self.made))],
            shapes=[tuple(c.video.shape[2:]) for c in self.made],
            load=self._load,
            ids=[c.id for c in self.made],
        )

    def _load(self, numbers: Sequence[int]) -> list[Callable[[], FakeClip]]:
        (group,) = {i // self.group for i in numbers}
        self.read[group] += 1
        return [partial(self.made.__getitem__, i) for i in numbers]
