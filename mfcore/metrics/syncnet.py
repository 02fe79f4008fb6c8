"""SyncNet (Chung and Zisserman, "Out of time", 2016): lips and speech in one space, from a local file of weights.

Letters: b windows, f frames at 25 per second, k cepstral frames at 100 per second.

The layers and their names are those of the published checkpoint (``syncnet_v2.model``). A window is five frames of a
face, 224 x 224, BGR, 0 to 255, and the 0.2 s of audio around them as 13 cepstral coefficients. The offset is the shift,
up to 15 frames, of the minimal mean distance. The confidence is the median distance minus the minimum. SyncNet is
trained on tight crops of one face; its confidence is low on other videos.
"""

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.fft import dct
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from mfcore.errors import UserInputError
from mfcore.metrics.av_sync import SyncResult
from mfcore.metrics.speech import resample

FPS = 25  # frames per second
RATE = 16000  # samples per second
FACE = 224  # pixels
_WINDOW = 5  # frames
_SHIFT = 15  # frames, as in LatentSync
_WINDOWS = 16  # per batch: 20 MB of pixels
_Layer = tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # in, out, kernel, stride, padding
_Pool = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # kernel, stride, padding

_SOUND: list[tuple[_Layer, _Pool | None]] = [
    ((1, 64, (3, 3), (1, 1), (1, 1)), ((1, 1), (1, 1), (0, 0))),
    ((64, 192, (3, 3), (1, 1), (1, 1)), ((3, 3), (1, 2), (0, 0))),
    ((192, 384, (3, 3), (1, 1), (1, 1)), None),
    ((384, 256, (3, 3), (1, 1), (1, 1)), None),
    ((256, 256, (3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (0, 0))),
    ((256, 512, (5, 4), (1, 1), (0, 0)), None),
]
_LIPS: list[tuple[_Layer, _Pool | None]] = [
    ((3, 96, (5, 7, 7), (1, 2, 2), (0, 0, 0)), ((1, 3, 3), (1, 2, 2), (0, 0, 0))),
    ((96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)), ((1, 3, 3), (1, 2, 2), (0, 1, 1))),
    ((256, 256, (1, 3, 3), (1, 1, 1), (0, 1, 1)), None),
    ((256, 256, (1, 3, 3), (1, 1, 1), (0, 1, 1)), None),
    ((256, 256, (1, 3, 3), (1, 1, 1), (0, 1, 1)), ((1, 3, 3), (1, 2, 2), (0, 0, 0))),
    ((256, 512, (1, 6, 6), (1, 1, 1), (0, 0, 0)), None),
]


