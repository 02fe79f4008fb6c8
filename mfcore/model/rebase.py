"""Move a KV cache to other chunk numbers, so that clips of different age share a forward pass.

Rotary positions are relative: attention reads differences of times only. A clip that is n chunks old continues equally
at any other chunk number, if its cached keys are rotated by the difference in time.
"""

from dataclasses import replace

import torch

from mfcore.model.config import ModelConfig
from mfcore.model.kv_cache import KeyValue, LayeredKVCache
from mfcore.model.rope import rotate, rotation, rotation_angles


def rebase_cache(cache: LayeredKVCache, chunks: int, config: ModelConfig) -> LayeredKVCache:
    """Return the cache with `chunks` added to all chunk numbers. Keys of the sink have no rotation.

    The latents per chunk must repeat with a period that divides `chunks`.
    """
    if not chunks or cache.past_positions is None:
        return cache
    seconds = chunks * float(config.chunk_seconds)
    zero = torch.zeros(1, dtype=torch.int64)
    angles = rotation_angles(torch.tensor([seconds], dtype=torch.float64), zero, zero, config)
    by = rotation(angles, cache.past[0].k)
    positions = cache.past_positions
    moved = replace(positions, chunk=positions.chunk + chunks, times=positions.times + seconds)
    past = tuple(KeyValue(rotate(kv.k, by), kv.v) for kv in cache.past)
    return replace(cache, past=past, past_positions=moved, passes=None)
