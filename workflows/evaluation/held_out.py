"""Real clips for a sweep: those whose conditions are prompts, those that make up the reference, and their signals."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

import torch

from mfcore.codecs.base import Codec
from mfcore.types import VIDEO
from preprocessing.dataset.reader import DatasetMetadata, open_dataset
from preprocessing.dataset.schema import ClipTensors
from preprocessing.records import Word
from preprocessing.toyworld.voice import VOCABULARY
from preprocessing.toyworld.world import ToyConfig
from workflows.checkpoints.model_card import ExportMetadata

REFERENCE_CLIPS = 32  # real clips, none of them a prompt, that distances are measured against
_TOY_CAPTION = re.compile(r"a character with a \w+ face and \w+ \w+ hair talks in front of a \w+ wall")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A held-out clip and how much is to be generated from its conditions."""

    clip: ClipTensors  # its transcript repeated where the sample is longer than the clip
    chunks: int  # to generate
    number: int  # seeds the noise


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """What a sweep generates from and compares with."""

    prompts: tuple[Prompt, ...]
    reference: tuple[ClipTensors, ...]  # real clips, others than the prompts' where there are any
    meta: DatasetMetadata
    toy: ToyConfig | None  # what the toy readers need; None: not the toy world
    repeated: bool  # transcripts repeat: samples are longer than their clips
    own_reference: bool = False  # `reference` is the prompts' clips: there were no others

    @property
    def codecs(self) -> dict[str, Codec]:
        return {m: self.meta.codec(m) for m in self.meta.codecs}

    @property
    def real_clips(self) -> tuple[ClipTensors, ...]:
        """The prompts' clips, then the reference."""
        return (*(p.clip for p in self.prompts), *self.reference)

    def digest(self) -> str:
        """Of everything that a sample's conditions and its distances depend on."""
        parts = [self.meta.fingerprint, *(f"{p.clip.id}/{p.clip.source_uri}/{p.chunks}" for p in self.prompts)]
        parts += [f"{c.id}/{c.source_uri}" for c in self.reference]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def select_evaluation_set(
    uri: str, *, clips: int, seconds: float | None, fraction: float | None, reference: int = REFERENCE_CLIPS
) -> EvaluationSet:
    """The first ``clips`` held-out clips of a dataset. ValueError when there is none, or ``seconds`` is no length.

    ``fraction``: share of its sources that training kept away; None: all of it was kept away. ``reference``: at most so
    many other clips to measure distances against; the prompts' own where no others are left.
    """
    if seconds is not None and seconds <= 0:
        raise ValueError(f"--seconds {seconds}: a clip needs a positive length")
    dataset = open_dataset(uri)
    training, held = (None, dataset) if fraction is None else dataset.split(fraction)
    usable = [i for i, length in enumerate(held.lengths) if length > 0]
    if not usable:
        raise ValueError(f"{uri} has no held-out clip of a whole chunk: preprocess more or longer clips")
    chosen = [held.clip(i) for i in usable[:clips]]
    wanted = None if seconds is None else ceil(Fraction(seconds).limit_denominator(1000) / dataset.meta.chunk_seconds)
    others = [held.clip(i) for i in usable[clips : clips + reference]]
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
    whole = [i for i, w in enumerate(clip.transcript) if (w.start + w.end) / 2 < length]  # not in a cut-off last chunk
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
    """The toy world is known by its captions and syllables; a dataset does not keep the truth of its sources."""
    words = {w.word for clip in clips for w in clip.transcript}
    if not words <= set(VOCABULARY) or not all(_TOY_CAPTION.fullmatch(clip.caption) for clip in clips):
        return None
    if VIDEO in meta.clocks and any(height != width for height, width in meta.config["sizes"]):
        return None
    spoken = max((VOCABULARY.index(word) + 1 for word in words), default=0)
    return ToyConfig(fps=frame_rate_of(meta), syllables=max(12, spoken))


def frame_rate_of(meta: DatasetMetadata) -> Fraction:
    """Frames per second; 24 for a dataset without a picture."""
    if VIDEO not in meta.clocks:
        return Fraction(24)
    codec: Any = meta.codec(VIDEO)
    return Fraction(codec.config.fps)


def check_compatibility(card: ExportMetadata, meta: DatasetMetadata, path: str, uri: str) -> None:
    """ValueError when a checkpoint cannot be compared with clips of this dataset."""
    pairs: list[tuple[str, Any, Any]] = [("text", card.text_codec, meta.text_codec)]
    pairs += [(f"{m} codec", card.codecs[m], meta.codecs.get(m)) for m in card.codecs]
    pairs += [(f"{m} clock", card.clocks[m], meta.clocks.get(m)) for m in card.clocks]
    pairs += [("chunk", card.chunk_seconds, meta.chunk_seconds)]
    for what, theirs, ours in pairs:
        if theirs != ours:
            raise ValueError(
                f"{path} and {uri} do not fit: {what} {theirs} there, {ours} here. "
                "Use --data with a dataset preprocessed as the one it was trained on"
            )
