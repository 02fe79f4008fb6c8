"""First frames of clips: draw the character of a seed, and find the character in a picture."""

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from preprocessing.toyworld import renderer
from preprocessing.toyworld.video_reader import read_video
from preprocessing.toyworld.world import ToyConfig, caption_of, render_frames, sample_truth, world_name

MAX_DISTANCE = 0.085
"""Largest mean difference between a picture and the character that is read from it, in shares of the color range.

Drawn frames are below 0.002, compressed and scaled ones below 0.05, frames of a network after two minutes of training
below 0.065, flat pictures and shifted characters above 0.1, other pictures above 0.2.
"""
_FPS = Fraction(24)
_FRAMES = 13  # a reading takes half a second and the frame before it


@dataclass(frozen=True, kw_only=True)
class FirstFrame:
    """First frame of a drawn character."""

    pixels: NDArray[np.uint8]  # [size, size, 3] RGB
    caption: str


def world_config(world: str | None, size: int = 64, seed: int = 0) -> ToyConfig | None:
    """Return the configuration of a world by its name, such as ``toyworld-english/1``; None for another world."""
    worlds = [ToyConfig(voice=voice, size=size, seed=seed, seconds=1.0) for voice in ("syllables", "english")]
    return next((config for config in worlds if world_name(config) == world), None)


def draw_first_frame(config: ToyConfig, index: int = 0) -> FirstFrame:
    """Return the silent character of clip `index` at the start of the clip. It needs no speech synthesizer."""
    drawn = sample_truth(replace(config, voice="syllables"), index)
    silent = replace(drawn, config=config, transcript=())
    return FirstFrame(pixels=render_frames(silent)[0], caption=caption_of(drawn))


def character_distance(frame: NDArray[np.uint8]) -> float:
    """Return the mean difference of a square frame and the character that is read from it, 0 to 1."""
    size = frame.shape[0]
    read = read_video(np.repeat(frame[None], _FRAMES, axis=0), ToyConfig(fps=_FPS, size=64))
    choices = {name: choice.mode[:1] for name, choice in read.choices.items()}
    pose = renderer.draw_still(1, head=(read.head[:1] * 64).astype(np.float32), **choices)
    drawn = renderer.draw_frames(size, read.look, pose)[0]
    return float(np.abs(drawn.astype(np.float32) - frame).mean() / 255)
