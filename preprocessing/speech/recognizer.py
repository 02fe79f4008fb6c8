"""Frame-wise phoneme recognizer of the toy world, a judge of generated English speech.

A small convolutional network reads 64 log-mel bands and names the phoneme at each 10 ms. It was trained on flite voices
and on their sound after the mel codec (``fit_recognizer.py``), so it judges how clearly phonemes of those voices are
spoken, not English in general.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mfcore.codecs.mel import mel_filterbank
from preprocessing.records import Word
from preprocessing.speech.phonemes import PAUSE, PHONEMES, parse_token

RATE = 100  # frames per second
SAMPLE_RATE = 16000
LABELS = (PAUSE, *PHONEMES)
WEIGHTS = Path(__file__).with_name("recognizer.safetensors")
_WINDOW = 512  # samples of a frame
_BANDS = 64
_FLOOR = 1e-6  # power added before the logarithm
_WIDTH = 160
_DILATIONS = (1, 2, 4, 2, 1)


class PhonemeRecognizer(nn.Module):
    """Five dilated convolutions over log-mel frames; about 0.7M weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "bank", torch.from_numpy(mel_filterbank(SAMPLE_RATE, _WINDOW, _BANDS)).float(), persistent=False
        )
        widths = [_BANDS, *(_WIDTH for _ in _DILATIONS)]
        self.layers = nn.ModuleList(
            nn.Conv1d(a, _WIDTH, 5, padding=2 * d, dilation=d) for a, d in zip(widths[:-1], _DILATIONS, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, _WIDTH) for _ in _DILATIONS)
        self.output = nn.Conv1d(_WIDTH, len(LABELS), 1)

    def forward(self, sound: Float[Tensor, "B samples"]) -> Float[Tensor, "B labels frames"]:
        """Return the logits of each frame; frame i is centered at i / RATE seconds."""
        window = torch.hann_window(_WINDOW, device=sound.device)
        spectrum = torch.stft(sound, _WINDOW, SAMPLE_RATE // RATE, window=window, return_complex=True)
        bank = self.get_buffer("bank")
        x = (bank @ spectrum.abs().square() / window.square().sum() + _FLOOR).log() / 4 + 1
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = F.gelu(norm(layer(x)))
            x = x + y if x.shape == y.shape else y
        return self.output(x)


def frame_labels(words: Sequence[Word], frames: int) -> NDArray[np.int64]:
    """Return the number of the phoneme in ``LABELS`` at each of ``frames`` frames; 0 between phonemes."""
    labels = np.zeros(frames, np.int64)
    for word in words:
        if token := parse_token(word.word):
            labels[round(word.start * RATE) : round(word.end * RATE)] = LABELS.index(token[0])
    return labels


@cache
def load_recognizer() -> PhonemeRecognizer:
    """Return the recognizer with the packaged weights."""
    model = PhonemeRecognizer()
    model.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    return model.eval()


@torch.no_grad()
def recognize_frames(sound: Float[Tensor, " samples"]) -> Int[Tensor, " frames"]:
    """Return the number of the phoneme in ``LABELS`` at each 10 ms of mono sound at 16 kHz."""
    return load_recognizer()(sound[None]).argmax(1)[0]


def correct_frames(words: Sequence[Word], sound: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return whether the phoneme at each 10 ms of the sound is that of the transcript."""
    found = recognize_frames(torch.from_numpy(sound)).numpy()
    return found == frame_labels(words, len(found))
