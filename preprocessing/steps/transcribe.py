"""Transcribe sources without a transcript with Whisper from a local folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mfcore.codecs.pretrained import locate_weights, model_folder, weights_digest
from mfcore.metrics.speech import Whisper
from preprocessing.records import Clip, Word

_TOKENIZER = ("*token*.json", "vocab.json", "merges.txt", "generation_config.json", "preprocessor_config.json")


@dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Weights of Whisper; `whisper_config` reads it from a folder."""

    weights: str  # digest of configuration, tensors and tokenizer
    folder: str = ""  # last location, not part of the dataset

    @property
    def id(self) -> str:
        """Return the id of the model, stored as the source of a transcript."""
        return f"whisper/{self.weights}"


def whisper_config(folder: str) -> WhisperConfig:
    """Return the configuration of the Whisper model in `folder` or its ``whisper/``."""
    model = model_folder(folder, "whisper", ("whisper",), "Whisper")
    files = {path for pattern in _TOKENIZER for path in model.glob(pattern)}
    return WhisperConfig(weights=weights_digest(model, sorted(files)), folder=folder)


def whisper_folder(config: WhisperConfig) -> Path:
    """Return the current folder of the weights. Raise ValueError if they are not found."""
    folder = locate_weights(
        config.weights, config.folder, lambda candidate: whisper_config(candidate).weights, config.id
    )
    return model_folder(folder, "whisper", ("whisper",), "Whisper")


@cache
def load_whisper(config: WhisperConfig, device: str) -> Whisper:
    """Load the model, cached per process. Raise ValueError if the weights are missing."""
    return Whisper(str(whisper_folder(config)), device)


def transcribe(clip: Clip, config: WhisperConfig | None, device: str, sample_rate: int) -> Clip:
    """Transcribe a clip if its source has no transcript; an empty one counts."""
    if config is None or clip.waveform is None or clip.source.transcript is not None:
        return clip
    words = load_whisper(config, device).words(clip.waveform, sample_rate)
    return replace(clip, transcript=_sorted_words(words), transcript_source=config.id)


def _sorted_words(words: Sequence[tuple[str, float, float]]) -> tuple[Word, ...]:
    return tuple(
        Word(word=word, start=round(start, 6), end=round(end, 6))
        for word, start, end in sorted(words, key=lambda entry: entry[1:])
    )
