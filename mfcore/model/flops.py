"""Cost of a network from its configuration: parameters, FLOPs of a chunk, bytes.

Letters: d width of a branch, g width of its keys, w width of its transcript attention, h feed-forward width,
S keys that a token attends to.
A multiply-add is two FLOPs. Norms, activations and rotations are not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mfcore.model.branch import DURATION_FEATURES, PHASE_FREQUENCIES
from mfcore.model.config import ModelConfig
from mfcore.model.transformer import AVTransformer
from mfcore.timeline import Timeline
from mfcore.types import VIDEO

FLOAT32 = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class ChunkWorkload:
    """Tokens and visible keys of one chunk of a stream."""

    tokens: Mapping[str, int]  # tokens of the chunk, per modality
    seen: int  # keys of sink, window and chunk
    caption: int  # caption tokens
    words: int  # transcript tokens within reach


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Return the parameters per branch, and "total". The network is built on the meta device."""
    with torch.device("meta"):
        net = AVTransformer(config)
    each = {m: sum(p.numel() for p in net.branch(m).parameters()) for m in config.branches}
    return each | {"total": sum(p.numel() for p in net.parameters())}


def steady_state_workload(config: ModelConfig, timeline: Timeline, *, caption: int, words: int) -> ChunkWorkload:
    """Return the workload of a chunk with a full window. The sink is one frame and one chunk of voice."""
    each = {m: timeline.max_count(m) * b.tokens for m, b in config.branches.items()}
    sink = sum(b.tokens if m == VIDEO else each[m] for m, b in config.branches.items())
    seen = sink + (config.window_chunks + 1) * sum(each.values())
    return ChunkWorkload(tokens=each, seen=seen, caption=caption, words=words)


def forward_flops(config: ModelConfig, load: ChunkWorkload) -> int:
    """Return the FLOPs of one evaluation of one chunk: matrix products and attention."""
    parts = _multiplications(config, load)
    return 2 * (config.layers * (parts.project + parts.rest) + parts.ends + parts.caption + parts.words)


def chunk_flops(config: ModelConfig, load: ChunkWorkload, steps: int) -> int:
    """Return the FLOPs of a streamed chunk: ``steps`` evaluations, and the pass that writes the KV cache.

    The transcript is projected once, the caption is cached. The writing pass ends with the keys and values of the last
    layer.
    """
    parts = _multiplications(config, load)
    evaluations = steps * (config.layers * (parts.project + parts.rest) + parts.ends)
    writing = config.layers * parts.project + (config.layers - 1) * parts.rest + parts.ends - parts.out
    return 2 * (evaluations + writing + parts.words)


@dataclass(frozen=True)
class _Parts:
    """Multiplications of one chunk, summed over branches."""

    project: int  # queries, keys and values of one layer
    rest: int  # rest of one layer
    ends: int  # input and output projection, and noise level
    out: int  # output projection, contained in ends
    caption: int  # embedding, and keys and values of all layers
    words: int  # the same for the transcript


def _multiplications(config: ModelConfig, load: ChunkWorkload) -> _Parts:
    """Count multiplications.

    Per token and layer: d^2 + 2 d g queries, keys, values; d^2 out; 2 d^2 + 2 d w text queries and out; 2 d h
    feed-forward; 2 d S attention; 2 d (caption + p) + 2 w (words + 1) text attention, with p and 1 extra tokens.
    Per text token: the embedding, and 2 d^2 or 2 d w keys and values in each layer. Per chunk and branch: embeddings of
    level and interval, and the modulation. Per token: its phase.
    """
    d, features = config.dim, config.level_features
    wan, extra = config.layout == "wan", config.caption_extra
    g, w = config.key_heads * config.head_dim, config.transcript_heads * config.head_dim
    tokens = sum(load.tokens.values())
    text_attention = 2 * d * (load.caption + extra) + 2 * w * (load.words + 1)
    rest = d * d + 2 * d * (d + w) + 2 * d * config.mlp_width + 2 * d * load.seen + text_attention
    caption = (load.caption + extra - 1) * (config.text_dim * d + (d * d if wan else 0))
    words = load.words * (config.text_dim + DURATION_FEATURES) * d
    caption_keys, word_keys = (config.layers * 2 * d * n for n in (d * (load.caption + extra), w * (load.words + 1)))
    level = 2 * (features * d + d * d) + 6 * d * d + (0 if wan else 2 * d * d)
    phases = tokens * 2 * PHASE_FREQUENCIES * d if config.chunk_phase else 0
    out = sum(n * config.branches[m].width * d for m, n in load.tokens.items())
    return _Parts(
        project=tokens * d * (d + 2 * g),
        rest=tokens * rest,
        ends=2 * out + phases + len(load.tokens) * level,
        out=out,
        caption=len(load.tokens) * (caption + caption_keys),
        words=len(load.tokens) * (words + word_keys),
    )


def cache_bytes_per_second(config: ModelConfig, timeline: Timeline, element: int = 2) -> int:
    """Return the bytes of keys and values per second of history. ``element``: bytes of one element."""
    per_second = sum(float(timeline.clocks[m].rate) * b.tokens for m, b in config.branches.items())
    return round(2 * config.layers * config.key_heads * config.head_dim * element * per_second)


def training_state_bytes(weights: int, ranks: int, stage: int) -> int:
    """Return the bytes per rank of float32 weights, gradients, two moments and the EMA at ZeRO ``stage``.

    Stage 1 shards the moments, 2 also the gradients, 3 also the weights. The EMA is whole on each rank.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO has the stages 0 to 3, got {stage}")
    parts = {"weights": 1, "gradients": 1, "moments": 2}  # in float32 numbers per weight
    sharded = {0: (), 1: ("moments",), 2: ("moments", "gradients"), 3: tuple(parts)}[stage]
    numbers = sum(-(-n * weights // ranks) if name in sharded else n * weights for name, n in parts.items())
    return FLOAT32 * (numbers + weights)
