"""Conditions of generated samples."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mfcore.types import AUDIO
from tests.helpers.memory_clips import STATS, TIMELINE, FakeClip
from workflows.evaluation.held_out import Prompt
from workflows.evaluation.sampling import collate_prompts

PIPELINE: Any = SimpleNamespace(timeline=TIMELINE, metadata=SimpleNamespace(stats=STATS), device=torch.device("cpu"))


@pytest.mark.parametrize("chunks", range(1, 11))
def test_the_voice_of_a_sample_is_no_part_of_what_it_is_compared_with(chunks):
    """For clips of any length in one batch, shorter and longer than the sample."""
    clips: list[Any] = [FakeClip(length, length) for length in range(1, 10)]
    cond = collate_prompts(PIPELINE, [Prompt(clip=clip, chunks=chunks, number=i) for i, clip in enumerate(clips)])
    assert cond.voice is not None and cond.voice_mask is not None
    for clip, voice, given in zip(clips, cond.voice, cond.voice_mask.tolist(), strict=True):
        rest = STATS[AUDIO].whiten(clip.audio[TIMELINE.count(AUDIO, chunks) :])
        assert given == (len(rest) >= len(voice))
        assert not given or any(torch.equal(rest[i : i + len(voice)], voice) for i in range(len(rest)))
