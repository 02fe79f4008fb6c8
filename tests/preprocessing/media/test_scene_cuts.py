"""Clips contain one scene; flashes and light changes are not cuts."""

import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.media.mp4_writer import write_mp4
from preprocessing.media.scene_cuts import SceneConfig, SceneCutDetector
from preprocessing.pipeline import build_encoders
from preprocessing.records import Clip, Rejected
from preprocessing.sources.discovery import find_sources
from preprocessing.toyworld.world import ToyConfig
from preprocessing.toyworld.world import write_clip as write_toy_clip
from tests.helpers.av_clock_media import numbered_frames, sound
from tests.helpers.source_processing import process_source

FPS, RATE = Fraction(24), 16000
CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2))
REAL = Path(__file__).parents[4] / "shared" / "media" / "talking"
LEVELS = (60, 110, 160, 210)  # of one color channel, identifies the scene of a frame


def scene(number: int, count: int) -> np.ndarray:
    """Return frames of a texture per scene that drifts a little, with one level of blue."""
    texture = np.random.default_rng(number).integers(20, 235, (18, 18, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    frames = np.stack([texture[at : at + 128, :128] for at in (abs(i % 16 - 8) for i in range(count))])
    frames[..., 2] = LEVELS[number]
    return frames


def scene_of(frames: np.ndarray) -> set[int]:
    return {int(np.abs(np.array(LEVELS) - level).argmin()) for level in frames[..., 2].mean((1, 2))}


def spans(path: Path, config: PreprocessConfig = CONFIG) -> list[Clip | Rejected]:
    (source,) = find_sources([str(path)])
    return list(process_source(source, config, build_encoders(config)))


def write_scenes(path: Path, lengths: tuple[int, ...], keep: str = "1") -> Path:
    """Write scenes of these lengths; `keep` is the ffmpeg expression of kept frames."""
    frames = np.concatenate([scene(i, n) for i, n in enumerate(lengths)])
    whole = path.with_suffix(".whole.mp4") if keep != "1" else path
    write_mp4(whole, frames, FPS, sound(len(frames) / FPS, RATE), sample_rate=RATE)
    if keep != "1":
        vary = ["-vf", f"select='{keep}'", "-fps_mode", "passthrough", "-crf", "12", "-c:a", "copy"]
        subprocess.run(["ffmpeg", "-v", "error", "-i", str(whole), *vary, str(path)], check=True)
    return path


@pytest.mark.parametrize("keep", ["1", "not(between(n,58,66))", "lt(mod(n,7)*mod(n,5),9)"])
def test_no_clip_shows_two_scenes(keep, tmp_path):
    found = spans(write_scenes(tmp_path / "scenes.mp4", (63, 80, 10, 70), keep))
    clips = [clip for clip in found if isinstance(clip, Clip)]
    assert all(len(scene_of(clip.frames)) == 1 for clip in clips)
    assert {next(iter(scene_of(clip.frames))) for clip in clips} == {0, 1, 3}
    assert all(clip.span[0] % 0.5 == 0 for clip in clips), "spans start on chunk boundaries"


def test_a_scene_without_whole_chunks_is_counted(tmp_path):
    found = spans(write_scenes(tmp_path / "scenes.mp4", (63, 20, 70)))
    (short,) = [one for one in found if isinstance(one, Rejected)]
    assert (short.step, short.reason) == ("scenes", "short_scene")
    assert short.span == pytest.approx((63 / 24, 83 / 24), abs=1e-6)


def test_scene_cuts_can_be_disabled(tmp_path):
    path = write_scenes(tmp_path / "scenes.mp4", (36, 40))
    whole, *_ = spans(path, replace(CONFIG, scenes=SceneConfig(threshold=None)))
    assert scene_of(whole.frames) == {0, 1}


def test_flashes_and_light_changes_are_not_cuts(tmp_path):
    frames = numbered_frames(73, np.array([20, 45]))
    frames[50:] = (frames[50:] * 0.7).astype(np.uint8)
    frames[30:32] = 255
    write_mp4(tmp_path / "flash.mp4", frames, FPS, sound(73 / 24, RATE), sample_rate=RATE)
    assert [one.span for one in spans(tmp_path / "flash.mp4")] == [(0.0, 2.041667), (2.0, 3.041667)]


@pytest.mark.parametrize("number", [3, 15])
def test_light_change_during_motion_is_not_a_cut(number, tmp_path):
    """The character turns and the light changes half a second before the end."""
    path = write_toy_clip(tmp_path, ToyConfig(seconds=5.0, seed=7), number)
    assert [one.span for one in spans(path, replace(CONFIG, window_seconds=Fraction(5)))] == [(0.0, 5.041667)]


def test_scene_that_returns_at_once_is_not_cut():
    other = np.concatenate([scene(0, 4), scene(1, 3), scene(0, 8)])
    assert SceneCutDetector(SceneConfig(), flash_frames=7).next_cut([4, 7], 0, other) is None
    assert SceneCutDetector(SceneConfig(flash_seconds=0), flash_frames=0).next_cut([4, 7], 0, other) == 4


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real media ../shared/media is not here")
def test_real_scene_cuts_are_found(tmp_path):
    names = ("humo_text_audio2.mp4", "ovi_two_men.mp4", "humo_astronaut.mp4")
    graph = [f"[{i}:v]trim=0:2.9,scale=320:180,setsar=1,fps=25,setpts=PTS-STARTPTS[v{i}]" for i in range(3)]
    graph += ["[v0][v1][v2]concat=n=3[v]"]
    inputs = [part for name in names for part in ("-i", str(REAL / name))]
    command = ["ffmpeg", "-v", "error", *inputs, "-filter_complex", ";".join(graph), "-map", "[v]", "-crf", "16"]
    subprocess.run([*command, str(tmp_path / "cuts.mp4")], check=True)
    found = spans(tmp_path / "cuts.mp4", replace(CONFIG, modality="video", sizes=((144, 256),)))
    assert [one.span for one in found] == [(0, 2.041667), (3.0, 5.041667), (6.0, 8.041667)]
