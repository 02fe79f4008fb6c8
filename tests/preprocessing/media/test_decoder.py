"""Decoding of any file name and format, in chunks and ranges, and of hanging decoders."""

import os
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from preprocessing.media.decoder import Decoder, decode_range
from preprocessing.media.mp4_writer import write_mp4
from preprocessing.media.probe import MediaError, probe
from tests.helpers.av_clock_media import BEEPS, Fixture, find_beeps, make, numbered_frames, read_numbers, sound

FPS, RATE = Fraction(24), 16000


def decode_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    info = probe(path)
    with Decoder(path, info, fps=FPS, size=(64, 64), sample_rate=RATE) as decoder:
        frames, wave = decoder.read(1000)
        assert decoder.failure() is None
    assert frames is not None
    assert wave is not None
    return frames, wave


@pytest.mark.parametrize(
    "name", ["-dash.mp4", "br[ack]et 'quote' \".mp4", "space at end .mp4", "two\nlines.mp4", "100%d.mp4"]
)
def test_any_file_name_is_decoded(name, tmp_path):
    path = tmp_path / name
    write_mp4(path, numbered_frames(12), FPS, sound(0.5, RATE), sample_rate=RATE)
    frames, _ = decode_all(path)
    assert list(read_numbers(frames)) == list(range(12))


def test_file_name_outside_utf8_is_decoded(tmp_path):
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
    upright, _ = decode_range(turned, 0, 0.25, fps=FPS, size=(64, 64), sample_rate=RATE)
    assert upright is not None
    assert list(read_numbers(upright[:, ::-1, ::-1])) == list(range(6))


def _ffmpeg_major() -> int:
    text = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
    digits = text.split()[2].lstrip("nN-").split(".")[0]
    return int(digits) if digits.isdigit() else 99


def test_wide_pixels_become_square_and_frames_are_cropped_or_padded(tmp_path):
    path = tmp_path / "wide.mp4"
    source = "color=gray:s=64x64:r=24:d=0.5,setsar=2,drawbox=x=28:y=0:w=8:h=64:color=white:t=fill"
    subprocess.run(["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", source, str(path)], check=True)
    cropped, _ = decode_range(path, 0, 0.2, fps=FPS, size=(64, 64), sample_rate=RATE)
    padded, _ = decode_range(path, 0, 0.2, fps=FPS, size=(64, 64), sample_rate=RATE, fit="pad")
    assert cropped is not None
    assert padded is not None
    assert abs((cropped[0, 32, :, 0] > 190).sum() - 16) <= 1  # the bar of 8 pixels is 16 square pixels wide
    assert padded[0, :14].max() < 20  # 128x64 fitted into 64x64 leaves bars
    assert padded[0, 32].min() > 100


def test_chunks_equal_the_whole(tmp_path):
    path = make(Fixture(name="portions", fps=(30000, 1001)), tmp_path)
    whole, wave = decode_all(path)
    with Decoder(path, probe(path), fps=FPS, size=(64, 64), sample_rate=RATE) as decoder:
        parts = [decoder.read(n) for n in (1, 7, 24, 13, 200)]
    assert np.array_equal(np.concatenate([p[0] for p in parts]), whole)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), wave)


def test_span_in_the_middle_equals_that_part_of_the_whole(tmp_path):
    path = make(Fixture(name="middle", fps=(24, 1)), tmp_path, seconds=14.0)
    info = probe(path)
    first = info.start - info.origin
    frames, wave = decode_range(path, first + 12.5, first + 13.5, fps=FPS, size=(64, 64), sample_rate=RATE)
    assert list(read_numbers(frames)) == list(range(300, 324))
    _, whole = decode_all(path)
    assert np.abs(wave - whole[200000:216000]).max() < 1e-3


def test_writer_keeps_video_and_audio_in_sync(tmp_path):
    path = tmp_path / "out.mp4"
    write_mp4(path, numbered_frames(72), FPS, sound(3.0, RATE), sample_rate=RATE)
    frames, wave = decode_all(path)
    assert list(read_numbers(frames)) == list(range(72))
    assert np.abs(find_beeps(wave, RATE) - BEEPS).max() < 0.002
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_hdr_becomes_sdr(tmp_path):
    path = tmp_path / "hdr.mkv"
    source = "testsrc2=s=320x180:r=24:d=0.5,format=yuv420p10le"
    tags = ["-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc"]
    encode = ["-c:v", "libx265", "-x265-params", "log-level=none", *tags]
    done = subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", source, *encode, str(path)], check=False
    )
    if done.returncode != 0:
        pytest.skip("this ffmpeg has no libx265")
    frames, _ = decode_range(path, 0, 0.25, fps=FPS, size=(64, 64), sample_rate=RATE)
    assert frames is not None
    assert 5 < frames.mean() < 250
    assert frames.std() > 10


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256)) * 20])
def test_other_files_are_unreadable(content, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError) as caught:
        probe(path)
    assert caught.value.reason == "unreadable"


