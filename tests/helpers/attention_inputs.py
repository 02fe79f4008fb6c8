"""Random inputs of attention with the visibility of noisy chunks and their history."""

import torch

from mfcore.model.attention import AttentionVisibility


def visibility(chunks: int = 5, window: int = 2, tokens: int = 7) -> AttentionVisibility:
    """Return the visibility of noisy chunks of ``tokens`` tokens; keys are their history, then themselves."""
    chunk = torch.arange(chunks).repeat_interleave(tokens)
    track = torch.zeros_like(chunk)
    return AttentionVisibility(
        chunk=chunk,
        first=torch.cat([chunk + 1, chunk]),
        last=torch.cat([chunk + window, chunk]),
        track=track,
        key_track=torch.cat([track, track]),
    )


def random_qkv(visible: AttentionVisibility, dtype: torch.dtype, groups: int = 4) -> list[torch.Tensor]:
    """Draw queries, keys and values for ``visible``."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 4, len(visible.chunk), 16), *[(2, groups, len(visible.first), 16)] * 2]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
