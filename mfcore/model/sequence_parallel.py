"""Sequence parallelism as in DeepSpeed-Ulysses (Jacobs et al. 2023): ranks share the tokens of the same clips.

Outside attention each rank computes a span of the tokens of every branch. For attention, one all-to-all exchange gives
each rank all tokens of some heads, and another returns the results. The KV cache of a rank contains all tokens of its
heads. All ranks of a group have the same clips and the loss of the whole clips, so gradients are *averaged* over ranks.

The layer of DeepSpeed requires equal numbers of tokens on all ranks, but a chunk of audio has 10 or 11.

Letters: P ranks, B batch, H heads, n tokens of this rank, N of all ranks, e head width, d width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single

from mfcore.errors import UserInputError


class SequenceGroup:
    """Ranks that share tokens with this rank. Copies of a network share one group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceGroup":
        return self

    def counts(self, tokens: int) -> list[int]:
        """Return the tokens of each rank. Raises ValueError if a rank would have none."""
        if tokens < self.size:
            raise UserInputError(
                f"{tokens} tokens cannot be shared by {self.size} ranks: set engine.sequence to {tokens} or less"
            )
        share, remainder = divmod(tokens, self.size)
        return [share + 1 if rank < remainder else share for rank in range(self.size)]

    def spans(self, tokens: int) -> list[slice]:
        """Return the token span of each rank."""
        ends = torch.tensor(self.counts(tokens)).cumsum(0).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.counts(tokens), strict=True)]

    def scatter_heads(self, x: Float[Tensor, "B H n e"], counts: Sequence[int]) -> Float[Tensor, "B H/P N e"]:
        """Return all tokens, in the order of ranks, of the heads of this rank. ``counts``: tokens of each rank."""
        batch, heads, own, width = x.shape
        local = heads // self.size
        sent = x.unflatten(1, (self.size, local)).transpose(0, 1)
        received = self._exchange(
            sent, [batch * local * own * width] * self.size, [batch * local * c * width for c in counts]
        )
        parts = [part.view(batch, local, c, width) for part, c in zip(received, counts, strict=True)]
        return torch.cat(parts, dim=2)

    def gather_heads(self, x: Float[Tensor, "B H/P N e"], counts: Sequence[int]) -> Float[Tensor, "B H n e"]:
        """Return the tokens of this rank, of all heads."""
        batch, local, _, width = x.shape
        own = counts[self.rank]
        sent = torch.cat([part.flatten() for part in x.split(list(counts), dim=2)])
        received = self._exchange(
            sent, [batch * local * c * width for c in counts], [batch * local * own * width] * self.size
        )
        return torch.cat([part.view(batch, local, own, width) for part in received], dim=1)

    def all_gather_tokens(self, x: Float[Tensor, "B n d"], counts: Sequence[int]) -> Float[Tensor, "B N d"]:
        """Return all tokens of a branch on every rank. The gradient is summed over ranks."""
        batch, own, width = x.shape
        sent = x.expand(self.size, batch, own, width)
        received = self._exchange(sent, [x.numel()] * self.size, [batch * c * width for c in counts])
        return torch.cat([part.view(batch, c, width) for part, c in zip(received, counts, strict=True)], dim=1)

    def _exchange(self, sent: Tensor, send_counts: list[int], receive_counts: list[int]) -> Sequence[Tensor]:
        """Exchange ``sent``, flattened. Returns the part that each rank sent to this one."""
        flat = sent.reshape(-1).contiguous()
        output = flat.new_empty(sum(receive_counts))
        received = all_to_all_single(output, flat, receive_counts, send_counts, group=self._group)
        return received.split(receive_counts)
