"""Inputs of a clip: first frames of the toy world, and text that cannot be spoken."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mfcore.errors import UserInputError
from preprocessing.speech.phonemes import spoken_text
from preprocessing.toyworld.first_frame import draw_first_frame, world_config
from tests.helpers.packaged_talker import english_export
from tests.helpers.random_exports import random_export
from workflows.inference.generate import ClipPrompt, generate_clip
from workflows.inference.inputs import read_first_frame, read_or_draw_first_frame, read_transcript
from workflows.inference.pipeline import StreamingPipeline


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return english_export(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def pipeline(talker: Path) -> StreamingPipeline:
    return StreamingPipeline.from_checkpoint(talker)


def character(size: int) -> Image.Image:
    config = world_config("toyworld-english/1", size=size, seed=5)
    assert config is not None
    return Image.fromarray(draw_first_frame(config).pixels)


def test_a_character_is_drawn_where_no_frame_is_given(pipeline: StreamingPipeline):
    frame, caption = read_or_draw_first_frame(None, pipeline, 5)
    assert frame is not None
    assert np.array_equal(frame.numpy(), np.asarray(character(32)))
    assert caption.startswith("a character with a ")
    assert read_or_draw_first_frame(None, pipeline, 6)[1] != caption


def test_other_networks_need_a_frame(tmp_path: Path):
    export = random_export(tmp_path / "run", "mutual")
    with pytest.raises(UserInputError, match="Use --first-frame IMAGE"):
        generate_clip(str(export), ClipPrompt(seconds=0.5), out=str(tmp_path / "o.mp4"), steps=1)


def test_a_character_of_another_size_is_scaled_with_a_note(
    pipeline: StreamingPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    character(64).save(tmp_path / "face.png")
    frame = read_first_frame(str(tmp_path / "face.png"), pipeline)
    assert frame is not None
    assert tuple(frame.shape) == (32, 32, 3)
    assert "the picture of 64 x 64 pixels is scaled and cropped to 32 x 32" in capsys.readouterr().err


def test_a_picture_without_a_character_is_refused(pipeline: StreamingPipeline, tmp_path: Path):
    Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "photo.png")
    with pytest.raises(UserInputError, match=r"no character of the toy world.* 32 x 32 pixels\. Omit --first-frame"):
        read_first_frame(str(tmp_path / "photo.png"), pipeline)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440", "speaks English in Latin letters"),
        ("\u4f60\u597d", "speaks English in Latin letters"),
        ("... !? --", "no word to speak: use English words, digits or abbreviations"),
        ("word " * 10_000, "10000 words: use at most 2000"),
    ],
)
def test_text_that_cannot_be_spoken_is_refused_before_anything_is_written(
    talker: Path, tmp_path: Path, text: str, message: str
):
    with pytest.raises(UserInputError, match=message):
        generate_clip(str(talker), ClipPrompt(transcript=text), out=str(tmp_path / "new" / "o.mp4"), steps=1)
    assert not (tmp_path / "new").exists()


def test_digits_and_abbreviations_are_spoken():
    words, estimated = read_transcript("Dr. Lee paid $5 for 3 books at 10:30 on Main St.", "phonemes")
    text = spoken_text(words).lower()
    assert estimated
    assert all(part in text.split() for part in ("doctor", "five", "dollars", "three", "ten", "thirty"))


def test_the_clip_is_as_long_as_the_transcript(talker: Path, tmp_path: Path):
    last = read_transcript("Good morning.", "phonemes")[0][-1].end
    facts = generate_clip(str(talker), ClipPrompt(transcript="Good morning."), out=str(tmp_path / "o.mp4"), steps=1)
    assert last + 0.4 <= facts["seconds"] < last + 0.4 + 0.5 + 1 / 24  # whole chunks, and the first frame
    assert Fraction(facts["seconds"] - 1 / 24).limit_denominator(1000) % Fraction(1, 2) == 0


@pytest.mark.parametrize("kind", ["words", "phonemes"])
def test_speed_and_pauses_change_the_times(kind: str):
    usual, fast, slow = (
        read_transcript("Yes, I know.", kind, **change)[0][-1].end  # pyright: ignore[reportArgumentType]
        for change in ({}, {"speed": 2.0}, {"pauses": 5.0})
    )
    assert fast < 0.8 * usual
    assert slow > usual + 0.3


@pytest.mark.parametrize(
    ("change", "message"), [({"speed": 9.0}, "--speed 9.0: use 0.5 to 2"), ({"pauses": -1.0}, "--pauses -1.0: use 0")]
)
def test_speed_and_pauses_are_bounded(change: dict[str, float], message: str):
    with pytest.raises(UserInputError, match=message):
        read_transcript("Yes", **change)


def test_speed_needs_a_text_without_times():
    with pytest.raises(UserInputError, match="the transcript has times"):
        read_transcript('[{"word": "yes", "start": 0, "end": 1}]', speed=2.0)
