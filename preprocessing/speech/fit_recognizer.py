"""Train the phoneme recognizer on a folder of English toy clips and write ``recognizer.safetensors``.

Example: python -m preprocessing.speech.fit_recognizer runs/clips
"""

import json
import sys
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mfcore.codecs.mel import MelCodec, MelConfig
from preprocessing.records import Word
from preprocessing.speech.recognizer import RATE, SAMPLE_RATE, WEIGHTS, PhonemeRecognizer, frame_labels

STEPS = 700
CLIPS = 600
TEST_CLIPS = 40
CROP_SECONDS = 4
BATCH = 12
LEARNING_RATE = 3e-3
CODEC = MelConfig(window=640, hop=160, group=5, channels=96)  # of the preset toy


def read_clip(path: Path) -> tuple[Tensor, NDArray[np.int64]]:
    """Return sound ``[samples]`` at 16 kHz and the labels of its frames."""
    with av.open(str(path)) as media:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        parts = [out.to_ndarray()[0] for frame in media.decode(audio=0) for out in resampler.resample(frame)]
    sound = torch.from_numpy(np.concatenate(parts))
    words = [Word(**w) for w in json.loads(path.with_suffix(".json").read_text())["transcript"]]
    return sound, frame_labels(words, len(sound) // (SAMPLE_RATE // RATE) + 1)


def crop(clip: tuple[Tensor, NDArray[np.int64]], draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return a part of ``CROP_SECONDS`` at a random level, with its labels."""
    sound, labels = clip
    start = int(draw.integers(len(sound) // SAMPLE_RATE - CROP_SECONDS))
    part = sound[start * SAMPLE_RATE : (start + CROP_SECONDS) * SAMPLE_RATE]
    level = float(10 ** draw.uniform(-0.3, 0.3))
    return part * level, torch.from_numpy(labels[start * RATE : (start + CROP_SECONDS) * RATE + 1])


def fit(folder: Path) -> PhonemeRecognizer:
    """Return a trained recognizer. Every second clip is heard after the mel codec."""
    torch.manual_seed(0)
    draw, codec = np.random.default_rng(0), MelCodec(CODEC)
    clips = [read_clip(path) for path in sorted(folder.glob("*.mp4"))[: CLIPS + TEST_CLIPS]]
    decoded = [(codec.decode(codec.encode(sound))[: len(sound)], labels) for sound, labels in clips[::2]]
    train = [*clips[1:-TEST_CLIPS:2], *decoded[: -TEST_CLIPS // 2]]
    model = PhonemeRecognizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=STEPS)
    for step in range(STEPS):
        parts = [crop(train[i], draw) for i in draw.integers(len(train), size=BATCH)]
        logits = model(torch.stack([sound for sound, _ in parts]))
        loss = F.cross_entropy(logits, torch.stack([labels for _, labels in parts]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: cross entropy {loss.item():.3f}", flush=True)
    for name, test in (("original", clips[-TEST_CLIPS + 1 :: 2]), ("decoded", decoded[-TEST_CLIPS // 2 :])):
        print(f"{name}: {accuracy(model.eval(), test):.3f} of the frames are right")
    return model


@torch.no_grad()
def accuracy(model: PhonemeRecognizer, clips: list[tuple[Tensor, NDArray[np.int64]]]) -> float:
    """Return the share of frames with the right phoneme."""
    right = [(model(sound[None]).argmax(1)[0].numpy() == labels[: len(sound) // 160 + 1]) for sound, labels in clips]
    return float(np.concatenate(right).mean())


if __name__ == "__main__":
    weights = fit(Path(sys.argv[1])).state_dict()
    save_file({name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}, WEIGHTS)
