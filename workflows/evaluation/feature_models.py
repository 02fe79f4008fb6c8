"""Trained networks that measure, from files the user has: nothing is fetched, and each is optional."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from mfcore.codecs.pretrained import compute_device
from mfcore.metrics.feature_extractors import CLAP, AudioClassifier, AudioEncoder, FaceEncoder, VideoEncoder, VideoMAE
from mfcore.metrics.lip_sync_error import LipEmbeddingModel
from mfcore.metrics.speech import PocketSphinx, SpeechRecognizer, Whisper
from mfcore.metrics.syncnet import SyncNetSync, load_syncnet

MODEL_KINDS: Mapping[str, str] = {
    "syncnet": "a file of SyncNet's weights, syncnet_v2.model or safetensors",
    "whisper": "a folder of Whisper in transformers' layout",
    "pocketsphinx": "en, after pip install pocketsphinx",
    "videomae": "a folder of VideoMAE in transformers' layout",
    "clap": "a folder of CLAP in transformers' layout",
    "faces": "a folder of an image network in transformers' layout, trained to tell faces apart",
    "sounds": "a folder of a sound classifier (AST) in transformers' layout",
}


def requirement_text(kind: str) -> str:
    """How a metric says what it lacks."""
    return f"--weights {kind}=... ({MODEL_KINDS[kind]})"


@dataclass(frozen=True, kw_only=True)
class FeatureModels:
    """What is at hand. Networks are loaded when first used; a copy sent to another process loads its own."""

    places: Mapping[str, str] = field(default_factory=dict[str, str])  # kind -> folder or file

    @property
    def id(self) -> str:
        """Scores through other instruments are other scores."""
        return ",".join(f"{kind}={place}" for kind, place in sorted(self.places.items()))

    @cached_property
    def speech_recognizers(self) -> dict[str, SpeechRecognizer]:
        made: dict[str, SpeechRecognizer] = {}
        if "whisper" in self.places:
            made["whisper"] = Whisper(self.places["whisper"], _device())
        if "pocketsphinx" in self.places:
            made["pocketsphinx"] = PocketSphinx()
        return made

    @cached_property
    def video_encoders(self) -> dict[str, VideoEncoder]:
        return _made(self.places, {"videomae": VideoMAE, "faces": FaceEncoder})

    @cached_property
    def audio_encoders(self) -> dict[str, AudioEncoder]:
        return _made(self.places, {"clap": CLAP, "sounds": AudioClassifier})

    @cached_property
    def lip_sync_model(self) -> LipEmbeddingModel | None:
        place = self.places.get("syncnet")
        return None if place is None else SyncNetSync(load_syncnet(place)).vectors

    def load_all(self) -> None:
        """Load everything once. ValueError where a place holds something else."""
        _ = self.speech_recognizers, self.video_encoders, self.audio_encoders, self.lip_sync_model

    def __getstate__(self) -> dict[str, Mapping[str, str]]:
        return {"places": self.places}

    def __setstate__(self, state: Mapping[str, Mapping[str, str]]) -> None:
        object.__setattr__(self, "places", state["places"])


T = TypeVar("T")


def _made(places: Mapping[str, str], makers: Mapping[str, Callable[[str, str], T]]) -> dict[str, T]:
    return {kind: make(places[kind], _device()) for kind, make in makers.items() if kind in places}


def _device() -> str:
    return str(compute_device(None))


def parse_feature_models(texts: Sequence[str]) -> FeatureModels:
    """From ``kind=place`` each. ValueError for an unknown kind, or a place that does not exist."""
    places: dict[str, str] = {}
    for text in texts:
        kind, _, place = text.partition("=")
        if kind not in MODEL_KINDS or not place:
            known = "; ".join(f"{k}={what}" for k, what in MODEL_KINDS.items())
            raise ValueError(f"--weights {text!r}: write KIND=PLACE with one of {known}")
        if kind == "pocketsphinx":
            if place != "en" or importlib.util.find_spec("pocketsphinx") is None:
                raise ValueError(f"--weights {text!r}: the embedded recogniser is {MODEL_KINDS[kind]}")
        elif not Path(place).exists():
            raise ValueError(f"--weights {text!r}: {place} does not exist; give {MODEL_KINDS[kind]}")
        places[kind] = place
    return FeatureModels(places=places)
