import torch

from mfcore.model.attention import AttentionVisibility


def sight(chunks: int = 5, window: int = 2, per: int = 7) -> AttentionVisibility:
    """Noisy chunks of ``per`` tokens after their own history: history, then themselves."""
    chunk = torch.arange(chunks).repeat_interleave(per)
    track = torch.zeros_like(chunk)
    return AttentionVisibility(
        chunk=chunk,
        first=torch.cat([chunk + 1, chunk]),
        last=torch.cat([chunk + window, chunk]),
        track=track,
        key_track=torch.cat([track, track]),
    )


def qkv(seen: AttentionVisibility, dtype: torch.dtype, groups: int = 4) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 4, len(seen.chunk), 16), *[(2, groups, len(seen.first), 16)] * 2]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
