"""Conversion of the weights of the Wan video transformer (diffusers names) to a video branch in the layout of Wan.

Wan attends to all frames and reads a caption. This branch attends to a window and a sink, and also reads a transcript.
Weights that Wan lacks start without effect (zero output of transcript attention), as a copy (embedding of the first
frame), or as ``init.initialize`` set them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import EinopsError, rearrange
from jaxtyping import Float
from torch import Tensor

from mfcore.errors import UserInputError
from mfcore.model.config import ModelConfig
from mfcore.types import VIDEO
from mfcore.weights import Weights, branch_weights, check_shapes

Convert = Callable[[list[Tensor], Tensor], Tensor]
"""Return a weight, given weights of Wan and the weight that it replaces."""
KINDS = ("weight", "bias")


@dataclass(frozen=True, kw_only=True)
class WeightMapping:
    """Weights of a branch and their origin."""

    weights: dict[str, Tensor]  # by full name
    loaded: dict[str, tuple[str, ...]]  # names in Wan, by name in the branch
    initialized: list[str]  # names in the branch that Wan lacks
    skipped: list[str]  # names in Wan that the branch lacks


def map_wan_weights(
    wan: Weights, own: Weights, config: ModelConfig, *, empty_caption: Float[Tensor, "1 D"] | None = None
) -> WeightMapping:
    """Return the video branch of ``own`` with the weights of ``wan``.

    ``empty_caption``: output of the text encoder for "", which the null branch reads; None: it reads padding alone.

    Raises ValueError with every name that is missing or has another shape.
    """
    grouped = config.key_heads != config.heads
    if config.layout != "wan" or grouped or VIDEO not in config.branches:
        raise UserInputError(
            "Wan's weights fit a network with a video branch, model.layout=wan and as many kv_heads as heads: "
            "use --preset base"
        )
    rules = [(f"branches.{VIDEO}.{name}", names, convert) for name, names, convert in _rules(config, empty_caption)]
    if missing := sorted({name for _, names, _ in rules for name in names} - wan.keys()):
        raise UserInputError(
            f"no weights of a Wan text-to-video transformer of {config.layers} layers: {missing} missing"
        )
    kept = branch_weights(own, VIDEO)
    converted: dict[str, Tensor] = {}
    misshaped: dict[str, Tensor] = {}
    for name, names, convert in rules:
        try:
            converted[name] = convert([wan[n].float() for n in names], kept[name])
        except (RuntimeError, ValueError, EinopsError):  # shapes that cannot be combined
            misshaped[name] = wan[names[0]]
    check_shapes(kept, converted | misshaped, "Wan's weights")
    return WeightMapping(
        weights=kept | {name: weight.to(kept[name].dtype) for name, weight in converted.items()},
        loaded={name: names for name, names, _ in rules},
        initialized=sorted(kept.keys() - converted.keys()),
        skipped=sorted(wan.keys() - {name for _, names, _ in rules for name in names}),
    )


def _rules(config: ModelConfig, empty_caption: Tensor | None) -> Iterator[tuple[str, tuple[str, ...], Convert]]:
    """Yield the name in the branch, the names in Wan, and the conversion."""
    time, text = "condition_embedder.time_embedder.linear_", "condition_embedder.text_embedder.linear_"
    patch_h, patch_w = config.branches[VIDEO].patch
    for own in ("embed", "embed_sink"):
        yield f"{own}.weight", ("patch_embedding.weight",), lambda parts, _: parts[0].flatten(1)
        yield f"{own}.bias", ("patch_embedding.bias",), _same
    for kind in KINDS:
        yield f"levels.level.0.{kind}", (f"{time}1.{kind}",), _same
        yield f"levels.level.2.{kind}", (f"{time}2.{kind}",), _same
        yield f"levels.shared.{kind}", (f"condition_embedder.time_proj.{kind}",), _same
        yield f"text.caption.{kind}", (f"{text}1.{kind}",), _same
        yield f"text.refine.1.{kind}", (f"{text}2.{kind}",), _same
        # Wan orders the output of a token by position, then channel
        yield (
            f"head.{kind}",
            (f"proj_out.{kind}",),
            lambda parts, _: rearrange(parts[0], "(p q c) ... -> (c p q) ...", p=patch_h, q=patch_w),
        )
    yield "levels.final.weight", ("scale_shift_table",), _first
    yield (
        "text.nothing.weight",
        tuple(f"{text}{layer}.{kind}" for layer in (1, 2) for kind in KINDS),
        lambda parts, kept: torch.cat([_embed_caption(parts, empty_caption), kept[1:]]),
    )
    for layer in range(config.layers):
        yield from _block_rules(config, f"blocks.{layer}.", f"blocks.{layer}.")


def _block_rules(config: ModelConfig, own: str, wan: str) -> Iterator[tuple[str, tuple[str, ...], Convert]]:
    d = config.dim
    reorder = _rotary_reordering(config)
    yield f"{own}table.weight", (f"{wan}scale_shift_table",), _first
    for norm in ("q", "k"):
        yield f"{own}norm_{norm}.weight", (f"{wan}attn1.norm_{norm}.weight",), lambda parts, _: reorder(parts[0])
        yield f"{own}text.norm_caption_{norm}.weight", (f"{wan}attn2.norm_{norm}.weight",), _same
    for kind in KINDS:
        yield (
            f"{own}qkv.{kind}",
            (f"{wan}attn1.to_q.{kind}", f"{wan}attn1.to_k.{kind}", f"{wan}attn1.to_v.{kind}"),
            lambda parts, _: torch.cat([reorder(parts[0]), reorder(parts[1]), parts[2]]),
        )
        yield f"{own}out.{kind}", (f"{wan}attn1.to_out.0.{kind}",), _same
        yield f"{own}norm_text.{kind}", (f"{wan}norm2.{kind}",), _same
        yield (
            f"{own}text.query.{kind}",
            (f"{wan}attn2.to_q.{kind}",),
            lambda parts, kept: torch.cat([parts[0], kept[d:]]),
        )
        keys = (f"{wan}attn2.to_k.{kind}", f"{wan}attn2.to_v.{kind}")
        yield f"{own}text.caption.{kind}", keys, lambda parts, _: torch.cat(parts)
        yield f"{own}mlp.0.{kind}", (f"{wan}ffn.net.0.proj.{kind}",), _same
        yield f"{own}mlp.2.{kind}", (f"{wan}ffn.net.2.{kind}",), _same
    yield (
        f"{own}text.out.weight",
        (f"{wan}attn2.to_out.0.weight",),
        lambda parts, kept: torch.cat([parts[0], torch.zeros_like(kept[:, d:])], dim=1),
    )
    yield f"{own}text.out.bias", (f"{wan}attn2.to_out.0.bias",), _same


def _embed_caption(parts: list[Tensor], caption: Tensor | None) -> Tensor:
    """Return the text embedding of one caption token by the weights of Wan. None: of a zero vector, the padding."""
    token = parts[0].new_zeros(1, parts[0].shape[1]) if caption is None else caption.to(parts[0])
    return F.linear(F.gelu(F.linear(token, parts[0], parts[1]), approximate="tanh"), parts[2], parts[3])


def _same(parts: list[Tensor], kept: Tensor) -> Tensor:
    del kept
    return parts[0]


def _first(parts: list[Tensor], kept: Tensor) -> Tensor:
    """Remove the leading batch axis of the tables of Wan."""
    del kept
    return parts[0][0]


def _rotary_reordering(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Return the reordering of channel pairs from (2 i, 2 i + 1), as in Wan, to (i, i + half)."""
    return lambda weight: rearrange(weight, "(h i two) ... -> (h two i) ...", h=config.heads, two=2)
