"""Rendered toy world clips in the form of a sweep, without files and codec loss."""

from fractions import Fraction

import torch

from mfcore.codecs.dct import DctCodec
from mfcore.codecs.mel import MelCodec
from mfcore.codecs.stats import LatentStats
from mfcore.types import AUDIO, VIDEO
from preprocessing.dataset.reader import DatasetMetadata
from preprocessing.records import Word
from preprocessing.toyworld.world import ToyConfig, render_audio, render_frames, sample_truth
from workflows.evaluation.held_out import EvaluationSet
from workflows.evaluation.signals import DecodedClip

WORLD = ToyConfig(seconds=4.0)
VIDEO_CODEC, AUDIO_CODEC = DctCodec(), MelCodec()
FLAT = {
    VIDEO: LatentStats(mean=(0.0,) * 48, std=(1.0,) * 48, head_mean=(0.0,) * 48, head_std=(1.0,) * 48),
    AUDIO: LatentStats(mean=(0.0,) * 64, std=(1.0,) * 64),
}
META = DatasetMetadata(
    config={},
    fingerprint="f",
    text_codec="words-v1/d8",
    codecs={VIDEO: VIDEO_CODEC.id, AUDIO: AUDIO_CODEC.id},
    clocks={VIDEO: VIDEO_CODEC.clock, AUDIO: AUDIO_CODEC.clock},
    stats=FLAT,
    chunk_seconds=Fraction(1, 2),
    counts={},
)


def evaluation_set(toy: ToyConfig | None = WORLD) -> EvaluationSet:
    return EvaluationSet(prompts=(), reference=(), meta=META, toy=toy, repeated=False)


def real_clip(index: int) -> DecodedClip:
    truth = sample_truth(WORLD, index)
    frames, sound = torch.from_numpy(render_frames(truth)), torch.from_numpy(render_audio(truth))
    latents = {VIDEO: VIDEO_CODEC.encode(frames)[1:], AUDIO: AUDIO_CODEC.encode(sound)}
    words = tuple(Word(**w) for w in truth.transcript)
    return DecodedClip(frames=frames, sound=sound, latents=latents, finite=True, words=words)
