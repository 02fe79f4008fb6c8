"""The clock: frames show the instant they should, sound is where it should be, before anything is encoded."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from preprocessing.media import Decoder, decode
from preprocessing.mp4 import write_mp4
from preprocessing.probe import MediaError, probe
from tests.preprocessing.flashbeep import BEEPS, Fixture, find_beeps, make, numbered_frames, read_numbers, sound

FPS, RATE = Fraction(24), 16000
FIXTURES = [
    Fixture(name="constant_25"),
    Fixture(name="ntsc_29_97", fps=(30000, 1001)),
    Fixture(name="film_23_976", fps=(24000, 1001)),
    Fixture(name="fast_60", fps=(60, 1)),
    Fixture(name="slow_10", fps=(10, 1)),
    Fixture(name="variable_mkv", fps=(30, 1), suffix="mkv", keep="lt(mod(n,7)*mod(n,5),9)"),
    Fixture(name="variable_mp4", fps=(30, 1), keep="lt(mod(n,7)*mod(n,5),9)"),
    Fixture(name="late_sound_mp4", audio_late=0.08),
    Fixture(name="late_sound_mkv", audio_late=0.08, suffix="mkv"),
    Fixture(name="early_sound_mp4", video_late=0.3),
    Fixture(name="early_sound_mkv", video_late=0.3, suffix="mkv"),
    Fixture(name="negative_start_mkv", suffix="mkv"),
    Fixture(name="transport_stream", suffix="ts", options=("-c:a", "mp2")),
    Fixture(name="late_transport_stream", suffix="ts", audio_late=0.08, options=("-c:a", "mp2")),
    Fixture(
        name="pcm_8k_avi",
        suffix="avi",
        options=("-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p", "-c:a", "pcm_s16le", "-ar", "8000"),
    ),
    Fixture(name="surround_96k_mov", suffix="mov", options=("-c:a", "pcm_s16le", "-ar", "96000", "-ac", "6")),
    Fixture(name="sound_gap", suffix="mkv", options=("-c:a", "pcm_s16le", "-af", "aselect='not(between(t,0.8,0.95))'")),
    Fixture(name="b_frames_edit_list", options=("-c:a", "aac", "-preset", "medium", "-bf", "3")),
]


def measure(fixture: Fixture, folder: Path) -> tuple[float, float, float]:
    """(worst frame error in source frames, worst beep error in seconds, seconds per source frame)."""
    path = make(fixture, folder)
    frames, wave = decode_all(path)
    step = fixture.fps[1] / fixture.fps[0]
    kept = np.array(fixture.kept(round(3 / step)))
    shown = read_numbers(frames)
    instants = np.arange(len(frames)) / float(FPS)
    inside = instants <= (kept[-1] - kept[0]) * step
    # the nearest kept frame is the best that can be shown; half a (local) source frame is the bound
    error = np.abs((shown - kept[0]) * step - instants)[inside]
    bound = np.array([np.diff(kept)[max(0, np.searchsorted(kept, n) - 1) :][:2].max() * step / 2 for n in shown])[
        inside
    ]
    first = fixture.video_late + kept[0] * step - fixture.audio_late
    expected = [b - first for b in BEEPS if 0 <= b - first < len(wave) / RATE - 0.05]
    found = find_beeps(wave, RATE)
    assert len(found) == len(expected), (found, expected)
    return float((error / bound).max() / 2), float(np.abs(found - expected).max()), step


def decode_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    info = probe(path)
    with Decoder(path, info, fps=FPS, size=(64, 64), sample_rate=RATE) as decoder:
        frames, wave = decoder.read(1000)
        assert decoder.error() is None
    assert frames is not None
    assert wave is not None
    return frames, wave


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f.name)
def test_every_frame_within_half_a_source_frame_and_sound_within_a_millisecond(fixture, tmp_path, record_property):
    frame_error, beep_error, _ = measure(fixture, tmp_path)
    record_property("frame_error_in_source_frames", frame_error)
    record_property("beep_error_ms", beep_error * 1000)
    assert frame_error <= 0.5 + 0.02  # matroska rounds timestamps to milliseconds
    assert beep_error < 0.001


@pytest.mark.parametrize(
    "name", ["-dash.mp4", "br[ack]et 'quote' \".mp4", "space at end .mp4", "two\nlines.mp4", "100%d.mp4"]
)
def test_any_name(name, tmp_path):
    path = tmp_path / name
    write_mp4(path, numbered_frames(12), FPS, sound(0.5, RATE), RATE)
    frames, _ = decode_all(path)
    assert list(read_numbers(frames)) == list(range(12))


def test_name_that_is_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    write_mp4(path, numbered_frames(12), FPS)
    assert probe(path).video is not None


def test_rotation_is_applied(tmp_path):
    plain, turned = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    write_mp4(plain, numbered_frames(6), FPS)
    flags = ["-display_rotation", "180"] if _ffmpeg_major() >= 6 else []
    tags = [] if flags else ["-metadata:s:v", "rotate=180"]
    subprocess.run(
        ["ffmpeg", "-loglevel", "error", *flags, "-i", str(plain), "-c", "copy", *tags, str(turned)], check=True
    )
    upright, _ = decode(turned, 0, 0.25, fps=FPS, size=(64, 64), sample_rate=RATE)
    assert upright is not None
    assert list(read_numbers(upright[:, ::-1, ::-1])) == list(range(6))


def _ffmpeg_major() -> int:
    text = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
    digits = text.split()[2].lstrip("nN-").split(".")[0]
    return int(digits) if digits.isdigit() else 99


def test_wide_pixels_are_made_square_and_the_picture_cropped_or_padded(tmp_path):
    path = tmp_path / "wide.mp4"
    source = "color=gray:s=64x64:r=24:d=0.5,setsar=2,drawbox=x=28:y=0:w=8:h=64:color=white:t=fill"
    subprocess.run(["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", source, str(path)], check=True)
    cropped, _ = decode(path, 0, 0.2, fps=FPS, size=(64, 64), sample_rate=RATE)
    padded, _ = decode(path, 0, 0.2, fps=FPS, size=(64, 64), sample_rate=RATE, fit="pad")
    assert cropped is not None
    assert padded is not None
    assert abs((cropped[0, 32, :, 0] > 190).sum() - 16) <= 1  # the bar of 8 pixels is 16 square pixels wide
    assert padded[0, :14].max() < 20  # 128x64 fitted into 64x64 leaves bars
    assert padded[0, 32].min() > 100


def test_portions_are_the_whole(tmp_path):
    path = make(Fixture(name="portions", fps=(30000, 1001)), tmp_path)
    whole, wave = decode_all(path)
    with Decoder(path, probe(path), fps=FPS, size=(64, 64), sample_rate=RATE) as decoder:
        parts = [decoder.read(n) for n in (1, 7, 24, 13, 200)]
    assert np.array_equal(np.concatenate([p[0] for p in parts]), whole)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), wave)


def test_a_span_in_the_middle_is_that_part_of_the_whole(tmp_path):
    path = make(Fixture(name="middle", fps=(24, 1), suffix="mkv"), tmp_path, seconds=14.0)
    info = probe(path)
    first = info.start - info.origin
    frames, wave = decode(path, first + 12.5, first + 13.5, fps=FPS, size=(64, 64), sample_rate=RATE)
    assert list(read_numbers(frames)) == list(range(300, 324))
    _, whole = decode_all(path)
    assert np.abs(wave - whole[200000:216000]).max() < 1e-3


def test_writer_keeps_picture_and_sound_together(tmp_path):
    path = tmp_path / "out.mp4"
    write_mp4(path, numbered_frames(72), FPS, sound(3.0, RATE), RATE)
    frames, wave = decode_all(path)
    assert list(read_numbers(frames)) == list(range(72))
    assert np.abs(find_beeps(wave, RATE) - BEEPS).max() < 0.002
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_hdr_becomes_a_normal_picture(tmp_path):
    path = tmp_path / "hdr.mkv"
    source = "testsrc2=s=320x180:r=24:d=0.5,format=yuv420p10le"
    tags = ["-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc"]
    encode = ["-c:v", "libx265", "-x265-params", "log-level=none", *tags]
    done = subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", source, *encode, str(path)], check=False
    )
    if done.returncode != 0:
        pytest.skip("this ffmpeg has no libx265")
    frames, _ = decode(path, 0, 0.25, fps=FPS, size=(64, 64), sample_rate=RATE)
    assert frames is not None
    assert 5 < frames.mean() < 250
    assert frames.std() > 10


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256)) * 20])
def test_what_is_not_media_is_unreadable(content, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError) as caught:
        probe(path)
    assert caught.value.reason == "unreadable"


def test_a_decoder_that_gives_nothing_is_stopped(tmp_path, monkeypatch):
    path = make(Fixture(name="stalls"), tmp_path)
    info = probe(path)
    slow = tmp_path / "bin"
    slow.mkdir()
    (slow / "ffmpeg").write_text("#!/bin/sh\nexec sleep 60\n")
    (slow / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow}:{os.environ['PATH']}")
    decoder = Decoder(path, info, fps=FPS, size=(64, 64), sample_rate=RATE, stall_seconds=0.3)
    with pytest.raises(MediaError) as caught:
        decoder.read(10)
    assert caught.value.reason == "timeout"


if __name__ == "__main__":  # the table of docs/lab-log.md
    import tempfile

    for one in FIXTURES:
        with tempfile.TemporaryDirectory() as name:
            frame, beep, _ = measure(one, Path(name))
        sys.stdout.write(f"| {one.name} | {frame:.3f} | {1000 * beep:.3f} |\n")
