"""Captions of clips without one: from a vision-language model of a local folder, or from what the steps measured."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfcore.codecs.pretrained import compute_dtype, locate_weights, weights_digest
from mfcore.errors import UserInputError, check_range
from preprocessing.records import Clip

MEASURED = "measured"
PROMPT = "Describe the person, the setting and what happens in this video in one or two sentences."
_PROCESSOR = ("*token*.json", "vocab.json", "merges.txt", "*processor_config.json", "chat_template.*")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Source of missing captions. `caption_config` reads it from a folder."""

    weights: str = ""  # digest of configuration, tensors and processor; empty: captions from measured values
    folder: str = ""  # last location of the model, not part of the dataset
    prompt: str = PROMPT
    frames: int = 3  # pictures of a clip, spread evenly
    max_tokens: int = 96  # of a caption

    def __post_init__(self) -> None:
        check_range("caption.frames", self.frames, 1, 64)
        check_range("caption.max_tokens", self.max_tokens, 1, 4096)

    @property
    def id(self) -> str:
        """Return the source of a caption, as stored."""
        return f"vlm/{self.weights}" if self.weights else MEASURED


def caption_config(folder: str) -> CaptionConfig:
    """Return the configuration of the vision-language model in a folder. Raise UserInputError if it holds none."""
    model = Path(folder)
    processors = ("processor_config.json", "preprocessor_config.json")
    if not (model / "config.json").is_file() or not any((model / name).is_file() for name in processors):
        raise UserInputError(
            f"{folder} contains no vision-language model: name the folder with config.json, processor_config.json and "
            "safetensors"
        )
    files = {path for pattern in _PROCESSOR for path in model.glob(pattern)}
    return CaptionConfig(weights=weights_digest(model, sorted(files)), folder=folder)


def caption_folder(config: CaptionConfig) -> str:
    """Return the current folder of the model. Raise UserInputError if it is not found."""
    return locate_weights(config.weights, config.folder, lambda folder: caption_config(folder).weights, config.id)


class Captioner:
    """Vision-language model of transformers that takes pictures and a prompt in its chat format; greedy.

    Raises UserInputError if the folder holds no such model, or if transformers is not installed.
    """

    def __init__(self, config: CaptionConfig, device: str) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserInputError("--caption FOLDER needs transformers: pip install 'mutual-forcing[pretrained]'")
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder, dtype = caption_folder(config), compute_dtype(torch.device(device))
        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserInputError(f"{folder} is not a vision-language model: {str(error).splitlines()[0]}") from None
        if not getattr(self._processor, "chat_template", None):
            raise UserInputError(f"{folder} has no chat template: choose a model that follows instructions")
        self._processor.tokenizer.padding_side = "left"  # generated tokens follow the prompt
        self._config, self._model, self._dtype = config, model.to(device).eval(), dtype

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Clip]) -> list[str]:
        """Return a caption per clip, made in one batch."""
        inputs = self._processor.apply_chat_template(
            [self._message(clip) for clip in clips],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._model.device, dtype=self._dtype)
        made = self._model.generate(**inputs, do_sample=False, max_new_tokens=self._config.max_tokens)
        texts = self._processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _message(self, clip: Clip) -> list[dict[str, Any]]:
        from PIL import Image

        assert clip.frames is not None
        chosen = np.linspace(0, len(clip.frames) - 1, self._config.frames + 2)[1:-1].round().astype(int)
        pictures = [{"type": "image", "image": Image.fromarray(clip.frames[i])} for i in chosen]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": self._config.prompt}]}]


@cache
def load_captioner(config: CaptionConfig, device: str) -> Captioner:
    """Load the model, cached per process."""
    return Captioner(config, device)


def add_captions(clips: Sequence[Clip], config: CaptionConfig | None, device: str) -> list[Clip]:
    """Return the clips with captions for those without one; captions of the user are kept.

    Clips without frames have no caption of a model.
    """
    if config is None:
        return list(clips)
    missing = [
        i for i, clip in enumerate(clips) if not clip.caption_source and (clip.frames is not None or not config.weights)
    ]
    if not missing:
        return list(clips)
    chosen = [clips[i] for i in missing]
    texts = load_captioner(config, device)(chosen) if config.weights else [measured_caption(clip) for clip in chosen]
    made = dict(zip(missing, texts, strict=True))
    return [
        replace(clip, caption=made[i], caption_source=config.id) if made.get(i) else clip
        for i, clip in enumerate(clips)
    ]


def measured_caption(clip: Clip) -> str:
    """Return a sentence from what the filters of people measured of a clip; "" if nothing was measured."""
    face, speech = clip.face, clip.speech
    parts: list[str] = []
    if face is not None:
        view = "seen from the front" if face.frontal_share >= 0.9 else "who turns the head"
        parts.append(f"One person {view}, {_framing(face.height_share)}")
    elif speech is not None:
        parts.append("One person")
    if speech is not None and speech.seconds > 0:
        parts.append("speaks" if speech.seconds < 0.7 * (clip.span[1] - clip.span[0]) else "speaks without long pauses")
    return ", ".join(parts) + "." if parts else ""


def _framing(height_share: float) -> str:
    """Return the name of the shot for a face of this share of the height of the frame."""
    if height_share >= 0.5:
        return "in a close-up"
    return "head and shoulders" if height_share >= 0.25 else "at a distance"
