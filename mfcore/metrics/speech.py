"""Errors of recognised speech, whoever recognised it; and recognisers: Whisper from a local folder, PocketSphinx."""

import importlib.util
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from scipy.signal import resample_poly

RATE = 16000  # samples a second that recognisers hear
GREEDY = {"do_sample": False, "num_beams": 1}  # the same every time
Units = Sequence[Hashable]
Sound = NDArray[np.floating[Any]]


class SpeechRecognizer(Protocol):
    """What is said in mono ``sound``, as plain text; empty where nothing is heard."""

    def __call__(self, sound: Sound, sample_rate: int) -> str: ...


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
        raise ValueError("word error rates need transformers: pip install 'mutual-forcing[speech]'")
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def resample(sound: Sound, sample_rate: int, rate: int = RATE) -> NDArray[np.float32]:
    """Resampled, band-limited."""
    if sample_rate == rate or not len(sound):
        return sound.astype(np.float32)
    return np.asarray(resample_poly(sound.astype(np.float64), rate, sample_rate), np.float32)


class Whisper:
    """Whisper in the layout of transformers, from a local folder; greedy, in pieces of 30 s.

    ValueError when the folder does not hold it, or transformers is not installed.
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        if importlib.util.find_spec("transformers") is None:
            raise ValueError("Whisper needs transformers: pip install 'mutual-forcing[pretrained]'")
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        try:
            self._processor: Any = WhisperProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} holds no Whisper: {str(error).splitlines()[0]}") from None
        self._model, self._device = model.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, sound: Sound, sample_rate: int) -> str:
        wave, extractor = resample(sound, sample_rate), self._processor.feature_extractor
        pieces = [wave[i : i + extractor.n_samples] for i in range(0, len(wave), extractor.n_samples)]
        return " ".join(self._piece(piece) for piece in pieces).strip()

    @torch.inference_mode()
    def words(self, sound: Sound, sample_rate: int) -> list[tuple[str, float, float]]:
        """Words with start and end in seconds, inside the sound: as the attention of the heads that the model names for
        this says; of a model that names none a phrase's time is shared out over its words by their letters."""
        from transformers import AutomaticSpeechRecognitionPipeline

        wave, seconds = resample(sound, sample_rate), len(sound) / sample_rate
        exact = getattr(self._model.generation_config, "alignment_heads", None) is not None
        listen: Any = AutomaticSpeechRecognitionPipeline(
            model=self._model,
            tokenizer=self._processor.tokenizer,
            feature_extractor=self._processor.feature_extractor,
            device=self._model.device,
        )
        found = listen(wave, return_timestamps="word" if exact else True, generate_kwargs=GREEDY)
        return [word for chunk in found["chunks"] for word in _timed(chunk, seconds)]

    def _piece(self, wave: NDArray[np.float32]) -> str:
        features = self._processor(wave, sampling_rate=RATE, return_tensors="pt").input_features
        tokens = self._model.generate(features.to(self._device), **GREEDY)
        return str(self._processor.batch_decode(tokens, skip_special_tokens=True)[0])


def _timed(chunk: Mapping[str, Any], seconds: float) -> list[tuple[str, float, float]]:
    """The words of a phrase. It has no end where the sound ends in it."""
    start, end = ((seconds if at is None else min(float(at), seconds)) for at in chunk["timestamp"])
    names = str(chunk["text"]).split()
    letters, at = sum(len(name) for name in names), start
    words: list[tuple[str, float, float]] = []
    for name in names:
        until = min(end, at + max(0.0, end - start) * len(name) / letters)
        words.append((name, at, max(at, until)))
        at = until
    return words


class PocketSphinx:
    """The embedded recogniser of English: its package ships the model, nothing is fetched. ValueError without it."""

    def __init__(self) -> None:
        for package in ("pocketsphinx", "transformers"):  # the second one normalizes the words
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"PocketSphinx needs {package}: pip install 'mutual-forcing[speech]'")
        from pocketsphinx import Decoder  # pyright: ignore

        self._decoder: Any = Decoder(samprate=RATE, loglevel="FATAL")

    def __call__(self, sound: Sound, sample_rate: int) -> str:
        wave = np.clip(resample(sound, sample_rate) * 32767, -32768, 32767).astype(np.int16)
        if not len(wave):
            return ""
        self._decoder.start_utt()
        self._decoder.process_raw(wave.tobytes(), no_search=False, full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return str(found.hypstr) if found is not None else ""
