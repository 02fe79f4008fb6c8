"""Files with audio and video far apart are decoded exactly, in constant memory and linear time."""

import os
import signal
import subprocess
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.media import decoder as decoder_module
from preprocessing.media.decoder import Decoder
from preprocessing.media.probe import MediaError, probe
from preprocessing.pipeline import build_encoders
from preprocessing.records import Clip, Rejected
from preprocessing.sources.discovery import find_sources
from tests.helpers.source_processing import process_source

FPS, RATE = Fraction(24), 16000
SMALL = 1 << 19  # bytes of surplus, so that short files exceed it


def write_file(path: Path, *, video: float, audio: float, late: float = 0.0) -> Path:
    """Write a file with so many seconds of each stream; the audio begins `late` seconds after the video."""
    picture = ["-f", "lavfi", "-i", f"testsrc2=s=64x64:r=12:d={video}"]
    heard = ["-itsoffset", str(late), "-f", "lavfi", "-i", f"sine=f=440:r=16000:d={audio}"]
    encode = ["-c:v", "libx264", "-preset", "ultrafast", "-c:a", "aac", str(path)]
    subprocess.run(["ffmpeg", "-y", "-v", "error", *picture, *heard, *encode], check=True)
    return path


def decode(path: Path, portion: int = 24) -> tuple[np.ndarray, np.ndarray, int]:
    """Return all frames and samples, read in portions, and the number of decoder processes."""
    with Decoder(path, probe(path), fps=FPS, size=(64, 64), sample_rate=RATE) as decoder:
        parts = [decoder.read(portion)]
        while len(parts[-1][0]) == portion:
            parts.append(decoder.read(portion))
        rest = decoder.peek_audio(10**7)
        assert decoder.failure() is None
        count = len(decoder.processes)
    return np.concatenate([p[0] for p in parts]), np.concatenate([*(p[1] for p in parts), rest]), count


SHAPES = {
    "audio ends early": {"video": 20, "audio": 2},
    "audio starts late": {"video": 20, "audio": 4, "late": 15},
    "video ends early": {"video": 2, "audio": 20},
    "even": {"video": 8, "audio": 8},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_streams_far_apart_are_decoded_exactly(shape, tmp_path, monkeypatch):
    path = write_file(tmp_path / "a.mkv", **SHAPES[shape])
    frames, wave, processes = decode(path)
    assert processes == 1
    monkeypatch.setattr(decoder_module, "MAX_SURPLUS_BYTES", SMALL)
    again, heard, processes = decode(path)
    assert processes == (1 if shape == "even" else 2)
    assert np.array_equal(again, frames)
    assert np.array_equal(heard, wave)


def test_memory_is_constant_where_the_audio_ends_early(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_module, "MAX_SURPLUS_BYTES", 1 << 22)
    path = write_file(tmp_path / "a.mp4", video=100, audio=1)  # 118 MB of frames at 128 x 128
    with Decoder(path, probe(path), fps=FPS, size=(128, 128), sample_rate=RATE) as decoder:
        decoder.skip(24)
        tracemalloc.start()
        try:
            for _ in range(98):
                frames, wave = decoder.read(24)
                assert frames is not None and len(frames) == 24
                assert wave is not None and not wave[1600:].any()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 24 << 20


def test_audio_decoder_that_is_killed_is_no_end_of_the_audio(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_module, "MAX_SURPLUS_BYTES", SMALL)
    path = write_file(tmp_path / "a.mkv", video=20, audio=19, late=5)
    with Decoder(path, probe(path), fps=FPS, size=(64, 64), sample_rate=RATE) as decoder:
        decoder._split()
        os.kill(decoder.processes[1].pid, signal.SIGKILL)
        with pytest.raises(MediaError) as caught:
            decoder.read(480)
    assert caught.value.reason == "killed"


def test_spans_without_audio_samples_have_a_reason(tmp_path):
    path = write_file(tmp_path / "a.mp4", video=5, audio=1.4)
    (source,) = find_sources([str(path)])
    config = PreprocessConfig(workers=0, window_seconds=Fraction(1))
    found = list(process_source(source, config, build_encoders(config)))
    assert isinstance(found[0], Clip)
    assert all(isinstance(one, Rejected) for one in found[2:])
    assert [(one.step, one.reason) for one in found[2:]] == [("filter", "no_audio_samples")] * 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_hour_of_video_with_five_seconds_of_audio(tmp_path):
    path = write_file(tmp_path / "a.mp4", video=3600, audio=5)
    (source,) = find_sources([str(path)])
    config = PreprocessConfig(workers=0)
    encoders, found = build_encoders(config), list[Clip | Rejected]()
    seconds, memory = [time.process_time()], list[int]()
    for span in process_source(source, config, encoders):
        found.append(span)
        if len(found) % 60 == 0:
            seconds.append(time.process_time())
            memory.append(psutil.Process().memory_info().rss)
    parts = np.diff(seconds)
    print(f"{[round(part, 1) for part in parts]} s of CPU for each 10 minutes, {[size >> 20 for size in memory]} MiB")
    assert len(found) == 360
    assert {one.reason for one in found[1:]} == {"no_audio_samples"}
    assert max(memory) - memory[0] < 32 << 20
    assert parts[-1] < 1.5 * parts[1] + 0.5
