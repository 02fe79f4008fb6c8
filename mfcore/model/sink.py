"""The sink: first frame and reference voice, which every chunk attends to (METHOD 4)."""

import torch
from torch import Tensor

from mfcore.model.config import ModelConfig
from mfcore.types import AUDIO, VIDEO, Condition, Stream

SINK = -1  # chunk number of the sink


def sink_streams(cond: Condition, config: ModelConfig) -> dict[str, Stream]:
    """Return first frame and reference voice as streams in chunk ``SINK``, for the branches of the network."""
    streams: dict[str, Stream] = {}
    if VIDEO in config.branches:
        if cond.first_frame is None:
            raise ValueError("a network with a video branch needs a first frame: pass one in the condition")
        streams[VIDEO] = _sink_stream(cond.first_frame[:, None], 0.0)
    if AUDIO in config.branches:
        if cond.voice is None:
            raise ValueError("a network with an audio branch needs voice latents (zeros with a False mask for none)")
        streams[AUDIO] = _sink_stream(cond.voice, config.chunk_seconds)
    return streams


def _sink_stream(latents: Tensor, seconds: float) -> Stream:
    n = latents.shape[1]
    return Stream(
        latents=latents,
        times=torch.arange(n, dtype=torch.float64) * (seconds / n),
        chunk=torch.full((n,), SINK),
    )


def find_non_finite(hidden: dict[str, Tensor], chunks: tuple[Tensor, ...]) -> str:
    """Describe non-finite tokens: branch, first chunk and count. Returns "" if all are finite.

    ``chunks``: chunk of each token, per branch.
    """
    found: list[str] = []
    for (m, h), chunk in zip(hidden.items(), chunks, strict=True):
        bad = ~h.isfinite().all(dim=-1).all(dim=0).cpu()
        if bool(bad.any()):
            first = int(chunk[bad][0])
            where = "the sink" if first == SINK else f"chunk {first}"
            found.append(f"{m} {where} ({int(bad.sum())} of {len(bad)} tokens)")
    return ", ".join(found)
