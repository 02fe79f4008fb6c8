"""Evaluation set of a sweep: prompts from held-out clips, and reference clips for distances."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

import torch

from mfcore.codecs.base import Codec
from mfcore.errors import UserInputError, check_range
from mfcore.types import VIDEO
from preprocessing.dataset.reader import DatasetMetadata, open_dataset
from preprocessing.dataset.schema import ClipTensors
from preprocessing.records import Word
from preprocessing.toyworld.voice import VOCABULARY
from preprocessing.toyworld.world import ToyConfig, world_name
from workflows.checkpoints.model_card import ExportMetadata

REFERENCE_CLIPS = 32  # real clips for distances, none of them a prompt


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A held-out clip with the length of its sample."""

    clip: ClipTensors  # with a repeated transcript if the sample is longer than the clip
    chunks: int  # of the sample
    number: int  # seed of the noise


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Prompts and reference clips of a sweep."""

    prompts: tuple[Prompt, ...]
    reference: tuple[ClipTensors, ...]  # real clips for distances; the clips of the prompts if there are no others
    meta: DatasetMetadata
    toy: ToyConfig | None  # of a toy world dataset, else None
    repeated: bool  # samples are longer than their clips, so transcripts repeat
    own_reference: bool = False  # `reference` are the clips of the prompts

    @property
    def codecs(self) -> dict[str, Codec]:
        """Return the codecs of the dataset by modality."""
        return {m: self.meta.codec(m) for m in self.meta.codecs}

    @property
    def real_clips(self) -> tuple[ClipTensors, ...]:
        """Return the clips of the prompts, then the reference clips."""
        return (*(p.clip for p in self.prompts), *self.reference)

    def digest(self) -> str:
        """Return a hash of the dataset, the prompts and the reference clips."""
        parts = [self.meta.fingerprint, *(f"{p.clip.id}/{p.clip.source_uri}/{p.chunks}" for p in self.prompts)]
        parts += [f"{c.id}/{c.source_uri}" for c in self.reference]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def select_evaluation_set(
    uri: str, *, clips: int, seconds: float | None, fraction: float | None, reference: int = REFERENCE_CLIPS
) -> EvaluationSet:
    """Return the first ``clips`` held-out clips of a dataset as prompts, and other clips as reference.

    Args:
        uri: Dataset.
        clips: Largest number of prompts.
        seconds: Length of the samples; None: the length of each clip.
        fraction: Share of the sources that training did not use; None: the whole dataset.
        reference: Largest number of reference clips. Without other clips, the prompts are the reference.

    Raises:
        ValueError: The dataset has no held-out clip, or ``seconds`` is not positive.
    """
    check_range("--seconds", seconds, 0, 86_400, above=True)
    dataset = open_dataset(uri)
    training, held_out = (None, dataset) if fraction is None else dataset.split(fraction)
    usable = [i for i, length in enumerate(held_out.lengths) if length > 0]
    if not usable:
        raise UserInputError(f"{uri} has no held-out clip of a whole chunk. Preprocess more or longer clips.")
    chosen = [held_out.clip(i) for i in usable[:clips]]
    wanted = None if seconds is None else ceil(Fraction(seconds).limit_denominator(1000) / dataset.meta.chunk_seconds)
    others = [held_out.clip(i) for i in usable[clips : clips + reference]]
    if training is not None:
        others += [training.clip(i) for i in range(min(len(training), reference - len(others)))]
    others = [clip for clip in others if clip.chunks > 0]
    return EvaluationSet(
        prompts=tuple(_prompt(clip, wanted or clip.chunks, i, dataset.meta) for i, clip in enumerate(chosen)),
        reference=tuple(others or chosen),
        meta=dataset.meta,
        toy=_toy_config(chosen + others, dataset.meta),
        repeated=wanted is not None and any(wanted > clip.chunks for clip in chosen),
        own_reference=not others,
    )


def _prompt(clip: ClipTensors, chunks: int, number: int, meta: DatasetMetadata) -> Prompt:
    rounds = ceil(chunks / clip.chunks)
    length = clip.chunks * float(meta.chunk_seconds)
    whole = [
        i for i, w in enumerate(clip.transcript) if (w.start + w.end) / 2 < length
    ]  # a partial last chunk is not generated
    looped = replace(
        clip,
        words=clip.words[whole].repeat(rounds, 1),
        word_times=torch.cat([clip.word_times[whole] + i * length for i in range(rounds)]),
        transcript=tuple(
            Word(word=w.word, start=w.start + i * length, end=w.end + i * length)
            for i in range(rounds)
            for w in (clip.transcript[j] for j in whole)
        ),
    )
    return Prompt(clip=looped if rounds > 1 else clip, chunks=chunks, number=number)


def _toy_config(clips: Sequence[ClipTensors], meta: DatasetMetadata) -> ToyConfig | None:
    """Return the toy world configuration if all clips are of the toy world, else None."""
    if VIDEO in meta.clocks and any(height != width for height, width in meta.config["sizes"]):
        return None
    words = {w.word for clip in clips for w in clip.transcript}
    worlds = {clip.world for clip in clips}
    english = ToyConfig(fps=frame_rate_of(meta), voice="english")
    if worlds == {world_name(english)}:
        return english
    is_toy = _has_toy_text(clips) if worlds == {None} else worlds == {world_name(ToyConfig())}
    if not is_toy or not words <= set(VOCABULARY):
        return None
    spoken = max((VOCABULARY.index(word) + 1 for word in words), default=0)
    return ToyConfig(fps=frame_rate_of(meta), syllables=max(12, spoken))


def _has_toy_text(clips: Sequence[ClipTensors]) -> bool:
    """Return True if all captions are those of the toy world: datasets of earlier versions do not record the world."""
    pattern = re.compile(r"a character with a \w+ face and \w+ \w+ hair talks in front of a \w+ wall")
    return all(pattern.fullmatch(clip.caption) for clip in clips)


def frame_rate_of(meta: DatasetMetadata) -> Fraction:
    """Return the frames per second; 24 for a dataset without video."""
    if VIDEO not in meta.clocks:
        return Fraction(24)
    codec: Any = meta.codec(VIDEO)
    return Fraction(codec.config.fps)


def check_compatibility(export: ExportMetadata, dataset: DatasetMetadata, *, path: str, uri: str) -> None:
    """Raise ValueError if codecs, clocks or chunks of a checkpoint and a dataset differ."""
    pairs: list[tuple[str, Any, Any]] = [("text", export.text_codec, dataset.text_codec)]
    pairs += [(f"{m} codec", export.codecs[m], dataset.codecs.get(m)) for m in export.codecs]
    pairs += [(f"{m} clock", export.clocks[m], dataset.clocks.get(m)) for m in export.clocks]
    pairs += [("chunk", export.chunk_seconds, dataset.chunk_seconds)]
    for name, trained, given in pairs:
        if trained != given:
            raise UserInputError(
                f"{path} and {uri} are incompatible: {name} {trained} of the checkpoint, {given} of the dataset. "
                "Use --data with a dataset that was preprocessed like the training set."
            )
