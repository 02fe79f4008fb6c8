"""SyncNet (Chung and Zisserman, "Out of time", 2016): lips and speech into one space, from a local file of weights.

Letters: b windows, f frames at 25 per second, k cepstral frames at 100 per second.

The layers and their names are those of the published checkpoint (``syncnet_v2.model``). A window is five frames of a
face, 224 x 224, blue first, 0 to 255, and the 0.2 s of sound with them as 13 cepstral coefficients. The offset is where
the mean distance of the two, over shifts of up to 15 frames, is least; the confidence is the median distance less the
least one. It was trained on tight crops of one face: of other pictures it says little, and says so by its confidence.
"""

import pickle
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

from mfcore.metrics.av_sync import SyncResult
from mfcore.metrics.speech import resample

FPS, RATE, FACE = 25, 16000, 224
_WINDOW = 5  # frames
_SHIFT = 15  # frames, as LatentSync searches
_WINDOWS = 16  # a batch: 20 MB of pixels
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
    """Two towers to vectors of 1024 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = _tower(_SOUND, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
        self.netfcaud = _head()
        self.netcnnlip = _tower(_LIPS, nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d)
        self.netfclip = _head()

    def sound(self, cepstra: Float[Tensor, "b 1 13 20"]) -> Float[Tensor, "b 1024"]:
        return self.netfcaud(self.netcnnaud(cepstra).flatten(1))

    def lips(self, faces: Float[Tensor, "b 3 5 224 224"]) -> Float[Tensor, "b 1024"]:
        return self.netfclip(self.netcnnlip(faces).flatten(1))


def _tower(layers: list[tuple[_Layer, _Pool | None]], conv: Any, norm: Any, pool: Any) -> nn.Sequential:
    parts: list[nn.Module] = []
    for (into, out, kernel, stride, padding), then in layers:
        parts += [conv(into, out, kernel, stride, padding), norm(out), nn.ReLU()]
        if then is not None:
            parts.append(pool(*then))
    return nn.Sequential(*parts)


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))


def load_syncnet(path: str | Path) -> SyncNet:
    """The network with the weights of a file: the published one (read as tensors only, no code) or safetensors.

    ValueError when it cannot be read, or its tensors are others than SyncNet's.
    """
    try:
        found = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as weights of SyncNet: {str(error).splitlines()[0]}") from None
    network = SyncNet()
    wanted = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    given: dict[str, Tensor] = {k: v for k, v in found.items() if not k.endswith("num_batches_tracked")}
    odd = sorted(wanted.keys() ^ given.keys()) or [k for k in wanted if wanted[k].shape != given[k].shape]
    if odd:
        raise ValueError(f"{path} does not hold SyncNet: {len(odd)} tensors are missing or others, such as {odd[0]}")
    network.load_state_dict(given, strict=False)
    return network.eval().requires_grad_(False)


class SyncNetSync:
    """A :class:`mfcore.metrics.sync.SyncEstimator`; confidence as published, 3 and more for speech in step."""

    def __init__(self, network: SyncNet, device: torch.device | str = "cpu") -> None:
        self.network = network.to(device)
        self._device = torch.device(device)

    def __call__(
        self, frames: NDArray[np.uint8], fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> SyncResult:
        """``frames`` (f, H, W, 3) of a face at any size and rate, mono ``sound`` at any rate."""
        lips, heard = self.vectors(frames, fps, sound, sample_rate)
        return best_offset(torch.from_numpy(lips), torch.from_numpy(heard)) if len(lips) > 1 else SyncResult(0.0, 0.0)

    def vectors(
        self, frames: NDArray[np.uint8], fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Vectors ``(n, 1024)`` of lips and of sound, ``FPS`` a second: a :class:`mfcore.metrics.lse.LipVectors`."""
        faces, cepstra = face_windows(frames, fps), mfcc(resample(sound, sample_rate, RATE))
        count = min(len(faces), (len(cepstra) // 4) - _WINDOW + 1)
        if count < 1:
            return np.zeros((0, 1024), np.float32), np.zeros((0, 1024), np.float32)
        windows = torch.from_numpy(cepstra).float().unfold(0, 4 * _WINDOW, 4)[:count, None]
        lips, heard = self._vectors(faces[:count], self.network.lips), self._vectors(windows, self.network.sound)
        return lips.numpy(), heard.numpy()

    @torch.inference_mode()
    def _vectors(self, windows: Tensor, tower: Any) -> Float[Tensor, "b 1024"]:
        return torch.cat([tower(part.float().to(self._device)).float().cpu() for part in windows.split(_WINDOWS)])


def best_offset(lips: Float[Tensor, "b D"], heard: Float[Tensor, "b D"], shift: int = _SHIFT) -> SyncResult:
    """The shift at which the mean distance is least; beyond the ends of the sound there are zeros, as published."""
    around = pad(heard, (0, 0, shift, shift))
    distances = torch.stack(
        [torch.nn.functional.pairwise_distance(lips, around[i : i + len(lips)]).mean() for i in range(2 * shift + 1)]
    )
    least = int(distances.argmin())
    return SyncResult((least - shift) / FPS, float(distances.median() - distances[least]))


def face_windows(frames: NDArray[np.uint8], fps: float) -> Float[Tensor, "b 3 5 224 224"]:
    """Every five frames that follow each other at 25 per second, blue first (a view: no copies of pixels)."""
    count = int(len(frames) / fps * FPS)
    nearest = np.minimum(np.round(np.arange(count) * fps / FPS).astype(int), len(frames) - 1)
    pixels = torch.from_numpy(frames[nearest][..., ::-1].copy()).permute(0, 3, 1, 2).float()
    edge = min(pixels.shape[2:])
    top, left = (pixels.shape[2] - edge) // 2, (pixels.shape[3] - edge) // 2
    square = pixels[:, :, top : top + edge, left : left + edge]
    faces = interpolate(square, size=(FACE, FACE), mode="bilinear", align_corners=False) if len(square) else square
    return faces.unfold(0, _WINDOW, 1).permute(0, 1, 4, 2, 3) if count >= _WINDOW else faces[:0, :, None]


def mfcc(sound: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Cepstra ``(k, 13)`` of 16 kHz sound in [-1, 1] as the published checkpoint was trained on them.

    Samples as 16-bit numbers, pre-emphasis 0.97, windows of 25 ms every 10 ms without taper, power of a 512-point
    transform, 26 mel triangles from 0 to 8 kHz at whole bins, logarithm, orthonormal cosine transform, lifter 22; the
    first coefficient is the logarithm of the window's energy.
    """
    if not len(sound):
        return np.zeros((0, 13))
    wave = np.clip(np.round(sound.astype(np.float64) * 32768), -32768, 32767)
    wave = np.append(wave[0], wave[1:] - 0.97 * wave[:-1])
    count = 1 + max(0, ceil((len(wave) - 400) / 160))
    wave = np.pad(wave, (0, max(0, (count - 1) * 160 + 400 - len(wave))))
    windows = np.lib.stride_tricks.sliding_window_view(wave, 400)[::160][:count]
    power = np.abs(np.fft.rfft(windows, 512)) ** 2 / 512
    tiny = np.finfo(float).eps
    energy = power.sum(1)
    bands = power @ _triangles().T
    whole: NDArray[np.float64] = np.asarray(dct(np.log(np.where(bands == 0, tiny, bands)), 2, axis=1, norm="ortho"))
    cepstra = whole[:, :13] * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
    cepstra[:, 0] = np.log(np.where(energy == 0, tiny, energy))
    return cepstra


def _triangles() -> NDArray[np.float64]:
    """26 x 257."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = np.floor(513 * 700 * (10 ** (np.linspace(0, top, 28) / 2595) - 1) / RATE)
    bins = np.arange(257)
    low, peak, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rise, fall = (bins - low) / np.maximum(peak - low, 1), (high - bins) / np.maximum(high - peak, 1)
    return np.where((bins >= low) & (bins < peak), rise, np.where((bins >= peak) & (bins < high), fall, 0.0))