class SyncNet(nn.Module):
    """Two towers with outputs of width 1024."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = _tower(_SOUND, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
        self.netfcaud = _head()
        self.netcnnlip = _tower(_LIPS, nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d)
        self.netfclip = _head()

    def sound(self, cepstra: Float[Tensor, "b 1 13 20"]) -> Float[Tensor, "b 1024"]:
        """Return vectors of audio windows."""
        return self.netfcaud(self.netcnnaud(cepstra).flatten(1))

    def lips(self, faces: Float[Tensor, "b 3 5 224 224"]) -> Float[Tensor, "b 1024"]:
        """Return vectors of face windows."""
        return self.netfclip(self.netcnnlip(faces).flatten(1))


def _tower(layers: list[tuple[_Layer, _Pool | None]], conv: Any, norm: Any, pool: Any) -> nn.Sequential:
    parts: list[nn.Module] = []
    for (channels, out, kernel, stride, padding), pooling in layers:
        parts += [conv(channels, out, kernel, stride, padding), norm(out), nn.ReLU()]
        if pooling is not None:
            parts.append(pool(*pooling))
    return nn.Sequential(*parts)


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))


def load_syncnet(path: str | Path) -> SyncNet:
    """Return the network with the weights of a file: the published checkpoint (tensors only) or safetensors.

    Raises ValueError if the file cannot be read or has other tensors than SyncNet.
    """
    try:
        state = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch.load raises almost any class for a file of another kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserInputError(f"cannot read SyncNet weights from {path}: {reason}. Name the checkpoint file") from None
    if not isinstance(state, dict):
        raise UserInputError(f"{path} is not SyncNet: it contains a {type(state).__name__}. Name the checkpoint file")
    network = SyncNet()
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    weights: dict[str, Tensor] = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(expected.keys() ^ weights.keys()) or [k for k in expected if expected[k].shape != weights[k].shape]
    if wrong:
        raise UserInputError(f"{path} is not SyncNet: {len(wrong)} tensors are missing or differ, such as {wrong[0]}")
    network.load_state_dict(weights, strict=False)
    return network.eval().requires_grad_(False)


class SyncNetSync:
    """A :class:`mfcore.metrics.av_sync.SyncEstimator`; confidence as published, 3 or more for synchronized speech."""

    def __init__(self, network: SyncNet, device: torch.device | str = "cpu") -> None:
        self.network = network.to(device)
        self._device = torch.device(device)

    def __call__(
        self, frames: NDArray[np.uint8], fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> SyncResult:
        """Return the offset of ``frames`` (f, H, W, 3) of a face and mono ``sound``, of any size and rate."""
        lips, audio = self.vectors(frames, fps, sound, sample_rate)
        return best_offset(torch.from_numpy(lips), torch.from_numpy(audio)) if len(lips) > 1 else SyncResult(0.0, 0.0)

    def vectors(
        self, frames: NDArray[np.uint8], fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return vectors ``(n, 1024)`` of lips and audio, ``FPS`` per second: a ``LipEmbeddingModel``."""
        faces, cepstra = face_windows(frames, fps), mfcc(resample(sound, sample_rate, RATE))
        count = min(len(faces), (len(cepstra) // 4) - _WINDOW + 1)
        if count < 1:
            return np.zeros((0, 1024), np.float32), np.zeros((0, 1024), np.float32)
        windows = torch.from_numpy(cepstra).float().unfold(0, 4 * _WINDOW, 4)[:count, None]
        lips, audio = self._vectors(faces[:count], self.network.lips), self._vectors(windows, self.network.sound)
        return lips.numpy(), audio.numpy()

    @torch.inference_mode()
    def _vectors(self, windows: Tensor, tower: Any) -> Float[Tensor, "b 1024"]:
        return torch.cat([tower(part.float().to(self._device)).float().cpu() for part in windows.split(_WINDOWS)])


def best_offset(lips: Float[Tensor, "b D"], audio: Float[Tensor, "b D"], shift: int = _SHIFT) -> SyncResult:
    """Return the shift of the minimal mean distance; audio is padded with zeros, as published."""
    padded = pad(audio, (0, 0, shift, shift))
    distances = torch.stack(
        [torch.nn.functional.pairwise_distance(lips, padded[i : i + len(lips)]).mean() for i in range(2 * shift + 1)]
    )
    best = int(distances.argmin())
    return SyncResult((best - shift) / FPS, float(distances.median() - distances[best]))


def face_windows(frames: NDArray[np.uint8], fps: float) -> Float[Tensor, "b 3 5 224 224"]:
    """Return all windows of five consecutive frames at 25 per second, BGR (a view without copies)."""
    count = int(len(frames) / fps * FPS)
    nearest = np.minimum(np.round(np.arange(count) * fps / FPS).astype(int), len(frames) - 1)
    pixels = torch.from_numpy(frames[nearest][..., ::-1].copy()).permute(0, 3, 1, 2).float()
    edge = min(pixels.shape[2:])
    top, left = (pixels.shape[2] - edge) // 2, (pixels.shape[3] - edge) // 2
    square = pixels[:, :, top : top + edge, left : left + edge]
    faces = interpolate(square, size=(FACE, FACE), mode="bilinear", align_corners=False) if len(square) else square
    return faces.unfold(0, _WINDOW, 1).permute(0, 1, 4, 2, 3) if count >= _WINDOW else faces[:0, :, None]


def mfcc(sound: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the cepstra ``(k, 13)`` of 16 kHz audio in [-1, 1], as in training of the published checkpoint.

    16-bit samples, pre-emphasis 0.97, windows of 25 ms every 10 ms without taper, power of a 512-point transform, 26
    mel triangles from 0 to 8 kHz at whole bins, logarithm, orthonormal cosine transform, lifter 22. The first
    coefficient is the logarithm of the energy of the window.
    """
    if not len(sound):
        return np.zeros((0, 13))
    wave = np.clip(np.round(sound.astype(np.float64) * 32768), -32768, 32767)
    wave = np.append(wave[0], wave[1:] - 0.97 * wave[:-1])
    count = 1 + max(0, ceil((len(wave) - 400) / 160))
    wave = np.pad(wave, (0, max(0, (count - 1) * 160 + 400 - len(wave))))
    windows = np.lib.stride_tricks.sliding_window_view(wave, 400)[::160][:count]
    power = np.abs(np.fft.rfft(windows, 512)) ** 2 / 512
    eps = np.finfo(float).eps
    energy = power.sum(1)
    bands = power @ _triangles().T
    whole: NDArray[np.float64] = np.asarray(dct(np.log(np.where(bands == 0, eps, bands)), 2, axis=1, norm="ortho"))
    cepstra = whole[:, :13] * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
    cepstra[:, 0] = np.log(np.where(energy == 0, eps, energy))
    return cepstra


def _triangles() -> NDArray[np.float64]:
    """Return the mel filters, 26 x 257."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = np.floor(513 * 700 * (10 ** (np.linspace(0, top, 28) / 2595) - 1) / RATE)
    bins = np.arange(257)
    low = corners[:-2, None]
    peak = corners[1:-1, None]
    high = corners[2:, None]
    rise, fall = (bins - low) / np.maximum(peak - low, 1), (high - bins) / np.maximum(high - peak, 1)
    return np.where((bins >= low) & (bins < peak), rise, np.where((bins >= peak) & (bins < high), fall, 0.0))
