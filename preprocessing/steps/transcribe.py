"""Transcripts by Whisper for sources that bring none, from a local folder. Without one they stay missing."""

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
    """Which weights. :func:`read_whisper` fills it from a folder."""

    weights: str  # digest of configuration, tensors and tokenizer
    folder: str = ""  # where they were last seen; changes nothing

    @property
    def id(self) -> str:
        """What a clip that it heard says of the source of its transcript."""
        return f"whisper/{self.weights}"


def whisper_config(folder: str) -> WhisperConfig:
    """The configuration of the Whisper in ``folder`` (or its ``whisper/``). ValueError when there is none."""
    place = model_folder(folder, "whisper", ("whisper",), "Whisper")
    files = {path for pattern in _TOKENIZER for path in place.glob(pattern)}
    return WhisperConfig(weights=weights_digest(place, sorted(files)), folder=folder)


def whisper_folder(config: WhisperConfig) -> Path:
    """Where its weights are now. ValueError says how to name the place."""
    folder = locate_weights(config.weights, config.folder, lambda place: whisper_config(place).weights, config.id)
    return model_folder(folder, "whisper", ("whisper",), "Whisper")


@cache
def load_whisper(config: WhisperConfig, device: str) -> Whisper:
    """Loaded, and kept for all clips of a process. ValueError when the weights are gone."""
    return Whisper(str(whisper_folder(config)), device)


def transcribe(clip: Clip, config: WhisperConfig | None, device: str, sample_rate: int) -> Clip:
    """The clip with the words that are heard in it, where nobody said which are spoken. (A transcript without words is
    one: then nothing is.)"""
    if config is None or clip.waveform is None or clip.source.transcript is not None:
        return clip
    heard = load_whisper(config, device).words(clip.waveform, sample_rate)
    return replace(clip, transcript=_in_order(heard), transcript_source=config.id)


def _in_order(heard: Sequence[tuple[str, float, float]]) -> tuple[Word, ...]:
    return tuple(
        Word(word=word, start=round(start, 6), end=round(end, 6))
        for word, start, end in sorted(heard, key=lambda one: one[1:])
    )
