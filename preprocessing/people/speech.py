"""Voice activity, speech quality and speaker embeddings of a waveform, on one CPU thread.

Models: Silero VAD; DNSMOS P.835, arXiv 2110.01763; speaker encoder with the GE2E loss, arXiv 1710.10467 (Resemblyzer).
All take 16 kHz audio.
"""

from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import resample_poly
from torch import nn

from preprocessing.people.packages import model_file
from preprocessing.records import Waveform

RATE = 16000
VAD_WINDOW, VAD_CONTEXT = 512, 64  # samples
SPEECH = 0.5  # probability of a window of speech
QUALITY_SAMPLES = 144160  # of one DNSMOS input, 9.01 s
QUALITY_FIT = np.array([-0.06766283, 1.11546468, 0.04602535])  # polynomial of the overall score, highest power first
MELS, MEL_WINDOW, MEL_HOP = 40, 400, 160
PARTIAL_FRAMES, PARTIAL_STEP = 160, 80  # mel frames of one embedding and between two
LEVEL_DB = -30.0  # quieter speech is raised to it before it is embedded


def to_model_rate(waveform: Waveform, sample_rate: int) -> Waveform:
    """Return the waveform at 16 kHz."""
    if sample_rate == RATE:
        return waveform
    shared = gcd(sample_rate, RATE)
    return resample_poly(waveform, RATE // shared, sample_rate // shared).astype(np.float32)


def _session(name: str) -> Any:
    import onnxruntime  # pyright: ignore

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(model_file(name)), options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=1)
def _voice_activity_model() -> Any:
    return _session("voice_activity")


@lru_cache(maxsize=1)
def _quality_model() -> Any:
    return _session("speech_quality")


def voice_activity(sound: Waveform) -> NDArray[np.bool_]:
    """Return whether each window of 32 ms of a 16 kHz waveform contains speech; the last one is padded."""
    model, rate = _voice_activity_model(), np.array(RATE, np.int64)
    windows = -(-len(sound) // VAD_WINDOW)
    padded = np.zeros(VAD_CONTEXT + windows * VAD_WINDOW, np.float32)
    padded[VAD_CONTEXT : VAD_CONTEXT + len(sound)] = sound
    state = np.zeros((2, 1, 128), np.float32)
    found = np.zeros(windows, np.bool_)
    for i in range(windows):
        window = padded[None, i * VAD_WINDOW : (i + 1) * VAD_WINDOW + VAD_CONTEXT]
        probability, state = model.run(None, {"input": window, "state": state, "sr": rate})
        found[i] = probability[0, 0] >= SPEECH
    return found


def speech_seconds(active: NDArray[np.bool_]) -> float:
    """Return the seconds of speech of the windows of `voice_activity`."""
    return float(active.sum()) * VAD_WINDOW / RATE


def speech_quality(sound: Waveform) -> float | None:
    """Return the overall DNSMOS of a 16 kHz waveform, 1 to 5: the mean over inputs of 9.01 s that start every 4.5 s.

    A shorter waveform is repeated. None for an empty one.
    """
    if len(sound) == 0:
        return None
    repeated = np.resize(sound, QUALITY_SAMPLES) if len(sound) < QUALITY_SAMPLES else sound
    starts = range(0, len(repeated) - QUALITY_SAMPLES + 1, QUALITY_SAMPLES // 2)
    model = _quality_model()
    raw = [model.run(None, {"input_1": repeated[None, s : s + QUALITY_SAMPLES]})[0][0, 2] for s in starts]
    return float(np.mean(np.polyval(QUALITY_FIT, np.array(raw, np.float64))))


class SpeakerEncoder(nn.Module):
    """Three LSTM layers over mel frames, a linear layer with ReLU, and normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MELS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings (B, 256) of mel power spectra (B, n, MELS)."""
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)


@lru_cache(maxsize=1)
def _speaker_encoder() -> SpeakerEncoder:
    weights = torch.load(model_file("speaker"), map_location="cpu", weights_only=True)["model_state"]
    encoder = SpeakerEncoder()
    encoder.load_state_dict({name: value for name, value in weights.items() if not name.startswith("similarity")})
    return encoder.eval().requires_grad_(False)


def speaker_embedding(sound: Waveform) -> NDArray[np.float32] | None:
    """Return the unit embedding (256,) of the voice in a 16 kHz waveform; None below 1.6 s.

    It is the normalized mean over parts of 1.6 s that start every 0.8 s.
    """
    parts = partial_embeddings(sound)
    if not len(parts):
        return None
    mean = parts.mean(0)
    return mean / np.linalg.norm(mean)


def partial_embeddings(sound: Waveform) -> NDArray[np.float32]:
    """Return unit embeddings (n, 256) of parts of 1.6 s of a 16 kHz waveform that start every 0.8 s."""
    mels = _mel_power(_raise_level(sound))
    starts = range(0, len(mels) - PARTIAL_FRAMES + 1, PARTIAL_STEP)
    if not len(starts):
        return np.zeros((0, 256), np.float32)
    return _speaker_encoder()(torch.from_numpy(np.stack([mels[s : s + PARTIAL_FRAMES] for s in starts]))).numpy()


def voice_similarity(sound: Waveform, active: NDArray[np.bool_]) -> float | None:
    """Return the cosine of the embeddings of both halves of the speech; None if a half is shorter than 1.6 s."""
    samples = np.repeat(active, VAD_WINDOW)[: len(sound)]
    speech = sound[samples]
    halves = [speaker_embedding(half) for half in np.array_split(speech, 2)]
    if halves[0] is None or halves[1] is None:
        return None
    return float(halves[0] @ halves[1])


def _raise_level(sound: Waveform) -> Waveform:
    power = float(np.mean(np.square(sound, dtype=np.float64))) if len(sound) else 0.0
    level = 10 * np.log10(power) if power > 0 else LEVEL_DB
    return sound if level >= LEVEL_DB else sound * np.float32(10 ** ((LEVEL_DB - level) / 20))


def _mel_power(sound: Waveform) -> NDArray[np.float32]:
    """Return mel power spectra (n, MELS) with a Hann window of 25 ms every 10 ms, centered."""
    if len(sound) < MEL_WINDOW:
        return np.zeros((0, MELS), np.float32)
    wave = torch.from_numpy(np.ascontiguousarray(sound))
    window = torch.hann_window(MEL_WINDOW)
    spectrum = torch.stft(wave, MEL_WINDOW, MEL_HOP, window=window, pad_mode="constant", return_complex=True)
    return (spectrum.abs().square().T @ torch.from_numpy(slaney_filterbank().T.astype(np.float32))).numpy()


@lru_cache(maxsize=1)
def slaney_filterbank() -> NDArray[np.float64]:
    """Return triangular filters (MELS, MEL_WINDOW / 2 + 1) of unit area on Slaney's scale.

    The scale is linear up to 1 kHz (15 mels) and logarithmic above, with 27 mels for a factor of 6.4.
    """

    def to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    highest = 15 + np.log(RATE / 2 / 1000) * 27 / np.log(6.4)
    edges = to_hz(np.linspace(0, highest, MELS + 2))
    bins = np.linspace(0, RATE / 2, MEL_WINDOW // 2 + 1)
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]
