"""Speech recognizers (Whisper from a local folder, PocketSphinx) and word errors."""

import importlib.util
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from scipy.signal import resample_poly

from mfcore.errors import UserInputError

RATE = 16000  # input of the recognizers, samples per second
GREEDY = {"do_sample": False, "num_beams": 1}  # deterministic
Units = Sequence[Hashable]
Sound = NDArray[np.floating[Any]]


class SpeechRecognizer(Protocol):
    """Speech to text."""

    def __call__(self, sound: Sound, sample_rate: int) -> str:
        """Return the text of mono ``sound``; empty without speech."""
        ...


def edit_distance(hypothesis: Units, reference: Units) -> int:
    """Return the Levenshtein distance: the least number of insertions, deletions and substitutions."""
    return Levenshtein.distance(hypothesis, reference)


def normalize_words(text: str) -> list[str]:
    """Return the words of ``text`` as Whisper's English normalizer writes them, which word error rates compare.

    Raises ValueError if transformers is not installed.
    """
    return str(_english_normalizer()(text)).split()


@cache
def _english_normalizer() -> Any:
    """Return the normalizer without the table of British spellings, which only published checkpoints contain."""
    if importlib.util.find_spec("transformers") is None:
        raise UserInputError("word error rates need transformers: pip install 'mutual-forcing[speech]'")
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def resample(sound: Sound, sample_rate: int, rate: int = RATE) -> NDArray[np.float32]:
    """Resample with a band limit; returns float32."""
    if sample_rate == rate or not len(sound):
        return sound.astype(np.float32)
    return np.asarray(resample_poly(sound.astype(np.float64), rate, sample_rate), np.float32)


class Whisper:
    """Whisper in the layout of transformers, from a local folder; greedy, in pieces of 30 s.

    Raises ValueError if the folder contains no Whisper, or transformers is not installed.
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserInputError("Whisper needs transformers: pip install 'mutual-forcing[pretrained]'")
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        try:
            self._processor: Any = WhisperProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise UserInputError(f"{folder} is not a Whisper model: {str(error).splitlines()[0]}") from None
        self._model, self._device = model.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, sound: Sound, sample_rate: int) -> str:
        """Return the text of mono ``sound``."""
        wave, extractor = resample(sound, sample_rate), self._processor.feature_extractor
        pieces = [wave[i : i + extractor.n_samples] for i in range(0, len(wave), extractor.n_samples)]
        return " ".join(self._transcribe(piece) for piece in pieces).strip()

    @torch.inference_mode()
    def words(self, sound: Sound, sample_rate: int) -> list[tuple[str, float, float]]:
        """Return words with start and end in seconds.

        The times come from the alignment heads of the model. Without alignment heads, the time of a phrase is divided
        over its words by their number of letters.
        """
        from transformers import AutomaticSpeechRecognitionPipeline

        wave, seconds = resample(sound, sample_rate), len(sound) / sample_rate
        has_alignment = getattr(self._model.generation_config, "alignment_heads", None) is not None
        recognizer: Any = AutomaticSpeechRecognitionPipeline(
            model=self._model,
            tokenizer=self._processor.tokenizer,
            feature_extractor=self._processor.feature_extractor,
            device=self._model.device,
        )
        result = recognizer(wave, return_timestamps="word" if has_alignment else True, generate_kwargs=GREEDY)
        words: list[tuple[str, float, float]] = []
        for phrase in result["chunks"]:
            words += _split_phrase(phrase, seconds)
        return words

    def _transcribe(self, wave: NDArray[np.float32]) -> str:
        features = self._processor(wave, sampling_rate=RATE, return_tensors="pt").input_features
        tokens = self._model.generate(features.to(self._device), **GREEDY)
        return str(self._processor.batch_decode(tokens, skip_special_tokens=True)[0])


def _split_phrase(phrase: Mapping[str, Any], seconds: float) -> list[tuple[str, float, float]]:
    """Return the words of a phrase with times; a phrase without end extends to the end of the audio."""
    start, end = ((seconds if time is None else min(float(time), seconds)) for time in phrase["timestamp"])
    names = str(phrase["text"]).split()
    letters, time = sum(len(name) for name in names), start
    words: list[tuple[str, float, float]] = []
    for name in names:
        until = min(end, time + max(0.0, end - start) * len(name) / letters)
        words.append((name, time, max(time, until)))
        time = until
    return words


class PocketSphinx:
    """English recognizer with the model in its package. Raises ValueError if it is not installed."""

    def __init__(self) -> None:
        for package in ("pocketsphinx", "transformers"):  # transformers normalizes the words
            if importlib.util.find_spec(package) is None:
                raise UserInputError(f"PocketSphinx needs {package}: pip install 'mutual-forcing[speech]'")
        from pocketsphinx import Decoder  # pyright: ignore

        self._decoder: Any = Decoder(samprate=RATE, loglevel="FATAL")

    def __call__(self, sound: Sound, sample_rate: int) -> str:
        """Return the text of mono ``sound``."""
        wave = np.clip(resample(sound, sample_rate) * 32767, -32768, 32767).astype(np.int16)
        if not len(wave):
            return ""
        self._decoder.start_utt()
        self._decoder.process_raw(wave.tobytes(), no_search=False, full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return str(hypothesis.hypstr) if hypothesis is not None else ""
