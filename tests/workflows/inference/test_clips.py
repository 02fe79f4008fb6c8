"""The Python API: loading by path or name, streaming chunks, whole clips, saved files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mfcore.errors import UserInputError
from preprocessing.records import Word
from tests.helpers.random_exports import random_export
from workflows.checkpoints.packaged import packaged_names
from workflows.inference.generate import ClipPrompt, generate_clip
from workflows.inference.pipeline import StreamingPipeline

FRAME = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
WORDS = [Word(word="ba", start=0.1, end=0.4), Word(word="do", start=0.5, end=0.7)]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_export(tmp_path_factory.mktemp("run"), "mutual")


@pytest.fixture(scope="module")
def pipeline(export: Path) -> StreamingPipeline:
    return StreamingPipeline.from_pretrained(export, device="cpu")


def test_the_chunks_of_a_stream_are_the_clip(pipeline: StreamingPipeline) -> None:
    chunks = list(pipeline.stream(WORDS, first_frame=FRAME, seconds=1, seed=3))
    clip = pipeline(WORDS, first_frame=FRAME, seconds=1, seed=3)
    assert len(chunks) == 3  # two of half a second, and the rest
    assert clip.video is not None
    assert clip.audio is not None
    assert clip.video.dtype == np.uint8
    assert clip.video.shape[1:] == (*pipeline.frame_size, 3)
    assert clip.audio.dtype == np.float32
    assert clip.sample_rate <= len(clip.audio) <= (1 + 1 / clip.fps) * clip.sample_rate
    assert np.array_equal(np.concatenate([c.video for c in chunks if c.video is not None]), clip.video)
    assert [word.word for word in clip.words] == ["ba", "do"]


def test_a_saved_clip_equals_the_file_of_the_command(pipeline: StreamingPipeline, export: Path, tmp_path: Path) -> None:
    Image.fromarray(FRAME).save(tmp_path / "first.png")
    saved = pipeline("ba do", first_frame=tmp_path / "first.png", seed=1).save(tmp_path / "api.mp4")
    prompt = ClipPrompt(transcript="ba do", first_frame=str(tmp_path / "first.png"))
    generate_clip(str(export), prompt, out=str(tmp_path / "cli.mp4"), seed=1)
    assert saved.read_bytes() == (tmp_path / "cli.mp4").read_bytes()


def test_an_existing_file_is_replaced_on_request_only(pipeline: StreamingPipeline, tmp_path: Path) -> None:
    clip = pipeline(first_frame=FRAME, seconds=0.5)
    (tmp_path / "mine.mp4").write_text("mine")
    with pytest.raises(UserInputError, match="exists"):
        clip.save(tmp_path / "mine.mp4")
    assert (tmp_path / "mine.mp4").read_text() == "mine"
    assert clip.save(tmp_path / "mine.mp4", overwrite=True).stat().st_size > 500


def test_frames_may_be_files_images_or_arrays(pipeline: StreamingPipeline, tmp_path: Path) -> None:
    Image.fromarray(FRAME).save(tmp_path / "first.png")
    sources = (FRAME, Image.fromarray(FRAME), str(tmp_path / "first.png"), tmp_path / "first.png")
    made = [next(pipeline.stream(first_frame=source, seconds=0.5)).video for source in sources]
    assert all(np.array_equal(frames, made[0]) for frames in made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_frame": FRAME[..., 0]}, r"Give uint8 of shape \(height, width, 3\)"),
        ({"first_frame": None}, "needs a first frame"),
        ({"first_frame": FRAME, "voice": np.zeros((2, 9), np.float32)}, "Give mono samples"),
        ({"first_frame": FRAME, "seconds": -1}, "seconds"),
        ({"first_frame": FRAME, "steps": 0}, "steps"),
    ],
)
def test_wrong_input_is_reported_before_the_first_chunk(
    pipeline: StreamingPipeline, options: dict, message: str
) -> None:
    with pytest.raises(UserInputError, match=message):
        pipeline.stream(**options)


def test_a_packaged_name_is_loaded() -> None:
    assert StreamingPipeline.from_pretrained(packaged_names()[0], device="cpu").metadata.transcript == "phonemes"


@pytest.mark.parametrize("package", ["mfcore", "preprocessing", "workflows"])
def test_the_packages_are_typed(package: str) -> None:
    assert Path(__file__).parents[3].joinpath(package, "py.typed").exists()
