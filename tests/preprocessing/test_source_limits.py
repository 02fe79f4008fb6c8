"""Limits of time and text of one source: each excess is a reject with its reason."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mfcore.errors import UserInputError
from preprocessing.config import PreprocessConfig
from preprocessing.pipeline import build_encoders
from preprocessing.records import Clip, Rejected, SourceLimits
from preprocessing.sources.discovery import find_sources
from tests.helpers.source_processing import process_source

CONFIG = PreprocessConfig(sizes=((32, 32),), window_seconds=2.0)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    picture = ["-f", "lavfi", "-i", "testsrc2=s=64x64:r=12:d=6"]
    tone = ["-f", "lavfi", "-i", "sine=f=440:r=16000:d=6"]
    encode = ["-c:v", "libx264", "-preset", "ultrafast", "-c:a", "aac"]
    subprocess.run(["ffmpeg", "-y", "-v", "error", *picture, *tone, *encode, str(folder / "a.mp4")], check=True)
    return folder


def processed(folder: Path, limits: SourceLimits) -> list[Clip | Rejected]:
    config = replace(CONFIG, limits=limits)
    return list(process_source(find_sources([str(folder)])[0], config, build_encoders(config)))


def reasons(found: list[Clip | Rejected]) -> set[str]:
    return {f.reason for f in found if isinstance(f, Rejected)}


def test_without_excess_the_source_is_accepted(media: Path):
    assert any(isinstance(f, Clip) for f in processed(media, SourceLimits()))


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"claimed_seconds": 5.0}, "too_long"),
        ({"decoded_frames": 60}, "too_many_frames"),
        ({"wall_seconds": 1e-6}, "time_limit"),
    ],
)
def test_an_excess_is_a_reject_with_its_reason(media: Path, limits: dict[str, float], reason: str):
    found = processed(media, SourceLimits(**limits))
    assert reasons(found) == {reason}
    assert next(iter(limits)) in " ".join(f.detail for f in found if isinstance(f, Rejected))


def test_a_long_caption_is_rejected(media: Path, tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes((media / "a.mp4").read_bytes())
    (tmp_path / "a.json").write_text(json.dumps({"caption": "x" * 200}))
    assert reasons(processed(tmp_path, SourceLimits(caption_letters=100))) == {"too_long"}


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_limits_must_be_positive(value: float):
    with pytest.raises(UserInputError, match="limits.gap_seconds"):
        SourceLimits(gap_seconds=value)
