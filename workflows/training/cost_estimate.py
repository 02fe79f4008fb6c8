"""What a run would cost, on paper: parameters, operations, bytes. For ``mfctl train --dry-run``, on any machine."""

from collections.abc import Sequence
from typing import Any

from mfcore.model.flops import cache_bytes_per_second, chunk_flops, chunk_load, forward_flops, parameters, state_bytes
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.timeline import Timeline
from workflows.config import presets, serialization
from workflows.config.latent_shapes import geometry, usual_size
from workflows.config.run import RunConfig, Stage
from workflows.training.pretrained_init import taken_over

FEW_STEPS = 4
CAPTION, WORDS = 128, 8  # tokens of a caption; words within reach of a chunk


def costs(config: RunConfig, timeline: Timeline) -> dict[str, Any]:
    """Parameters by branch, operations of a chunk while streaming, bytes of history and of training state."""
    model, clocks = config.model, {m: timeline.clocks[m] for m in config.model.branches}
    timeline = Timeline(clocks=clocks, chunk_seconds=timeline.chunk_seconds)
    weights = parameters(model)
    load = chunk_load(model, timeline, caption=CAPTION, words=WORDS)
    ranks = config.engine.most
    return {
        "parameters": weights,
        "gflop_per_evaluation": round(forward_flops(model, load) / 1e9, 3),
        f"gflop_per_chunk_at_{FEW_STEPS}_steps": round(chunk_flops(model, load, FEW_STEPS) / 1e9, 3),
        "cache_bytes_per_second_of_history": cache_bytes_per_second(model, timeline),
        "state_bytes_per_rank": {f"zero{stage}": state_bytes(weights["total"], ranks, stage) for stage in range(4)},
        "ranks": ranks,
        **({"fake_score": "not counted in state_bytes_per_rank"} if isinstance(config.objective, MutualConfig) else {}),
    }


def on_paper(stage: Stage, preset: str, sets: Sequence[str], config_file: str | None) -> dict[str, Any]:
    """The configuration and its costs for latents of known codecs: no dataset is needed."""
    known = geometry(preset)
    height, width = known.padded(usual_size(preset))
    config = presets.preset(preset, stage, known.shapes((height, width)))
    if config_file:
        config = serialization.change(config, serialization.read_file(config_file))
    config = serialization.change(config, serialization.parse_sets(sets))
    return {
        "stage": stage,
        "config": serialization.dump(config),
        "costs": costs(config, known.timeline()),
        **taken_over(config),
        "latents": f"as {known.name} would give them at {height}x{width} and 24 frames per second",
    }
