"""What a network costs, counted from its configuration: parameters, operations of a chunk, bytes.

Letters: d width of a branch, g width of its keys, w width of its transcript attention, h feed-forward width,
n tokens of a chunk, S keys that a token sees.
A multiplication and its addition are two operations (FLOPs); norms, activations and rotations are not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mfcore.model.branch import DURATION_FEATURES
from mfcore.model.config import ModelConfig
from mfcore.model.transformer import AVTransformer
from mfcore.timeline import Timeline
from mfcore.types import VIDEO

FLOAT32 = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Load:
    """A chunk in a stream: what it is made of and what it may look at."""

    tokens: Mapping[str, int]  # of the chunk, by modality
    seen: int  # keys of sink and window, and the chunk's own
    caption: int  # caption tokens
    words: int  # transcript tokens within reach


def parameters(config: ModelConfig) -> dict[str, int]:
    """Weights by branch, and "total". The network is built without memory for them."""
    with torch.device("meta"):
        net = AVTransformer(config)
    each = {m: sum(p.numel() for p in net.branch(m).parameters()) for m in config.branches}
    return each | {"total": sum(p.numel() for p in net.parameters())}


def chunk_load(config: ModelConfig, timeline: Timeline, *, caption: int, words: int, voice: int = 0) -> Load:
    """A chunk late in a stream, with a full window of history. ``voice``: latents of the reference voice."""
    each = {m: timeline.max_count(m) * b.tokens for m, b in config.branches.items()}
    sink = sum(b.tokens if m == VIDEO else max(voice, 1) for m, b in config.branches.items())
    seen = sink + (config.window_chunks + 1) * sum(each.values())
    return Load(tokens=each, seen=seen, caption=caption, words=words)


def forward_flops(config: ModelConfig, load: Load, *, text_known: bool = False) -> int:
    """Operations of one evaluation of one chunk: matrix products and attention.

    Multiplications per token and layer: d^2 + 2 d g queries, keys, values; d^2 out; 2 d^2 + 2 d w text queries and out;
    2 d h feed-forward; 2 d S attention; 2 d (caption + 1) + 2 w (words + 1) text attention. Per text token and layer its
    keys and values (``text_known``: they lie ready from an earlier evaluation of the chunk). Per chunk the embeddings of
    level and interval and the modulation made of them.
    """
    d, features = config.dim, config.level_features
    keys, reading = config.key_heads * config.head_dim, config.reading_heads * config.head_dim
    linear = d * (d + 2 * keys) + d * d + 2 * d * (d + reading) + 2 * d * config.hidden
    attention = 2 * d * (load.seen + load.caption + 1) + 2 * reading * (load.words + 1)
    # a token "nothing here" stands before caption and transcript
    text = 2 * d * d * (load.caption + 1) + 2 * d * reading * (load.words + 1)
    wan = config.layout == "wan"
    final, refined = (0, load.caption * d * d) if wan else (2 * d * d, 0)
    total = 0
    for modality, n in load.tokens.items():
        branch = config.branches[modality]
        width = branch.channels * branch.patch[0] * branch.patch[1]
        total += config.layers * n * (linear + attention)
        total += 2 * n * width * d  # into tokens and out again
        total += 2 * (features * d + d * d) + 6 * d * d + final  # level, interval; modulation of blocks and output
        if not text_known:
            total += config.layers * text + refined
            total += load.caption * config.text_dim * d + load.words * (config.text_dim + DURATION_FEATURES) * d
    return 2 * total


def cache_bytes_per_second(config: ModelConfig, timeline: Timeline, element: int = 2) -> int:
    """Bytes of keys and values for a second of history; ``element``: bytes of a number."""
    per_second = sum(float(timeline.clocks[m].rate) * b.tokens for m, b in config.branches.items())
    return round(2 * config.layers * config.key_heads * config.head_dim * element * per_second)


def state_bytes(weights: int, ranks: int, stage: int) -> int:
    """Bytes of float32 weights, gradients, two moments and the average on each of ``ranks`` at ZeRO ``stage``.

    Stage 1 shares the moments out, 2 the gradients too, 3 the weights too; the average stays whole on each rank.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO has the stages 0 to 3, got {stage}")
    parts = {"weights": 1, "gradients": 1, "moments": 2}  # in float32 numbers per weight
    shared = {0: (), 1: ("moments",), 2: ("moments", "gradients"), 3: tuple(parts)}[stage]
    share = sum(-(-n * weights // ranks) if name in shared else n * weights for name, n in parts.items())
    return FLOAT32 * (share + weights)
