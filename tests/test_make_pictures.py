"""The pictures of the README: an animation below its size limit, and the same clip with sound."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from preprocessing.media.probe import probe
from tests.helpers.packaged_talker import english_export

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "make_pictures.py"


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_pictures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_command_writes_the_animation_and_the_clip(pictures: ModuleType, tmp_path: Path) -> None:
    export = english_export(tmp_path / "run")
    pictures.main(
        ["--checkpoint", str(export), "--transcript", "Hi.", "--steps", "1", "--out", str(tmp_path / "assets")]
    )
    height = pictures.SIDE + pictures.TEXT_HEIGHT + pictures.WAVE_HEIGHT
    with Image.open(tmp_path / "assets" / "talker.webp") as image:
        assert (image.format, image.size) == ("WEBP", (384, height))
        assert image.n_frames >= 8  # pyright: ignore[reportAttributeAccessIssue]
    info = probe(tmp_path / "assets" / "talker.mp4")
    assert info.video is not None
    assert (info.video.width, info.video.height, info.audio is not None) == (384, height, True)
    assert (tmp_path / "assets" / "talker.webp").stat().st_size < 3_000_000


def test_an_animation_that_stays_too_large_is_refused(pictures: ModuleType, tmp_path: Path, monkeypatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match="use a shorter transcript"):
        pictures.write_webp(list(noise), 24, tmp_path / "x.webp")
    assert not (tmp_path / "x.webp").exists()


def test_written_words_come_from_phonemes_and_words(pictures: ModuleType) -> None:
    phonemes = [{"word": "/hh/Hi", "start": 0.1}, {"word": "/ay/", "start": 0.2}, {"word": "/y/you", "start": 0.5}]
    assert pictures.written_words(phonemes) == (("Hi", 0.1), ("you", 0.5))
    assert pictures.written_words([{"word": "ba", "start": 1.0}]) == (("ba", 1.0),)
