"""Live muxing: counted timestamps, no gap at chunk borders, fragments that play while the clip is made."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from preprocessing.media.live_muxer import GENERATED, OUTPUT_RATE, LiveMuxer
from preprocessing.media.mp4_boxes import without_description

FPS, RATE, SIZE = 24, 16000, 64
CHUNK = Fraction(1, 2)


def sound(start: int, count: int) -> np.ndarray:
    """Return a quiet tone with a beep of 40 ms at every whole second."""
    n = np.arange(start, start + count)
    beep = 0.8 * np.sin(2 * np.pi * 2000 * n / RATE)
    tone = 0.1 * np.sin(2 * np.pi * 400 * n / RATE)
    return np.where(n % RATE < 640, beep, tone).astype(np.float32)


def picture(start: int, count: int) -> np.ndarray:
    """Return black frames with a white one at every whole second."""
    frames = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    frames[[i for i in range(count) if (start + i) % FPS == 0]] = 255
    return frames


def muxed(chunks: int) -> list[bytes]:
    muxer = LiveMuxer(fps=Fraction(FPS), size=(SIZE, SIZE), sample_rate=RATE)
    parts = [muxer.push(picture(12 * k, 12), sound(8000 * k, 8000)) for k in range(chunks)]
    return [*parts, muxer.close()]


def decoded(data: bytes) -> tuple[list[tuple[float, float, bool]], np.ndarray, float]:
    """Return (time, brightness, key frame) of all frames, the samples, and the time of the first one."""
    with av.open(io.BytesIO(data)) as container:
        frames = [
            (float(f.time), float(f.to_ndarray(format="gray").mean()), f.key_frame) for f in container.decode(video=0)
        ]
    with av.open(io.BytesIO(data)) as container:
        parts = [(float(f.time), f.to_ndarray()[0]) for f in container.decode(audio=0)]
    return frames, np.concatenate([samples for _, samples in parts]), parts[0][0]


def test_flash_and_beep_stay_together_for_a_hundred_chunks():
    frames, samples, first = decoded(b"".join(muxed(100)))
    assert len(frames) == 1200
    flashes = [time for time, bright, _ in frames if bright > 128]
    assert flashes == [float(k) for k in range(50)]
    loud = np.flatnonzero(np.abs(samples) > 0.5) / OUTPUT_RATE + first
    beeps = loud[np.r_[True, np.diff(loud) > 0.5]]
    assert np.abs(beeps[1:] - np.arange(1, 50)).max() < 0.001  # the first one starts with the encoder


def test_the_sound_has_no_gap_and_no_click_at_chunk_borders():
    _, samples, first = decoded(b"".join(muxed(100)))
    border = (np.arange(1, 99) * float(CHUNK) - first) * OUTPUT_RATE
    between = border[np.arange(len(border)) % 2 == 0].astype(int)  # half seconds: only the tone
    window = 240  # 5 ms
    energy = np.asarray([np.sqrt(np.square(samples[b - window : b + window]).mean()) for b in between])
    inside = np.sqrt(np.square(samples[between[0] + 4800 : between[0] + 9600]).mean())
    assert np.abs(energy / inside - 1).max() < 0.15
    jump = max(np.abs(np.diff(samples[b - window : b + window])).max() for b in between)
    usual = np.abs(np.diff(samples[between[0] + 4800 : between[0] + 9600])).max()
    assert jump < 1.2 * usual


def test_every_chunk_starts_with_a_key_frame_and_is_sent_at_once():
    parts = muxed(6)
    frames, _, _ = decoded(b"".join(parts))
    assert [round(time, 3) for time, _, key in frames if key] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    for k in range(1, 6):  # what was sent after k chunks shows all of their frames but one
        shown, _, _ = decoded(b"".join(parts[:k]))
        assert len(shown) >= 12 * k - 1


def test_clips_are_marked_as_generated():
    with av.open(io.BytesIO(b"".join(muxed(1)))) as container:
        assert container.metadata["comment"] == GENERATED


@pytest.mark.parametrize("rate", [16000, 22050, 44100])
def test_a_continued_stream_has_no_seam(rate):
    chunk = rate // 2
    options = dict(fps=Fraction(FPS), size=(SIZE, SIZE), sample_rate=rate)
    tone = (0.3 * np.sin(2 * np.pi * 400 * np.arange(20 * chunk) / rate)).astype(np.float32)
    delay = rate // 20  # decoders return sound later than frames

    def push(muxer: LiveMuxer, k: int) -> bytes:
        return muxer.push(picture(12 * k, 12), tone[max(0, chunk * k - delay) : chunk * (k + 1) - delay])

    parts, muxer = [], LiveMuxer(**options)
    for k in range(20):
        if k in (3, 7, 8, 15):
            muxer = LiveMuxer(**options, state=muxer.state())
            parts.append(without_description(push(muxer, k)))
        else:
            parts.append(push(muxer, k))
    frames, samples, first = decoded(b"".join([*parts, muxer.close()]))
    assert [round(time * FPS) for time, _, _ in frames] == list(range(240))
    assert [time for time, bright, _ in frames if bright > 128] == [float(k) for k in range(10)]
    inside = samples[OUTPUT_RATE // 2 : 19 * OUTPUT_RATE // 2]
    n = np.arange(len(inside)) + OUTPUT_RATE // 2 + round(first * OUTPUT_RATE)
    assert np.abs(inside - 0.3 * np.sin(2 * np.pi * 400 * n / OUTPUT_RATE)).max() < 0.02
