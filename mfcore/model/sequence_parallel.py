"""Sequence parallelism as in DeepSpeed-Ulysses (Jacobs et al. 2023): ranks that share the tokens of the same clips.

Outside attention nothing mixes tokens, so each rank computes its own: of every branch a run of them. For attention one
exchange gives each rank all tokens of its share of the heads, another one brings the answers back. Memory holds all
tokens of a rank's heads. A group has the same clips on every rank, and each rank's loss is that of the whole clips:
gradients are then right when they are *averaged* over all ranks.

DeepSpeed's own layer wants equal numbers of tokens on all ranks; a chunk of sound has 10 or 11.

Letters: P ranks, B batch, H heads, n tokens of this rank, N of all, e head width, d width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single


class SequenceGroup:
    """The ranks that share tokens with this one. A value that copies of a network have in common."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceGroup":
        return self

    def counts(self, tokens: int) -> list[int]:
        """Tokens of each rank, of so many in order. ValueError where some rank would have none."""
        if tokens < self.size:
            raise ValueError(
                f"{tokens} tokens cannot be shared by {self.size} ranks: set engine.sequence to {tokens} or less"
            )
        return [tokens // self.size + (rank < tokens % self.size) for rank in range(self.size)]

    def spans(self, tokens: int) -> list[slice]:
        """The same as places."""
        ends = torch.tensor(self.counts(tokens)).cumsum(0).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.counts(tokens), strict=True)]

    def scatter_heads(self, x: Float[Tensor, "B H n e"], counts: Sequence[int]) -> Float[Tensor, "B H/P N e"]:
        """All tokens, rank after rank, of this rank's heads. ``counts``: tokens of each rank."""
        batch, heads, own, width = x.shape
        mine = heads // self.size
        sent = x.unflatten(1, (self.size, mine)).transpose(0, 1)
        got = self._exchange(sent, [batch * mine * own * width] * self.size, [batch * mine * c * width for c in counts])
        parts = [part.view(batch, mine, c, width) for part, c in zip(got, counts, strict=True)]
        return torch.cat(parts, dim=2)

    def gather_heads(self, x: Float[Tensor, "B H/P N e"], counts: Sequence[int]) -> Float[Tensor, "B H n e"]:
        """This rank's tokens of all heads."""
        batch, mine, _, width = x.shape
        own = counts[self.rank]
        sent = torch.cat([part.flatten() for part in x.split(list(counts), dim=2)])
        got = self._exchange(sent, [batch * mine * c * width for c in counts], [batch * mine * own * width] * self.size)
        return torch.cat([part.view(batch, mine, own, width) for part in got], dim=1)

    def all_gather_tokens(self, x: Float[Tensor, "B n d"], counts: Sequence[int]) -> Float[Tensor, "B N d"]:
        """All tokens of a branch on every rank. The gradient is the sum of what all of them make of these tokens."""
        batch, own, width = x.shape
        sent = x.expand(self.size, batch, own, width)
        got = self._exchange(sent, [x.numel()] * self.size, [batch * c * width for c in counts])
        return torch.cat([part.view(batch, c, width) for part, c in zip(got, counts, strict=True)], dim=1)

    def _exchange(self, sent: Tensor, give: list[int], take: list[int]) -> Sequence[Tensor]:
        """``sent`` flat, so many numbers to each rank; what each rank sent to this one."""
        flat = sent.reshape(-1).contiguous()
        room = flat.new_empty(sum(take))
        return all_to_all_single(room, flat, take, give, group=self._group).split(take)