def test_decoder_without_output_is_stopped(tmp_path, monkeypatch):
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


def _pq(nits: float) -> float:
    """Return the signal of a luminance (SMPTE ST 2084)."""
    y = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def _hlg(nits: float) -> float:
    """Return the signal of a gray at 1000 nits peak (ITU-R BT.2100, system gamma 1.2)."""
    light = (nits / 1000) ** (1 / 1.2)
    return (3 * light) ** 0.5 if light <= 1 / 12 else 0.17883277 * np.log(12 * light - 0.28466892) + 0.55991073


@pytest.mark.parametrize(("transfer", "signal"), [("smpte2084", _pq), ("arib-std-b67", _hlg)])
def test_hdr_keeps_the_luminance_range_of_sdr(transfer, signal, tmp_path):
    levels = [2, 10, 40, 100, 150, 203, 1000]
    grey = np.repeat([round(64 + 876 * signal(n)) for n in levels], 32).astype("<u2")
    picture = np.concatenate([np.tile(grey, 64), np.full(2 * 32 * len(grey) // 2, 512, "<u2")])
    tags = ["-color_primaries", "bt2020", "-color_trc", transfer, "-colorspace", "bt2020nc", "-color_range", "tv"]
    raw = ["-f", "rawvideo", "-pix_fmt", "yuv420p10le", "-s", f"{len(grey)}x64", "-r", "24", "-i", "-"]
    encode = ["-c:v", "libx264", "-crf", "4", "-pix_fmt", "yuv420p10le", *tags, str(tmp_path / "hdr.mkv")]
    subprocess.run(["ffmpeg", "-v", "error", *raw, *encode], input=np.tile(picture, 6).tobytes(), check=True)
    size = (64, len(grey))
    frames, _ = decode_range(tmp_path / "hdr.mkv", 0, 0.2, fps=FPS, size=size, sample_rate=RATE)
    assert frames is not None
    shown = frames[2].mean(2)[32, 16::32]
    wanted = 255 * (np.array(levels) / 203) ** (1 / 2.4)  # a display's exponent (ITU-R BT.1886), white at 203 nits
    assert np.abs(shown - wanted)[:4].max() < 6
    assert (np.diff(shown) > 0).all()
    assert 235 < shown[5] < 255


def test_display_size_includes_rotation_and_pixel_aspect(tmp_path):
    def shown(*options: str) -> tuple[float, float]:
        path = tmp_path / "shape.mp4"
        made = ["-f", "lavfi", "-i", "testsrc2=s=128x64:r=24:d=0.2", *options, str(path)]
        subprocess.run(["ffmpeg", "-y", "-v", "error", *made], check=True)
        info = probe(path).video
        assert info is not None
        return info.display_size

    assert shown() == (64, 128)
    assert shown("-vf", "setsar=2") == (64, 256)
    assert shown("-metadata:s:v", "rotate=90") in ((128, 64), (64, 128))  # newer ffmpeg ignores the tag when writing


def test_audio_track_is_selected_by_default_flag_or_number(tmp_path):
    path = tmp_path / "tracks.mkv"
    tones = [part for f in (300, 600, 900) for part in ("-f", "lavfi", "-i", f"sine=f={f}:d=1")]
    chosen = ["-map", "0", "-map", "1", "-map", "2", "-disposition:a:0", "0", "-disposition:a:1", "default"]
    subprocess.run(["ffmpeg", "-v", "error", *tones, *chosen, str(path)], check=True)

    def heard(track: int | None) -> int:
        info = probe(path, audio_track=track)
        with Decoder(path, info, fps=FPS, size=(16, 16), sample_rate=RATE) as decoder:
            _, wave = decoder.read(24)
        assert wave is not None
        return int(np.abs(np.fft.rfft(wave)).argmax() * RATE / len(wave) + 0.5)

    assert [round(heard(track), -1) for track in (None, 0, 1, 2)] == [600, 300, 600, 900]
    assert probe(path, audio_track=3).audio is None
