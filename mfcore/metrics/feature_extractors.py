"""Features of published networks, from local folders in the layout of transformers; nothing is downloaded.

Each extractor returns one vector per segment of ``SEGMENT`` seconds, so every time window has its rows. Distances of
features are comparable only for the same network and protocol.

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

from mfcore.errors import UserInputError
from mfcore.metrics.speech import resample

SEGMENT = 2.0  # seconds
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_BATCH = 8  # segments per forward pass

Features = NDArray[np.floating[Any]]
Frames = NDArray[np.uint8]
Sound = NDArray[np.floating[Any]]


class VideoEncoder(Protocol):
    """Features of video."""

    def __call__(self, frames: Frames, fps: float) -> Features:
        """Return ``(k, d)`` of frames ``(f, H, W, 3)``."""
        ...


class AudioEncoder(Protocol):
    """Features of audio."""

    def __call__(self, sound: Sound, sample_rate: int) -> Features:
        """Return ``(k, d)`` of mono audio."""
        ...


class VideoMAE:
    """Mean of the last VideoMAE tokens over 16 frames (the input length of the network), evenly spread per segment."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self._model = _load("VideoMAEModel", folder).to(device)
        self._norm, self._device = _pixel_statistics(folder), device

    @torch.inference_mode()
    def __call__(self, frames: Frames, fps: float) -> Features:
        """Return ``(k, d)`` of frames ``(f, H, W, 3)``."""
        config = self._model.config
        segments = [part[_spread_indices(len(part), config.num_frames)] for part in _segments(frames, fps)]
        rows: list[Tensor] = []
        for at in range(0, len(segments), _BATCH):
            pixels = torch.stack([_pixels(s, config.image_size, self._norm) for s in segments[at : at + _BATCH]])
            rows.append(self._model(pixels.to(self._device)).last_hidden_state.mean(1).float().cpu())
        return torch.cat(rows).numpy() if rows else np.zeros((0, config.hidden_size))


class FaceEncoder:
    """Pooled vector of an image network (a face recognizer in the layout of transformers), one per segment.

    The input is the central square of the middle frame: use clips cropped to one face, as for LSE.
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self._model = _load("AutoModel", folder).to(device)
        self._norm, self._device = _pixel_statistics(folder), device
        if not isinstance(getattr(self._model.config, "image_size", None), int):
            raise UserInputError(f"{folder} is not an image network: config.json has no image_size")

    @torch.inference_mode()
    def __call__(self, frames: Frames, fps: float) -> Features:
        """Return the vector of the first frame, then one per segment."""
        middle_frames = [part[len(part) // 2] for part in _segments(frames, fps)]
        pixels = _pixels(np.stack([frames[0], *middle_frames]), self._model.config.image_size, self._norm)
        out = self._model(pixels.to(self._device))
        pooled = out.pooler_output if getattr(out, "pooler_output", None) is not None else out.last_hidden_state[:, 0]
        return pooled.flatten(1).float().cpu().numpy()


class CLAP:
    """CLAP vector of each segment, of norm 1."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self._model = _load("ClapModel", folder).to(device)
        self._segments = AudioSegmenter("ClapFeatureExtractor", folder, device)

    @torch.inference_mode()
    def __call__(self, sound: Sound, sample_rate: int) -> Features:
        """Return ``(k, d)`` of mono audio."""
        inputs = self._segments(sound, sample_rate)
        if inputs is None:
            return np.zeros((0, self._model.config.projection_dim))
        out = self._model.get_audio_features(**inputs)
        vectors = out if isinstance(out, Tensor) else out.pooler_output  # transformers before 5 returns the tensor
        return vectors.float().cpu().numpy()


class AudioClassifier:
    """Class probabilities of an audio classifier such as AST, for the divergence of sound classes."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self._model = _load("AutoModelForAudioClassification", folder).to(device)
        self._segments = AudioSegmenter("AutoFeatureExtractor", folder, device)

    @torch.inference_mode()
    def __call__(self, sound: Sound, sample_rate: int) -> Features:
        """Return the probabilities ``(k, c)`` of mono audio."""
        inputs = self._segments(sound, sample_rate)
        if inputs is None:
            return np.zeros((0, self._model.config.num_labels))
        return self._model(**inputs).logits.softmax(-1).float().cpu().numpy()


class AudioSegmenter:
    """Segments of audio as inputs of a published network."""

    def __init__(self, extractor: str, folder: str, device: str) -> None:
        self._extractor, self._device = _load(extractor, folder), device

    def __call__(self, sound: Sound, sample_rate: int) -> Any | None:
        """Return the keyword arguments of the network; None for empty audio."""
        rate = self._extractor.sampling_rate
        parts = _segments(resample(sound, sample_rate, rate), rate)
        return self._extractor(parts, sampling_rate=rate, return_tensors="pt").to(self._device) if parts else None


def _load(name: str, folder: str) -> Any:
    """Load a transformers class from a local folder. Raises ValueError if the folder has no such model."""
    if importlib.util.find_spec("transformers") is None:
        raise UserInputError(f"{name} needs transformers: pip install 'mutual-forcing[pretrained]'")
    import transformers

    if not Path(folder).is_dir():
        raise UserInputError(f"{folder} is not a folder: name the folder with config.json and weights of {name}")
    try:
        loaded = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserInputError(f"cannot load {name} from {folder}: {str(error).splitlines()[0]}") from None
    return loaded.eval().requires_grad_(False) if isinstance(loaded, torch.nn.Module) else loaded


def _pixel_statistics(folder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of pixels (0 to 1) in training; those of ImageNet if not given."""
    file = Path(folder) / "preprocessor_config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    return tuple(config.get("image_mean", _IMAGENET[0])), tuple(config.get("image_std", _IMAGENET[1]))


def _segments(values: NDArray[Any], rate: float) -> list[NDArray[Any]]:
    """Split into segments; at least one, and a remainder of half a segment or more counts as one."""
    size = SEGMENT * rate
    count = max(1, round(len(values) / size)) if len(values) else 0
    edges = [round(i * size) for i in range(count)] + [len(values)]
    return [values[a : min(b, a + round(size))] for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _spread_indices(count: int, wanted: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, wanted).round().astype(np.int64)


def _pixels(frames: Frames, size: int, norm: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Return the central square, scaled and normalized, ``(f, 3, size, size)``."""
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
