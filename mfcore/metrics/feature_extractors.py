"""Features of published networks, from local folders in the layout of transformers; nothing is fetched.

Each makes one vector per segment of ``SEGMENT`` seconds, so that a window of time has rows of its own. Distances over
them compare only with distances over the same network and protocol.

Letters: f frames, k segments, d features, c classes.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from mfcore.metrics.speech import resample

SEGMENT = 2.0  # seconds
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_BATCH = 8  # segments at once

Features = NDArray[np.floating[Any]]
Frames = NDArray[np.uint8]
Sound = NDArray[np.floating[Any]]


class VideoEncoder(Protocol):
    """``(k, d)`` of frames ``(f, H, W, 3)``."""

    def __call__(self, frames: Frames, fps: float) -> Features: ...


class AudioEncoder(Protocol):
    """``(k, d)`` of mono sound."""

    def __call__(self, sound: Sound, sample_rate: int) -> Features: ...


class VideoMAE:
    """Mean of VideoMAE's last tokens over 16 frames (as many as the network takes) spread evenly over each segment."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self._model = _load("VideoMAEModel", folder).to(device)
        self._norm, self._device = _normalisation(folder), device

    @torch.inference_mode()
    def __call__(self, frames: Frames, fps: float) -> Features:
        config = self._model.config
        segments = [part[_spread(len(part), config.num_frames)] for part in _segments(frames, fps)]
        rows: list[Tensor] = []
        for at in range(0, len(segments), _BATCH):
            pixels = torch.stack([_pixels(s, config.image_size, self._norm) for s in segments[at : at + _BATCH]])
            rows.append(self._model(pixels.to(self._device)).last_hidden_state.mean(1).float().cpu())
        return torch.cat(rows).numpy() if rows else np.zeros((0, config.hidden_size))


class FaceEncoder:
    """Pooled vector of an image network (a face recogniser in transformers' layout) of the middle frame of a segment.

    It sees the square in the middle of the picture: give clips cut to one face, as for LSE.
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self._model = _load("AutoModel", folder).to(device)
        self._norm, self._device = _normalisation(folder), device
        if not isinstance(getattr(self._model.config, "image_size", None), int):
            raise ValueError(f"{folder} is no image network: its config.json has no image_size")

    @torch.inference_mode()
    def __call__(self, frames: Frames, fps: float) -> Features:
        """The first frame's vector, then one per segment."""
        middles = [part[len(part) // 2] for part in _segments(frames, fps)]
        pixels = _pixels(np.stack([frames[0], *middles]), self._model.config.image_size, self._norm)
        out = self._model(pixels.to(self._device))
        pooled = out.pooler_output if getattr(out, "pooler_output", None) is not None else out.last_hidden_state[:, 0]
        return pooled.flatten(1).float().cpu().numpy()


class CLAP:
    """CLAP's vector of each segment, of length 1."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self._model = _load("ClapModel", folder).to(device)
        self._segments = AudioSegmenter("ClapFeatureExtractor", folder, device)

    @torch.inference_mode()
    def __call__(self, sound: Sound, sample_rate: int) -> Features:
        inputs = self._segments(sound, sample_rate)
        if inputs is None:
            return np.zeros((0, self._model.config.projection_dim))
        out = self._model.get_audio_features(**inputs)
        found = out if isinstance(out, Tensor) else out.pooler_output  # transformers before 5 gives the tensor
        return found.float().cpu().numpy()


class AudioClassifier:
    """Probabilities ``(k, c)`` of a sound classifier such as AST, for the divergence of what is heard."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self._model = _load("AutoModelForAudioClassification", folder).to(device)
        self._segments = AudioSegmenter("AutoFeatureExtractor", folder, device)

    @torch.inference_mode()
    def __call__(self, sound: Sound, sample_rate: int) -> Features:
        inputs = self._segments(sound, sample_rate)
        if inputs is None:
            return np.zeros((0, self._model.config.num_labels))
        return self._model(**inputs).logits.softmax(-1).float().cpu().numpy()


class AudioSegmenter:
    """Segments of a sound as a published network takes them."""

    def __init__(self, extractor: str, folder: str, device: str) -> None:
        self._prepare, self._device = _load(extractor, folder), device

    def __call__(self, sound: Sound, sample_rate: int) -> Any | None:
        """The network's keyword arguments; None where there is no sound."""
        rate = self._prepare.sampling_rate
        parts = _segments(resample(sound, sample_rate, rate), rate)
        return self._prepare(parts, sampling_rate=rate, return_tensors="pt").to(self._device) if parts else None


def _load(name: str, folder: str) -> Any:
    """A class of transformers from a local folder. ValueError where it is not there, or holds something else."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{name} needs transformers: pip install 'mutual-forcing[pretrained]'")
    import transformers

    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder: name one that holds config.json and weights for {name}")
    try:
        made = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} holds no {name}: {str(error).splitlines()[0]}") from None
    return made.eval().requires_grad_(False) if isinstance(made, torch.nn.Module) else made


def _normalisation(folder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and spread of pixels in 0 .. 1 that the network was trained with; ImageNet's where nothing says."""
    file = Path(folder) / "preprocessor_config.json"
    said = json.loads(file.read_text()) if file.exists() else {}
    return tuple(said.get("image_mean", _IMAGENET[0])), tuple(said.get("image_std", _IMAGENET[1]))


def _segments(values: NDArray[Any], rate: float) -> list[NDArray[Any]]:
    """Whole segments; what is shorter than one is one segment; a rest of at least half a segment counts as one."""
    size = SEGMENT * rate
    count = max(1, round(len(values) / size)) if len(values) else 0
    edges = [round(i * size) for i in range(count)] + [len(values)]
    return [values[a : min(b, a + round(size))] for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _spread(count: int, wanted: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, wanted).round().astype(np.int64)


def _pixels(frames: Frames, size: int, norm: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """``(f, 3, size, size)``: the square in the middle, scaled and normalised."""
    height, width = frames.shape[1:3]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = torch.from_numpy(np.ascontiguousarray(frames[:, top : top + edge, left : left + edge]))
    scaled = interpolate(
        square.permute(0, 3, 1, 2).float() / 255,
        size=(size, size),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in norm)
    return (scaled - mean) / std
