"""What a run would cost, on paper: parameters, operations, bytes. For ``mfctl train --dry-run``, on any machine."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mfcore.model.counts import cache_bytes_per_second, chunk_load, forward_flops, parameters, state_bytes
from mfcore.objectives.recipe import MutualConfig
from mfcore.timeline import Timeline, audio_clock, video_clock
from mfcore.types import AUDIO, VIDEO
from workflows import config_io, presets
from workflows.config import RunConfig, Stage

FEW_STEPS = 4
CAPTION, WORDS = 128, 8  # tokens of a caption; words within reach of a chunk
TIMELINE = Timeline(
    clocks={VIDEO: video_clock(Fraction(24), 4), AUDIO: audio_clock(44100, 2048)}, chunk_seconds=Fraction(1, 2)
)
SHAPES = presets.LatentShapes(
    channels={VIDEO: 48, AUDIO: 64},
    size={VIDEO: (12, 22), AUDIO: (1, 1)},  # 192 x 336, padded to a multiple of 32
    still={VIDEO: 0, AUDIO: 0},
    text_dim=4096,
    chunk_seconds=0.5,
    chunks=20,
)
"""Published geometry: Wan 2.2 (48 channels, 16 x 16 pixels, 4 frames a latent), Stable Audio 2 (64 channels, 21.5 per
second), UMT5-XXL."""


def costs(config: RunConfig, timeline: Timeline) -> dict[str, Any]:
    """Parameters by branch, operations of a chunk while streaming, bytes of history and of training state."""
    model, clocks = config.model, {m: timeline.clocks[m] for m in config.model.branches}
    timeline = Timeline(clocks=clocks, chunk_seconds=timeline.chunk_seconds)
    weights = parameters(model)
    once = forward_flops(model, chunk_load(model, timeline, caption=CAPTION, words=WORDS))
    ranks = config.engine.most
    return {
        "parameters": weights,
        "gflop_per_evaluation": round(once / 1e9, 3),
        f"gflop_per_chunk_at_{FEW_STEPS}_steps": round((FEW_STEPS + 1) * once / 1e9, 3),  # one pass writes the cache
        "cache_bytes_per_second_of_history": cache_bytes_per_second(model, timeline),
        "state_bytes_per_rank": {f"zero{stage}": state_bytes(weights["total"], ranks, stage) for stage in range(4)},
        "ranks": ranks,
        **({"fake_score": "not counted in state_bytes_per_rank"} if isinstance(config.objective, MutualConfig) else {}),
    }


def on_paper(stage: Stage, preset: str, sets: Sequence[str], config_file: str | None) -> dict[str, Any]:
    """The configuration and its costs for latents of published codecs: no dataset is needed."""
    config = presets.preset(preset, stage, SHAPES)
    if config_file:
        config = config_io.change(config, config_io.read_file(config_file))
    config = config_io.change(config, config_io.parse_sets(sets))
    return {
        "stage": stage,
        "config": config_io.dump(config),
        "costs": costs(config, TIMELINE),
        "latents": "as Wan 2.2 at 192x352 and 24 frames per second, Stable Audio 2 and UMT5-XXL would give them",
    }
