"""Faces and voices of sessions: drawn by a seed as the toy world does, or read from an upload."""

import io
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mfcore.errors import UserInputError
from mfcore.types import Condition
from preprocessing.speech import flite
from preprocessing.toyworld.first_frame import FirstFrame, draw_first_frame, world_config
from preprocessing.toyworld.voice import VOCABULARY, TranscriptWord, Voice, synthesize
from preprocessing.toyworld.voice import VOICES as PITCHES
from preprocessing.toyworld.world import ToyConfig
from workflows.inference.inputs import read_first_frame, read_voice
from workflows.inference.pipeline import StreamingPipeline
from workflows.serving.talker import Talker

MAX_SEED = 2**31 - 1
VOICE_TEXT = "Hello, this is the voice that you will hear."
_SYLLABLE_SECONDS = 0.24
_T = TypeVar("_T")


def drawn_world(talker: Talker) -> ToyConfig | None:
    """Return the toy world of drawn faces; None if the network has no square frames of its sizes."""
    if talker.size is None or talker.size[0] != talker.size[1] or not 32 <= talker.size[0] <= 512:
        return None
    return world_config(talker.pipeline.metadata.world, talker.size[0]) or ToyConfig(size=talker.size[0], seconds=1.0)


def draw_face(talker: Talker, seed: int) -> FirstFrame:
    """Return the drawn face of a seed. Raises UserInputError if the network has no drawn faces."""
    world = drawn_world(talker)
    if world is None:
        raise UserInputError("this network has no drawn faces: upload a picture")
    return draw_first_frame(world, seed)


def face_png(talker: Talker, seed: int) -> tuple[bytes, str]:
    """Return a drawn face as PNG, and its caption."""
    face, buffer = draw_face(talker, seed), io.BytesIO()
    Image.fromarray(face.pixels).save(buffer, "PNG")
    return buffer.getvalue(), face.caption


def has_voices(talker: Talker) -> bool:
    """Return True if voices can be drawn: English needs the program flite."""
    if talker.sample_rate is None:
        return False
    return not talker.english or (talker.sample_rate == flite.SAMPLE_RATE and _has_flite())


def _has_flite() -> bool:
    try:
        flite.require_flite()
    except UserInputError:
        return False
    return True


def draw_voice(talker: Talker, seed: int) -> Tensor:
    """Return a recording of the drawn voice of a seed, samples in [-1, 1]. Raises UserInputError without voices."""
    if not has_voices(talker):
        raise UserInputError("this network has no drawn voices: upload a recording")
    assert talker.sample_rate is not None
    if talker.english:
        spoken = flite.speak(VOICE_TEXT, flite.VOICES[seed % len(flite.VOICES)])
        return torch.from_numpy(spoken.waveform.copy())
    words = [
        TranscriptWord(word=name, start=i * _SYLLABLE_SECONDS, end=(i + 1) * _SYLLABLE_SECONDS)
        for i, name in enumerate(VOCABULARY[:8])
    ]
    voice = Voice(pitch=PITCHES[seed % len(PITCHES)], tones=(0,))
    samples = int(words[-1]["end"] * talker.sample_rate)
    return torch.from_numpy(synthesize(words, voice, samples=samples, sample_rate=talker.sample_rate, seed=seed))


def voice_wav(talker: Talker, seed: int) -> bytes:
    """Return a drawn voice as WAV."""
    samples, buffer = draw_voice(talker, seed).numpy(), io.BytesIO()
    assert talker.sample_rate is not None
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(talker.sample_rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def read_face(talker: Talker, data: bytes) -> Tensor:
    """Return an uploaded picture, uint8 (height, width, 3). Raises UserInputError with the reason."""
    return _read_upload(data, "--first-frame", lambda path, pipeline: read_first_frame(path, pipeline), talker)


def read_voice_upload(talker: Talker, data: bytes) -> Tensor:
    """Return an uploaded recording, samples in [-1, 1]. Raises UserInputError with the reason."""
    return _read_upload(data, "--voice", read_voice, talker)


def _read_upload(data: bytes, option: str, read: Callable[[str, StreamingPipeline], _T | None], talker: Talker) -> _T:
    with tempfile.TemporaryDirectory(prefix="mfctl-upload-") as folder:
        file = Path(folder) / "upload"
        file.write_bytes(data)
        try:
            found = read(str(file), talker.pipeline)
        except UserInputError as error:
            raise UserInputError(str(error).replace(f"{option} {file}", "the upload")) from None
    assert found is not None
    return found


def default_condition(talker: Talker) -> Condition:
    """Return the condition of a silent session with the face of seed 0."""
    return talker.encode(caption="", first_frame=default_face(talker), voice=None)


def default_face(talker: Talker) -> Tensor | None:
    """Return the drawn face of seed 0, gray without drawn faces, None without video."""
    if talker.size is None:
        return None
    if drawn_world(talker) is None:
        return torch.full((*talker.size, 3), 128, dtype=torch.uint8)
    return torch.from_numpy(draw_face(talker, 0).pixels.copy())
