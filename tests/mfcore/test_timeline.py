"""Clocks: every latent is in exactly one chunk, and times do not drift."""

from fractions import Fraction

import pytest
import torch

from mfcore.timeline import LatentClock, Timeline, audio_clock, video_clock, whole_frames
from mfcore.types import AUDIO, VIDEO

FPS = [Fraction(24000, 1001), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30)]
CLOCKS = [video_clock(fps, 4) for fps in FPS] + [audio_clock(44100, 2048), audio_clock(16000, 1024)]  # 21.53, 15.625 Hz
CHUNKS = [Fraction(1, 2), Fraction(2, 3), Fraction(1)]
THREE_HOURS = 3 * 3600


def timeline(clock: LatentClock, chunk: Fraction) -> Timeline:
    return Timeline(clocks={VIDEO: clock}, chunk_seconds=chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("clock", CLOCKS)
def test_counts_differ_by_at_most_one_and_sum_to_the_total(clock, chunk):
    line = timeline(clock, chunk)
    counts = [line.count(VIDEO, 1, k) for k in range(200)]
    assert max(counts) - min(counts) <= 1
    assert max(counts) == line.max_count(VIDEO) or max(counts) == line.max_count(VIDEO) - 1
    assert sum(counts) == line.count(VIDEO, 200)
    assert sum(counts[30:70]) == line.count(VIDEO, 40, first=30)
    assert line.count(VIDEO, 0, first=30) == 0


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("clock", CLOCKS)
def test_a_latent_is_in_the_chunk_in_which_it_starts(clock, chunk):
    line = timeline(clock, chunk)
    for i in range(300):
        k = int(clock.start(i) // chunk)
        first, last = line.bounds(VIDEO, k)
        assert first <= i < last
        assert k * chunk <= clock.start(i) < (k + 1) * chunk
    times, index = line.times(VIDEO, 50), line.chunk_index(VIDEO, 50)
    assert torch.equal(index, torch.tensor([int(clock.start(i) // chunk) for i in range(len(times))]))
    assert times.tolist() == [float(clock.start(i)) for i in range(len(times))]


@pytest.mark.parametrize("clock", CLOCKS)
def test_times_do_not_drift_in_three_hours(clock):
    line = timeline(clock, Fraction(1, 2))
    late = 2 * THREE_HOURS
    times = line.times(VIDEO, 4, first=late)
    assert bool(((times >= THREE_HOURS) & (times < THREE_HOURS + 2)).all())
    index = line.bounds(VIDEO, late)[0]
    exact = clock.offset + Fraction(index) / clock.rate
    assert abs(float(times[0]) - exact) < 1e-11  # one rounding of float64, not one per latent
    assert line.count(VIDEO, late) == index  # exactly the latents before


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("clock", CLOCKS)
def test_whole_chunks_contain_their_last_latent(clock, chunk):
    line = timeline(clock, chunk)
    for latents in range(120):
        k = line.whole_chunks({VIDEO: latents})
        assert line.count(VIDEO, k) <= latents < line.count(VIDEO, k + 1)


def test_the_shorter_modality_limits_the_whole_chunks():
    line = Timeline(clocks={VIDEO: CLOCKS[1], AUDIO: CLOCKS[-2]}, chunk_seconds=Fraction(1, 2))
    enough = {m: line.count(m, 7) for m in (VIDEO, AUDIO)}
    assert line.whole_chunks(enough) == 7
    for m in (VIDEO, AUDIO):
        assert line.whole_chunks(enough | {m: enough[m] - 1}) == 6
        assert line.whole_chunks({m: enough[m]}) == 7


@pytest.mark.parametrize("fps", FPS)
def test_the_video_clock_counts_from_the_frame_after_the_first(fps):
    clock = video_clock(fps, 4)
    assert clock.head == 1
    for i in range(50):
        assert clock.start(i) == (1 + 4 * i) / fps  # frames 1 + 4 i .. 4 + 4 i
        assert whole_frames(clock.start(i), fps) == 1 + 4 * i
        assert whole_frames(clock.start(i) + Fraction(1, 10**9), fps) == 2 + 4 * i


def test_an_invalid_clock_or_chunk_is_rejected():
    for rate, offset in ((0, 0), (-1, 0), (6, -1), (6, 1)):
        with pytest.raises(ValueError, match="rate"):
            LatentClock(rate=Fraction(rate), offset=Fraction(offset))
    with pytest.raises(ValueError, match="longer chunk"):
        timeline(CLOCKS[1], Fraction(1, 10))
