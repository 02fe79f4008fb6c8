"""Limits of time, length, decoded frames and text of one source: each excess is a reject with its reason."""

import json
import subprocess
import wave
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mfcore.errors import UserInputError
from preprocessing.config import PreprocessConfig
from preprocessing.pipeline import build_encoders
from preprocessing.records import Clip, Rejected, SourceLimits
from preprocessing.sources.discovery import find_sources
from tests.helpers.source_processing import process_source

CONFIG = PreprocessConfig(sizes=((32, 32),), window_seconds=2.0, decoder_bytes=128 << 20)
EXCESSES = {
    "wall_seconds": (1e-6, "time_limit"),
    "claimed_seconds": (5.0, "too_long"),
    "decoded_frames": (60, "too_many_frames"),
    "gap_seconds": (8.0, "timestamp_gap"),
    "sidecar_bytes": (500, "too_long"),
    "caption_letters": (100, "too_long"),
    "transcript_letters": (100, "too_long"),
}


def write_media(path: Path, *, times: str, audio: bool = True) -> Path:
    """Write 72 pictures at the `times`, an expression of setpts, and 6 s of audio."""
    picture = ["-f", "lavfi", "-i", "testsrc2=s=64x64:r=12:d=6"]
    tone = ["-f", "lavfi", "-i", "sine=f=440:r=16000:d=6"] if audio else []
    encode = ["-vf", f"setpts={times}", "-fps_mode", "passthrough", "-c:v", "libx264", "-preset", "ultrafast"]
    subprocess.run(["ffmpeg", "-y", "-v", "error", *picture, *tone, *encode, "-c:a", "aac", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a source that reaches all limits below its defaults: its last second comes 12 s late."""
    folder = tmp_path_factory.mktemp("media")
    write_media(folder / "a.mkv", times=r"PTS+gte(T\,5)*12/TB")
    words = [{"word": "w" * 60, "start": 0.2 * n, "end": 0.2 * n + 0.1} for n in range(5)]
    (folder / "a.json").write_text(json.dumps({"caption": "x" * 200, "transcript": words}))
    return folder


def processed(folder: Path, limits: SourceLimits, config: PreprocessConfig = CONFIG) -> list[Clip | Rejected]:
    config = replace(config, limits=limits)
    return list(process_source(find_sources([str(folder)])[0], config, build_encoders(config)))


def reasons(found: list[Clip | Rejected]) -> set[str]:
    return {f.reason for f in found if isinstance(f, Rejected)}


def test_without_excess_the_source_is_accepted(media: Path):
    found = processed(media, SourceLimits())
    assert [type(one) for one in found[:2]] == [Clip, Clip]
    assert reasons(found) <= {"frozen", "no_audio_samples"}, "of the 12 seconds"


def test_every_limit_has_a_case():
    assert set(EXCESSES) == {field.name for field in fields(SourceLimits)}


@pytest.mark.parametrize("name", EXCESSES)
def test_an_excess_is_a_reject_with_its_reason(media: Path, name: str):
    value, reason = EXCESSES[name]
    found = processed(media, SourceLimits(**{name: value}))
    assert reason in reasons(found)
    assert reasons(found) <= {reason, "frozen", "no_audio_samples"}


def test_clips_before_a_jump_of_the_timestamps_are_kept(tmp_path: Path):
    """The last picture before the jump is held for half of the longest gap, not for half of the jump."""
    write_media(tmp_path / "a.mkv", times=r"PTS+gte(T\,5)*1000/TB", audio=False)
    found = processed(tmp_path, SourceLimits(gap_seconds=4.0), replace(CONFIG, modality="video"))
    assert [type(one) for one in found[:2]] == [Clip, Clip]
    assert reasons(found[:-1]) <= {"frozen"}
    last = found[-1]
    assert isinstance(last, Rejected)
    assert (last.step, last.reason, last.detail) == ("decode", "timestamp_gap", "the timestamps jump to 1005.000 s")
    assert last.span == pytest.approx((6.92, 1006.0), abs=0.1)


def test_a_jump_after_the_first_picture_rejects_the_source(tmp_path: Path):
    write_media(tmp_path / "a.mkv", times="(N+1000*gte(N,1))/TB".replace(",", r"\,"), audio=False)
    found = processed(tmp_path, SourceLimits(), replace(CONFIG, modality="video"))
    assert reasons(found) >= {"timestamp_gap"}
    assert not any(isinstance(one, Clip) for one in found)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (SourceLimits(claimed_seconds=1e9, decoded_frames=2000), "too_many_frames"),
        (SourceLimits(claimed_seconds=1e9, wall_seconds=1.5), "time_limit"),
        (SourceLimits(claimed_seconds=1e9, gap_seconds=50.0), "timestamp_gap"),
    ],
    ids=["frames", "time", "gap"],
)
def test_a_huge_claimed_length_takes_bounded_memory_and_time(limits: SourceLimits, reason: str, tmp_path: Path):
    """Pictures 400 s apart, 7.8 hours in all, with 128 MiB for ffmpeg: more would be the reason `memory`."""
    write_media(tmp_path / "a.mkv", times="N*400/TB", audio=False)
    config = replace(CONFIG, modality="video")
    assert reasons(processed(tmp_path, limits, config)) >= {reason}


def test_hours_of_audio_in_a_small_file_take_bounded_memory_and_time(tmp_path: Path):
    """A WAV file of 1 Hz: 50 hours in 360 KB."""
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(1)
        file.writeframes(bytes(range(256)) * 1400)
    config = replace(CONFIG, modality="audio")
    assert reasons(processed(tmp_path, SourceLimits(), config)) == {"too_long"}
    found = processed(tmp_path, SourceLimits(claimed_seconds=1e9, decoded_frames=2000), config)
    assert reasons(found) <= {"too_many_frames", "memory"}, "its blocks of samples may exceed the 128 MiB"
    assert len(found) < 50


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_limits_must_be_positive(value: float):
    with pytest.raises(UserInputError, match="limits.gap_seconds"):
        SourceLimits(gap_seconds=value)
