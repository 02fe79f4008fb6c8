"""Decoding: any name, any picture, in portions and in part; a decoder that hangs. (What it shows when: test_clock.)"""

import os
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from preprocessing.media import Decoder, decode
from preprocessing.mp4 import write_mp4
from preprocessing.probe import MediaError, probe
from tests.preprocessing.flashbeep import BEEPS, Fixture, find_beeps, make, numbered_frames, read_numbers, sound

FPS, RATE = Fraction(24), 16000


def decode_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    info = probe(path)
    with Decoder(path, info, fps=FPS, size=(64, 64), sample_rate=RATE) as decoder:
        frames, wave = decoder.read(1000)
        assert decoder.error() is None
    assert frames is not None
    assert wave is not None
    return frames, wave


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
    path = make(Fixture(name="middle", fps=(24, 1)), tmp_path, seconds=14.0)
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
