"""Parameter and FLOP counts from the configuration equal those of the network."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mfcore.model.flops import (
    ChunkWorkload,
    cache_bytes_per_second,
    chunk_flops,
    count_parameters,
    forward_flops,
    steady_state_workload,
    training_state_bytes,
)
from mfcore.model.ring_cache import to_ring_cache
from mfcore.rollout import noise_starts, rollout
from mfcore.solver import DenoiserContext, constant_levels, schedule
from mfcore.types import AUDIO, VIDEO
from tests.helpers.tiny_model import SHAPES, TIMELINE, batch, model_config, network


@pytest.mark.parametrize("modalities", [(VIDEO,), (AUDIO,), (VIDEO, AUDIO)])
def test_parameter_counts_equal_those_of_the_network(modalities):
    counted = count_parameters(model_config(*modalities))
    assert counted["total"] == sum(p.numel() for p in network(*modalities).parameters())
    assert counted["total"] == sum(counted[m] for m in modalities)


@torch.no_grad()
def test_forward_flops_equal_those_that_torch_counts():
    """Count one chunk after two chunks of history in the coupled network."""
    model, data = network(window=2), batch(rows=1, chunks=3)
    context = DenoiserContext(model=model, cond=data.cond).append_history(
        {m: s.chunks(0, 2) for m, s in data.streams.items()}, None
    )
    last = {m: s.chunks(2, 3) for m, s in data.streams.items()}
    t = constant_levels(last, dict.fromkeys(last, 0.5))
    r = constant_levels(last, dict.fromkeys(last, 0.25))
    # the counter cannot see into the fused kernel of the CPU; the math kernel is two products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        context.velocity(last, t, r)
    branches = model.config.branches
    tokens = {m: s.latents.shape[1] * branches[m].tokens for m, s in last.items()}
    history = sum(data.streams[m].chunks(0, 2).latents.shape[1] * branches[m].tokens for m in branches)
    sink = branches[VIDEO].tokens + data.cond.voice.shape[1]
    load = ChunkWorkload(
        tokens=tokens,
        seen=sink + history + sum(tokens.values()),
        caption=data.cond.caption.shape[1],
        words=data.cond.words.shape[1],
    )
    assert forward_flops(model.config, load) == counter.get_total_flops()


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1, "word_heads": 1}, {"layout": "wan"}], ids=str)
@torch.no_grad()
def test_flops_of_a_streamed_chunk_equal_those_that_torch_counts(changes):
    """Count three steps and the pass that writes the cache, with a full window."""
    model, data = network(window=2, **changes), batch(rows=1, chunks=1)
    most = sum(TIMELINE.max_count(m) * b.tokens for m, b in model.config.branches.items())
    context = (
        DenoiserContext(model=model, cond=data.cond).prefill().map_caches(lambda cache: to_ring_cache(cache, most))
    )
    starts = noise_starts(TIMELINE, SHAPES, range(4, 8), seed=0, samples=data.samples, like=data.cond.caption)
    chunks = rollout(context, starts, schedule(3, {VIDEO: 1.0, AUDIO: 1.0}))
    made = [next(chunks) for _ in range(3)]
    history = sum(c.clean[m].latents.shape[1] * b.tokens for c in made[1:] for m, b in model.config.branches.items())
    assert made[-1].context.cache is not None  # the pass that writes the chunk before
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        last = next(chunks)
        assert last.context.cache is not None
    tokens = {m: s.latents.shape[1] * model.config.branches[m].tokens for m, s in last.clean.items()}
    sink = model.config.branches[VIDEO].tokens + data.cond.voice.shape[1]
    load = ChunkWorkload(
        tokens=tokens,
        seen=sink + history + sum(tokens.values()),
        caption=data.cond.caption.shape[1],
        words=data.cond.words.shape[1],
    )
    assert chunk_flops(model.config, load, 3) == counter.get_total_flops()


def test_a_streamed_chunk_sees_its_window():
    config = model_config(VIDEO, AUDIO, window=2)
    load = steady_state_workload(config, TIMELINE, caption=3, words=4)
    assert load.tokens == {VIDEO: 3 * 4, AUDIO: 8}
    assert load.seen == 4 + 8 + 3 * (12 + 8)


def test_bytes_of_cache_and_training_state():
    config = model_config(VIDEO, AUDIO)
    # 6 latents of 4 tokens and 15.625 latents a second, 2 layers, keys and values of width 32 in 2 bytes
    assert cache_bytes_per_second(config, TIMELINE) == (24 + 15.625) * 2 * 2 * 32 * 2
    assert training_state_bytes(1000, 1, 0) == 20_000
    assert training_state_bytes(1000, 4, 1) == 4 * (1000 + 1000 + 500 + 1000)
    assert training_state_bytes(1000, 4, 2) == 4 * (1000 + 250 + 500 + 1000)
    assert training_state_bytes(1000, 4, 3) == 4 * (250 + 250 + 500 + 1000)
    with pytest.raises(ValueError, match="0 to 3"):
        training_state_bytes(1, 1, 4)
