"""A network that a server can serve, and a stand-in that flashes and beeps: its signals are known exactly.

Every whole second has one white frame and a beep of 40 ms over a quiet tone. While a word is spoken, frames are red.
"""

import io
from pathlib import Path

import av
import numpy as np
import torch

from preprocessing.media.live_muxer import OUTPUT_RATE
from tests.helpers.random_exports import random_export
from workflows.serving.talker import Signals, Talker

FPS, RATE, CHUNK_FRAMES, CHUNK_SAMPLES = 24, 16000, 12, 8000
DELAY = 800  # samples by which a chunk of sound ends before its frames, as that of a real decoder
SIZE = 32


def toy_talker(folder: Path) -> Talker:
    """Return a tiny network with random weights, for 32 x 32 pixels."""
    return Talker.from_checkpoint(str(random_export(folder, "mutual")), name="toy", steps=1, device="cpu")


class FlashBeepTalker(Talker):
    """Talker with known signals. Chunks cost nothing, so tests measure the server."""

    fails_at: int | None = None  # chunk at which a pass raises

    def advance(self, rows):
        """Return the times of the words of each row in place of latents."""
        made = []
        for row in rows:
            if row.chunk == self.fails_at:
                raise RuntimeError("the stand-in fails")
            made.append({"chunk": row.chunk, "words": row.cond.word_times[row.cond.words_mask]})
            row.chunk += 1
        return made

    def decoder(self, cond):
        """Return the decoder of the known signals."""
        return FlashBeepDecoder()


class FlashBeepDecoder:
    """Streaming decoder of the known signals."""

    def __init__(self):
        self.frames = self.samples = 0

    def push(self, latents):
        """Return the signals up to the end of a chunk."""
        end = latents["chunk"] + 1
        return self._until(end * CHUNK_FRAMES + 1, end * CHUNK_SAMPLES - DELAY, latents["words"])

    def flush(self, chunks):
        """Return the rest of the sound."""
        return self._until(self.frames, (chunks * CHUNK_FRAMES + 1) * RATE // FPS, torch.zeros(0, 2))

    def _until(self, frames, samples, words):
        n, j = np.arange(self.samples, samples), np.arange(self.frames, frames)
        self.frames, self.samples = frames, samples
        pictures = np.zeros((len(j), SIZE, SIZE, 3), np.uint8)
        for start, end in words.tolist():
            pictures[(j / FPS >= start) & (j / FPS < end), ..., 0] = 255
        pictures[j % FPS == 0] = 255
        beep, tone = 0.8 * np.sin(2 * np.pi * 2000 * n / RATE), 0.1 * np.sin(2 * np.pi * 400 * n / RATE)
        return Signals(frames=pictures, samples=np.where(n % RATE < 640, beep, tone).astype(np.float32))

    def state(self):
        """Return the counts."""
        return {"counts": torch.tensor([self.frames, self.samples])}

    def load_state(self, state):
        """Continue after other counts."""
        self.frames, self.samples = (int(n) for n in state["counts"])


def flash_beep_talker(folder: Path) -> FlashBeepTalker:
    """Return the stand-in."""
    return FlashBeepTalker(toy_talker(folder).pipeline, name="flash-beep", steps=1)


class DecodedClip:
    """Frames and samples of an mp4."""

    def __init__(self, data: bytes):
        with av.open(io.BytesIO(data)) as container:
            self.comment = container.metadata.get("comment")
            frames = [(float(f.time), f.to_ndarray(format="rgb24").mean((0, 1))) for f in container.decode(video=0)]
        with av.open(io.BytesIO(data)) as container:
            parts = [(float(f.time), f.to_ndarray()[0]) for f in container.decode(audio=0)]
        self.times = np.asarray([time for time, _ in frames])
        self.colors = np.asarray([color for _, color in frames])
        self.sound = np.concatenate([samples for _, samples in parts])
        self.sound_start = parts[0][0]

    @property
    def frame_numbers(self) -> list[int]:
        """Numbers of the frames by their times."""
        return [round(t * FPS) for t in self.times]

    @property
    def flashes(self) -> list[float]:
        """Times of white frames, in seconds."""
        return [float(t) for t, color in zip(self.times, self.colors, strict=True) if color.min() > 128]

    @property
    def spoken(self) -> np.ndarray:
        """Times of red frames, in seconds."""
        return self.times[(self.colors[:, 0] > 128) & (self.colors[:, 1] < 128)]

    @property
    def beeps(self) -> np.ndarray:
        """Times at which beeps begin, in seconds."""
        loud = np.flatnonzero(np.abs(self.sound) > 0.5) / OUTPUT_RATE + self.sound_start
        return loud[np.r_[True, np.diff(loud) > 0.5]]

    def assert_in_sync(self, seconds: float) -> None:
        """Assert that every whole second has its flash and its beep, and no frame is missing."""
        assert self.frame_numbers == list(range(round(seconds * FPS) + 1))
        whole = np.arange(int(seconds) + 1)
        assert self.flashes == [float(k) for k in whole]
        assert np.abs(self.beeps[1:] - whole[1 : len(self.beeps)]).max() < 0.001  # the first starts with the encoder
        assert len(self.beeps) >= int(seconds)

    def assert_no_click(self, chunks: int) -> None:
        """Assert at half seconds, which have the tone alone, that the sound has no gap and no jump."""
        window = OUTPUT_RATE // 200
        middle = ((np.arange(1, chunks, 2) * 0.5 - self.sound_start) * OUTPUT_RATE).astype(int)
        inside = self.sound[middle[0] + 4800 : middle[0] + 9600]
        for at in middle:
            part = self.sound[at - window : at + window]
            assert np.sqrt(np.square(part).mean()) > 0.8 * np.sqrt(np.square(inside).mean())
            assert np.abs(np.diff(part)).max() < 1.5 * np.abs(np.diff(inside)).max()
