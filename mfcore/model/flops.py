"""What a network costs, counted from its configuration: parameters, operations of a chunk, bytes.

Letters: d width of a branch, g width of its keys, w width of its transcript attention, h feed-forward width,
S keys that a token sees.
A multiplication and its addition are two operations (FLOPs); norms, activations and rotations are not counted.
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
    """A chunk in a stream: what it is made of and what it may look at."""

    tokens: Mapping[str, int]  # of the chunk, by modality
    seen: int  # keys of sink and window, and the chunk's own
    caption: int  # caption tokens
    words: int  # transcript tokens within reach


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Weights by branch, and "total". The network is built without memory for them."""
    with torch.device("meta"):
        net = AVTransformer(config)
    each = {m: sum(p.numel() for p in net.branch(m).parameters()) for m in config.branches}
    return each | {"total": sum(p.numel() for p in net.parameters())}


def steady_state_workload(config: ModelConfig, timeline: Timeline, *, caption: int, words: int) -> ChunkWorkload:
    """A chunk late in a stream, with a full window of history. The sink is a frame and a chunk of the voice."""
    each = {m: timeline.max_count(m) * b.tokens for m, b in config.branches.items()}
    sink = sum(b.tokens if m == VIDEO else each[m] for m, b in config.branches.items())
    seen = sink + (config.window_chunks + 1) * sum(each.values())
    return ChunkWorkload(tokens=each, seen=seen, caption=caption, words=words)


def forward_flops(config: ModelConfig, load: ChunkWorkload) -> int:
    """Operations of one evaluation of one chunk: matrix products and attention."""
    parts = _multiplications(config, load)
    return 2 * (config.layers * (parts.project + parts.rest) + parts.ends + parts.caption + parts.words)


def chunk_flops(config: ModelConfig, load: ChunkWorkload, steps: int) -> int:
    """Operations of a chunk of a stream: ``steps`` evaluations, and the pass that writes keys and values.

    The words are read once, the caption is that of the chunk before; of the writing pass the last layer ends with its
    keys, and nothing leaves the network.
    """
    parts = _multiplications(config, load)
    evaluations = steps * (config.layers * (parts.project + parts.rest) + parts.ends)
    writing = config.layers * parts.project + (config.layers - 1) * parts.rest + parts.ends - parts.out
    return 2 * (evaluations + writing + parts.words)


@dataclass(frozen=True)
class _Parts:
    """Multiplications of one chunk, all branches."""

    project: int  # a layer's queries, keys and values
    rest: int  # what else a layer does
    ends: int  # tokens into the network and out again, and the noise level
    out: int  # of these: tokens out again
    caption: int  # what is made of it, all layers
    words: int  # the same of the transcript


def _multiplications(config: ModelConfig, load: ChunkWorkload) -> _Parts:
    """Per token and layer: d^2 + 2 d g queries, keys, values; d^2 out; 2 d^2 + 2 d w text queries and out; 2 d h
    feed-forward; 2 d S attention; 2 d (caption + 1) + 2 w (words + 1) text attention, a token "nothing here" standing
    before both. Per text token the embedding, and in each layer 2 d^2 or 2 d w keys and values. Per chunk and branch
    the embeddings of level and interval, and the modulation made of them; per token its phase.
    """
    d, features, wan = config.dim, config.level_features, config.layout == "wan"
    g, w = config.key_heads * config.head_dim, config.transcript_heads * config.head_dim
    tokens = sum(load.tokens.values())
    text_attention = 2 * d * (load.caption + 1) + 2 * w * (load.words + 1)
    rest = d * d + 2 * d * (d + w) + 2 * d * config.mlp_width + 2 * d * load.seen + text_attention
    caption = load.caption * (config.text_dim * d + (d * d if wan else 0))
    words = load.words * (config.text_dim + DURATION_FEATURES) * d
    caption_keys, word_keys = (config.layers * 2 * d * n for n in (d * (load.caption + 1), w * (load.words + 1)))
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
    """Bytes of keys and values for a second of history; ``element``: bytes of a number."""
    per_second = sum(float(timeline.clocks[m].rate) * b.tokens for m, b in config.branches.items())
    return round(2 * config.layers * config.key_heads * config.head_dim * element * per_second)


def training_state_bytes(weights: int, ranks: int, stage: int) -> int:
    """Bytes of float32 weights, gradients, two moments and the average on each of ``ranks`` at ZeRO ``stage``.

    Stage 1 shares the moments out, 2 the gradients too, 3 the weights too; the average stays whole on each rank.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO has the stages 0 to 3, got {stage}")
    parts = {"weights": 1, "gradients": 1, "moments": 2}  # in float32 numbers per weight
    shared = {0: (), 1: ("moments",), 2: ("moments", "gradients"), 3: tuple(parts)}[stage]
    share = sum(-(-n * weights // ranks) if name in shared else n * weights for name, n in parts.items())
    return FLOAT32 * (share + weights)
