"""Costs of a run without running it: parameters, operations, bytes. For ``mfctl train --dry-run``, on any machine."""

from collections.abc import Sequence
from typing import Any

from mfcore.model.flops import (
    cache_bytes_per_second,
    chunk_flops,
    count_parameters,
    forward_flops,
    steady_state_workload,
    training_state_bytes,
)
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.timeline import Timeline
from workflows.config import presets, serialization
from workflows.config.latent_shapes import CAPTION_TOKENS, VISIBLE_WORDS, default_size, geometry_for_preset
from workflows.config.run import RunConfig
from workflows.config.stage_names import Stage
from workflows.inference.sampling import DEFAULT_FEW_STEPS
from workflows.training.pretrained_init import describe_wan_import


def estimate_costs(config: RunConfig, timeline: Timeline) -> dict[str, Any]:
    """Return parameters by branch, operations per streamed chunk, bytes of history and of training state."""
    model, clocks = config.model, {m: timeline.clocks[m] for m in config.model.branches}
    timeline = Timeline(clocks=clocks, chunk_seconds=timeline.chunk_seconds)
    weights = count_parameters(model)
    load = steady_state_workload(model, timeline, caption=CAPTION_TOKENS, words=VISIBLE_WORDS)
    ranks = config.engine.max_workers
    return {
        "parameters": weights,
        "gflop_per_evaluation": round(forward_flops(model, load) / 1e9, 3),
        f"gflop_per_chunk_at_{DEFAULT_FEW_STEPS}_steps": round(chunk_flops(model, load, DEFAULT_FEW_STEPS) / 1e9, 3),
        "cache_bytes_per_second_of_history": cache_bytes_per_second(model, timeline),
        "state_bytes_per_rank": {
            f"zero{stage}": training_state_bytes(weights["total"], ranks, stage) for stage in range(4)
        },
        "ranks": ranks,
        **({"fake_score": "not counted in state_bytes_per_rank"} if isinstance(config.objective, MutualConfig) else {}),
    }


def estimate_without_dataset(stage: Stage, preset: str, sets: Sequence[str], config_file: str | None) -> dict[str, Any]:
    """Return the configuration and its costs for latents of known codecs, without a dataset."""
    known = geometry_for_preset(preset)
    height, width = known.padded(default_size(preset))
    config = presets.build_preset(preset, stage, known.shapes((height, width)))
    if config_file:
        config = serialization.apply_overrides(config, serialization.load_config_file(config_file))
    config = serialization.apply_overrides(config, serialization.parse_overrides(sets))
    return {
        "stage": stage,
        "config": serialization.to_dict(config),
        "costs": estimate_costs(config, known.timeline()),
        **describe_wan_import(config),
        "latents": f"as {known.name} would give them at {height}x{width} and 24 frames per second",
    }
