"""Read the toy world from pixels: head, mouth, identity and free choices.

Analysis by synthesis: the readers use the renderer, but not the ground truth of a clip. They read colors at positions
that are always visible, locate the head by its outline, and compare patches with rendered ones. Frames may be rendered,
encoded, reconstructed or generated, of any size. `audio_reader` reads the audio.

Letters: n frames, H W height and width, K half seconds, P numbers of one patch.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.errors import UserInputError
from preprocessing.speech.phonemes import REST, VISEMES
from preprocessing.toyworld import renderer
from preprocessing.toyworld.choices import ChoiceReading, make_reading, nearest_mode
from preprocessing.toyworld.renderer import (
    BACKGROUNDS,
    BROWS,
    FACES,
    GAZES,
    HAIRS,
    HANDS,
    HEAD,
    LIGHTS,
    SHAPES,
    STYLES,
    Appearance,
)
from preprocessing.toyworld.voice import VOCABULARY
from preprocessing.toyworld.world import ToyConfig, frame_half_seconds

Array = NDArray[np.float32]
Box = tuple[float, float, float, float]  # x0, x1, y0, y1 in units of 1/64 of the side

_EYES: Box = (-15.0, 15.0, -11.5, 3.5)  # boxes relative to the center of the head
_FOREHEAD: Box = (-14.0, 14.0, -18.5, -9.5)
_MOUTH: Box = (-12.0, 12.0, 3.5, 18.0)
_CHEEKS: Box = (10.0, 12.5, 4.5, 7.5)
_HEAD: Box = (-25.0, 25.0, -27.0, 19.0)
_DEFAULT_LOOK = Appearance(face=0, shape=0, hair=0, style=0, background=0)
_OPENINGS = np.linspace(0, 1, 9).astype(np.float32)
_CONTRAST = 1.0  # gray levels, smallest divisor for color distances: frames may be flat


@dataclass(frozen=True, kw_only=True)
class VideoReadings:
    """Readings of the video."""

    head: NDArray[np.float64]  # [n, 2] displacement of the head from rest, in shares of the side
    opening: NDArray[np.float64]  # [n] of the mouth, 0 to 1
    look: Appearance
    face_color: NDArray[np.float64]  # [K, 3] RGB, for drift
    choices: dict[str, ChoiceReading]  # gaze, brows, hand, light


def read_video(frames: NDArray[np.uint8], config: ToyConfig) -> VideoReadings:
    """Read frames uint8 ``[n, H, H, 3]`` of at least half a second at the rate of `config`."""
    half = frame_half_seconds(len(frames), config.fps)
    groups = _groups(half, float(config.fps) / 2)
    if frames.shape[1] != frames.shape[2] or not groups:
        raise UserInputError(f"frames {frames.shape} at {config.fps} fps: need square frames of at least half a second")
    video = _Video(frames)
    wall = np.median(video.box((16, 48, 0, 3.6)), axis=1)
    background, light = _read_wall(np.stack([wall[g].mean(0) for g in groups]))
    cheeks = [video.box((HEAD[0] + s * 11.2 - 0.7, HEAD[0] + s * 11.2 + 0.7, 37.5, 40.5)) for s in (-1, 1)]
    face = np.median(np.concatenate(cheeks, axis=1), axis=(0, 1))
    hair = np.median(video.box((28, 36, 12.5, 13.5)), axis=(0, 1))
    head = _find_head(video, wall, face, hair)
    aligned = video.shifted(head)
    lights = light.mode[np.maximum(half, 0).clip(max=len(groups) - 1)]
    look = _read_look(aligned, background=background, light=lights, face=face, hair=hair)
    eyes, brows = (_medians(aligned.relative(box), groups) for box in (_EYES, _FOREHEAD))
    gazes = _templates(video.size, look, "gaze", modes=GAZES, box=_EYES)
    brow_shapes = _templates(video.size, look, "brows", modes=len(BROWS), box=_FOREHEAD)
    skin = np.concatenate([aligned.relative(_mirror(_CHEEKS, s)) for s in (-1, 1)], axis=1)
    return VideoReadings(
        head=head.astype(np.float64) / 64,
        opening=_read_opening(aligned, look, config.voice),
        look=look,
        face_color=np.stack([np.median(skin[g], axis=(0, 1)) for g in groups]).astype(np.float64),
        choices={
            "gaze": make_reading(*nearest_mode(eyes, gazes)),
            "brows": make_reading(*nearest_mode(brows, brow_shapes)),
            "hand": _read_hand(video, wall, look, groups),
            "light": light,
        },
    )


class _Video:
    """Frames as floats, addressed in units of 1/64 of the side."""

    def __init__(self, frames: NDArray[Any]) -> None:
        self.frames = frames.astype(np.float32)
        self.size = frames.shape[1]

    def slices(self, box: Box) -> tuple[slice, slice]:
        """Return the rows and columns of a box."""
        x0, x1, y0, y1 = (int(np.clip(round(edge * self.size / 64), 0, self.size)) for edge in box)
        return slice(y0, max(y1, y0 + 1)), slice(x0, max(x1, x0 + 1))

    def box(self, box: Box) -> Array:
        """Return the pixels of a box, ``[n, pixels, 3]``."""
        part = self.frames[:, *self.slices(box)]
        return part.reshape(len(part), -1, 3)

    def relative(self, box: Box) -> Array:
        """Return the pixels of a box relative to a head at rest."""
        return self.box((HEAD[0] + box[0], HEAD[0] + box[1], HEAD[1] + box[2], HEAD[1] + box[3]))

    def shifted(self, by: Array) -> "_Video":
        """Return the frames with the head moved back by ``[n, 2]`` units; cubic, for little blur."""
        move = by * self.size / 64
        low = np.floor(move).astype(np.int64)
        weights = _cubic(move - low)  # [4, n, 2]
        near = self._clip(np.arange(-1, self.size + 2) + low[..., None])  # [n, 2, size + 3]
        moved = np.empty_like(self.frames)
        for i, frame in enumerate(self.frames):  # one at a time, to fit into the CPU cache
            rows = _weighted_sum(frame[near[i, 1]], weights[:, i, 1])
            columns = _weighted_sum(rows[:, near[i, 0]].swapaxes(0, 1), weights[:, i, 0])
            moved[i] = columns.swapaxes(0, 1)
        return _Video(moved)

    def _clip(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.clip(index, 0, self.size - 1)


def _weighted_sum(near: Array, weights: Array) -> Array:
    """Return the weighted sum of four neighbors: ``[size + 3, ...]`` to ``[size, ...]``."""
    size = len(near) - 3
    out: Array = weights[0] * near[:size]
    for i in range(1, 4):
        out += weights[i] * near[i : i + size]
    return out


def _cubic(part: Array) -> Array:
    """Return Catmull-Rom weights of the neighbors -1, 0, 1, 2 of a point at `part` (0 to 1)."""
    t = part.astype(np.float32)
    outer = (-0.5 * t * (1 - t) ** 2, -0.5 * t**2 * (1 - t))
    inner = (1 + t**2 * (1.5 * t - 2.5), 1 + (1 - t) ** 2 * (1.5 * (1 - t) - 2.5))
    return np.stack([outer[0], inner[0], inner[1], outer[1]])


def _mirror(box: Box, side: int) -> Box:
    return box if side > 0 else (-box[1], -box[0], box[2], box[3])


def _groups(half: NDArray[np.int64], per_half: float) -> list[slice]:
    """Return the frames of each half second that is at least half present, without the first."""
    edges = [np.flatnonzero(half == k) for k in range(half.max() + 1)]
    return [slice(int(e[0]), int(e[-1]) + 1) for e in edges if len(e) >= per_half / 2]


def _medians(patches: Array, groups: list[slice]) -> NDArray[np.float64]:
    """Return the median frame of each half second, ``[K, P]``; it removes blinks."""
    return np.stack([np.median(patches[g], axis=0).ravel() for g in groups]).astype(np.float64)


def _read_wall(colors: Array) -> tuple[int, ChoiceReading]:
    """Return the background and the light per half second from the wall color ``[K, 3]``."""
    walls = np.asarray(list(BACKGROUNDS.values()), np.float64)[:, None] * np.asarray(LIGHTS)[:, None]  # [B, L, 3]
    distance = np.linalg.norm(colors[:, None, None] - walls, axis=-1)
    background = int(distance.min(-1).sum(0).argmin())
    mode, residual = nearest_mode(colors.astype(np.float64), walls[background])
    return background, make_reading(mode, residual)


def _nearest_color(color: Array, table: dict[str, renderer.Color]) -> int:
    return int(np.linalg.norm(np.asarray(list(table.values())) - color, axis=1).argmin())


def _find_head(video: _Video, wall: Array, face: Array, hair: Array) -> Array:
    """Return the displacement of the head ``[n, 2]`` in units, from its sides and the hair."""

    def covered(box: Box) -> Array:
        """Return 1 per frame and pixel that is not wall; hair and face may be at the sides."""
        away = np.linalg.norm(video.frames[:, *video.slices(box)] - wall[:, None, None], axis=-1)
        return np.clip(
            (away / np.maximum(np.linalg.norm(face - wall, axis=1), _CONTRAST)[:, None, None] - 0.1) / 0.8, 0, 1
        )

    left, right = (covered(b).sum(2).mean(1) * 64 / video.size for b in ((6, 20.5, 36, 42), (43.5, 58, 36, 42)))
    rest = _Video(renderer.draw_frames(video.size, _DEFAULT_LOOK, renderer.draw_still(1)))
    hair_at_rest = _hair_depth(rest, rest.frames[:, 0, 0], np.asarray(HAIRS["black"], np.float32))
    return (
        np.stack([(right - left) / 2, hair_at_rest - _hair_depth(video, wall, hair)], 1).clip(-5, 5).astype(np.float32)
    )


def _hair_depth(video: _Video, wall: Array, hair: Array) -> Array:
    """Return the units of hair above the fringe in the middle of each frame."""
    toward = (hair - wall) / np.maximum(np.square(hair - wall).sum(1, keepdims=True), _CONTRAST**2)
    share = np.einsum("nhwc,nc->nhw", video.frames[:, *video.slices((27, 37, 0, 13))] - wall[:, None, None], toward)
    return share.clip(-0.5, 1).sum(1).mean(1) * np.float32(64 / video.size)


def _read_look(aligned: _Video, *, background: int, light: NDArray[np.int64], face: Array, hair: Array) -> Appearance:
    known = {"face": _nearest_color(face, FACES), "hair": _nearest_color(hair, HAIRS), "background": background}
    common = int(np.bincount(light).argmax())
    seen = np.median(aligned.relative(_HEAD)[light == common][::2], axis=0).ravel()
    combos = [(shape, style) for shape in range(len(SHAPES)) for style in range(len(STYLES))]
    outlines = _outlines(aligned.size, common, **known)
    shape, style = combos[int(nearest_mode(seen[None].astype(np.float64), outlines)[0][0])]
    return Appearance(shape=shape, style=style, **known)


@lru_cache(maxsize=64)
def _outlines(size: int, light: int, *, face: int, hair: int, background: int) -> NDArray[np.float64]:
    """Return heads of all shapes and styles, ``[shapes x styles, P]``."""
    looks = [
        Appearance(face=face, shape=shape, hair=hair, style=style, background=background)
        for shape in range(len(SHAPES))
        for style in range(len(STYLES))
    ]
    pose = renderer.draw_still(1, light=np.full(1, light))
    heads = [_Video(renderer.draw_frames(size, look, pose)).relative(_HEAD).ravel() for look in looks]
    return np.stack(heads).astype(np.float64)


@lru_cache(maxsize=256)
def _templates(size: int, look: Appearance, choice: str, *, modes: int, box: Box) -> NDArray[np.float64]:
    """Return a patch around a head at rest for each mode of a choice, ``[modes, P]``."""
    patches = _Video(
        renderer.draw_frames(size, look, renderer.draw_still(modes, **{choice: np.arange(modes)}))
    ).relative(box)
    return patches.reshape(modes, -1).astype(np.float64)


def _read_hand(video: _Video, wall: Array, look: Appearance, groups: list[slice]) -> ChoiceReading:
    return make_reading(*nearest_mode(_medians(_gloves(video, wall), groups), _hands(video.size, look)))


def _gloves(video: _Video, wall: Array) -> Array:
    """Return the position of pixels next to the head between wall ``[n, 3]`` and white."""
    strips = np.concatenate([video.box((0, 12, 0, 57)), video.box((52, 64, 0, 57))], axis=1)
    white = 250 - wall
    return np.einsum(
        "npc,nc->np", strips - wall[:, None], white / np.maximum(np.square(white).sum(1, keepdims=True), _CONTRAST**2)
    )


@lru_cache(maxsize=64)
def _hands(size: int, look: Appearance) -> NDArray[np.float64]:
    video = _Video(renderer.draw_frames(size, look, renderer.draw_still(len(HANDS), hand=np.arange(len(HANDS)))))
    return _gloves(video, video.frames[:, 0, size // 2]).astype(np.float64)


@lru_cache(maxsize=16)
def _mouths(size: int, face: int, voice: str) -> Array:
    """Return mouths of all syllables, or all visemes, and at rest in all openings, ``[shapes, openings, P]``."""
    looks = _viseme_mouths() if voice == "english" else renderer.syllable_mouths(np.arange(-1, len(VOCABULARY)))
    shapes, levels = len(looks["width"]), len(_OPENINGS)
    pose = renderer.draw_still(
        shapes * levels,
        opening=np.tile(_OPENINGS, shapes),
        **{name: np.repeat(values, levels) for name, values in looks.items()},
    )
    drawn = renderer.draw_frames(size, replace(_DEFAULT_LOOK, face=face), pose)
    return _Video(drawn).relative(_MOUTH).reshape(shapes, levels, -1)


def _viseme_mouths() -> dict[str, Array]:
    shapes = dict.fromkeys([REST, *VISEMES.values()])
    return {
        name: np.asarray([getattr(shape, name) for shape in shapes], np.float32)
        for name in ("width", "teeth", "tongue", "lip")
    }


def _read_opening(aligned: _Video, look: Appearance, voice: str) -> NDArray[np.float64]:
    """Return the mouth opening per frame: the nearest drawn mouth, refined by a parabola."""
    seen = aligned.relative(_MOUTH).reshape(len(aligned.frames), -1)
    drawn = _mouths(aligned.size, look.face, voice)
    shapes, levels, _ = drawn.shape
    flat = drawn.reshape(shapes * levels, -1)
    cost = (np.square(flat).sum(1) - 2 * seen @ flat.T).reshape(-1, shapes, levels)
    rows = np.arange(len(seen))
    line = cost[rows, cost.min(2).argmin(1)]  # [n, levels] of the nearest shape
    best = line.argmin(1)
    mid = best.clip(1, levels - 2)
    below, here, above = (line[rows, mid + step] for step in (-1, 0, 1))
    shift = 0.5 * (below - above) / np.maximum(below - 2 * here + above, 1e-6)
    return (np.clip(mid + shift.clip(-1.5, 1.5), 0, levels - 1) / (levels - 1)).astype(np.float64)
