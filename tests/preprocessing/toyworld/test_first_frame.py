"""First frames of the toy world: drawn ones, and pictures in which a character is looked for."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from preprocessing.toyworld.first_frame import (
    MAX_DISTANCE,
    FirstFrame,
    character_distance,
    draw_first_frame,
    world_config,
)
from preprocessing.toyworld.world import ToyConfig, caption_of, render_frames, sample_truth, world_name


def drawn(size: int = 64, seed: int = 3, voice: str = "english") -> FirstFrame:
    config = world_config(f"toyworld-{voice}/1" if voice == "english" else "toyworld/1", size=size, seed=seed)
    assert config is not None
    return draw_first_frame(config)


@pytest.mark.parametrize("voice", ["syllables", "english"])
def test_a_world_is_found_by_its_name(voice: str):
    config = world_config(world_name(ToyConfig(voice=voice)), size=96, seed=4)  # pyright: ignore[reportArgumentType]
    assert config is not None
    assert (config.voice, config.size, config.seed) == (voice, 96, 4)
    assert world_config("toyworld-klingon/1") is None
    assert world_config(None) is None


def test_a_drawn_character_is_a_function_of_the_seed():
    assert drawn(96).pixels.shape == (96, 96, 3)
    assert np.array_equal(drawn().pixels, drawn().pixels)
    assert len({drawn(seed=seed).caption for seed in range(6)}) == 6


def test_a_drawn_character_is_that_of_the_first_clip_before_it_speaks():
    config = ToyConfig(seed=3, seconds=1)
    truth = sample_truth(config, 0)
    assert np.abs(drawn(voice="syllables").pixels.astype(int) - render_frames(truth)[0]).mean() < 1
    assert drawn().caption == caption_of(truth)


def test_an_english_character_is_drawn_without_flite(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("flite") is None
    assert drawn(seed=11).pixels.any()


def compressed(frame: np.ndarray) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(frame).save(data, "JPEG", quality=20)
    return np.asarray(Image.open(data).convert("RGB"))


def test_a_character_is_found_in_drawn_compressed_and_scaled_frames():
    for seed in range(2):
        frame = drawn(96, seed).pixels
        scaled = np.asarray(Image.fromarray(drawn(64, seed).pixels).resize((96, 96)))
        assert max(character_distance(f) for f in (frame, compressed(frame), scaled)) < MAX_DISTANCE


def wrong_pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    frame = drawn(96).pixels
    spots = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    return {
        "noise": rng.integers(0, 255, (96, 96, 3), dtype=np.uint8),
        "gray": np.full((96, 96, 3), 128, np.uint8),
        "black": np.zeros((96, 96, 3), np.uint8),
        "spots": np.asarray(spots),
        "upside down": np.ascontiguousarray(frame[::-1]),
        "at the edge": np.roll(frame, 24, axis=1),
        "wall": np.broadcast_to(frame[0, 48], (96, 96, 3)).copy(),
    }


@pytest.mark.parametrize("name", wrong_pictures())
def test_no_character_is_found_in_other_pictures(name: str):
    assert character_distance(wrong_pictures()[name]) > MAX_DISTANCE
