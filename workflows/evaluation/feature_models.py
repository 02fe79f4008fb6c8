"""Pretrained networks for metrics (``--weights``). All are optional and loaded from local files."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from mfcore.codecs.pretrained import compute_device
from mfcore.errors import UserInputError
from mfcore.metrics.feature_extractors import CLAP, AudioClassifier, AudioEncoder, FaceEncoder, VideoEncoder, VideoMAE
from mfcore.metrics.lip_sync_error import LipEmbeddingModel
from mfcore.metrics.speech import PocketSphinx, SpeechRecognizer, Whisper
from mfcore.metrics.syncnet import SyncNetSync, load_syncnet
from preprocessing.people.packages import check_packages
from workflows.evaluation.people_features import PeopleModels

MODEL_KINDS: Mapping[str, str] = {
    "syncnet": "a SyncNet weight file, syncnet_v2.model or safetensors",
    "whisper": "a folder of Whisper in transformers' layout",
    "pocketsphinx": "en, with the extra: pip install -e .[speech]",
    "people": "packages, with the extra: make people",
    "videomae": "a folder of VideoMAE in transformers' layout",
    "clap": "a folder of CLAP in transformers' layout",
    "faces": "a folder of an image network in transformers' layout, trained for face recognition",
    "sounds": "a folder of an audio classifier (AST) in transformers' layout",
}

T = TypeVar("T")


def requirement_text(kind: str) -> str:
    """Return the message for a model that a metric requires."""
    return f"--weights {kind}=... ({MODEL_KINDS[kind]})"


class FeatureModels:
    """Pretrained networks used by metrics, loaded at first use. A pickled copy contains paths only."""

    def __init__(self, paths: Mapping[str, str] | None = None) -> None:
        """Take the file or folder of each kind of model."""
        self.paths = dict(paths or {})

    @property
    def id(self) -> str:
        """Return a string that identifies the models; scores of other models are not comparable."""
        return ",".join(f"{kind}={path}" for kind, path in sorted(self.paths.items()))

    @cached_property
    def speech_recognizers(self) -> dict[str, SpeechRecognizer]:
        """Return the speech recognizers by kind."""
        recognizers: dict[str, SpeechRecognizer] = {}
        if "whisper" in self.paths:
            recognizers["whisper"] = Whisper(self.paths["whisper"], _device())
        if "pocketsphinx" in self.paths:
            recognizers["pocketsphinx"] = PocketSphinx()
        return recognizers

    @cached_property
    def video_encoders(self) -> dict[str, VideoEncoder]:
        """Return the networks for frames by kind."""
        return self._load({"videomae": VideoMAE, "faces": FaceEncoder})

    @cached_property
    def audio_encoders(self) -> dict[str, AudioEncoder]:
        """Return the networks for audio by kind."""
        return self._load({"clap": CLAP, "sounds": AudioClassifier})

    @cached_property
    def lip_sync_model(self) -> LipEmbeddingModel | None:
        """Return the embeddings of SyncNet; None without its weights."""
        path = self.paths.get("syncnet")
        return None if path is None else SyncNetSync(load_syncnet(path)).vectors

    @cached_property
    def people_models(self) -> PeopleModels | None:
        """Return the face and speech models of the extra ``people``; None unless chosen."""
        return PeopleModels() if "people" in self.paths else None

    def load_all(self) -> None:
        """Load all models. Raises ValueError for a path with other content."""
        _ = self.speech_recognizers, self.video_encoders, self.audio_encoders, self.lip_sync_model, self.people_models

    def _load(self, loaders: Mapping[str, Callable[[str, str], T]]) -> dict[str, T]:
        return {kind: load(self.paths[kind], _device()) for kind, load in loaders.items() if kind in self.paths}

    def __getstate__(self) -> dict[str, Mapping[str, str]]:
        """Return the state to pickle, without loaded networks."""
        return {"paths": self.paths}


def _device() -> str:
    return str(compute_device(None))


def parse_feature_models(texts: Sequence[str]) -> FeatureModels:
    """Parse ``kind=path`` options. Raises ValueError for an unknown kind or a missing path."""
    paths: dict[str, str] = {}
    for text in texts:
        kind, _, path = text.partition("=")
        if kind not in MODEL_KINDS or not path:
            known = "; ".join(f"{name}={content}" for name, content in MODEL_KINDS.items())
            raise UserInputError(f"--weights {text!r}: not KIND=PLACE. Use one of {known}.")
        if kind == "pocketsphinx":
            if path != "en" or importlib.util.find_spec("pocketsphinx") is None:
                raise UserInputError(f"--weights {text!r}: not available. Use {kind}={MODEL_KINDS[kind]}.")
        elif kind == "people":
            if path != "packages":
                raise UserInputError(f"--weights {text!r}: not available. Use {kind}={MODEL_KINDS[kind]}.")
            check_packages()
        elif not Path(path).exists():
            raise UserInputError(f"--weights {text!r}: {path} does not exist. Give {MODEL_KINDS[kind]}.")
        paths[kind] = path
    return FeatureModels(paths)
