"""Sequence-parallel attention against DeepSpeed's ``DistributedAttention``."""

import pytest
import torch
import torch.distributed as dist

from mfcore.model.attention import attend
from mfcore.model.sequence_parallel import SequenceGroup
from tests.helpers.gloo_processes import run_on
from workflows.training.engines.deepspeed_engine import _deepspeed

TOKENS, SHAPE = 12, (2, 4, 12, 8)  # tokens; batch, heads, tokens, head width


def inputs() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=draw, requires_grad=True) for _ in range(3)]


def both_ways() -> list[tuple[torch.Tensor, ...]]:
    """Return outputs and gradients of this rank by both implementations."""
    _deepspeed()
    from deepspeed.sequence.layer import DistributedAttention

    def plain(q, k, v, *_):  # theirs is (batch, tokens, heads, width)
        return attend(*(x.transpose(1, 2) for x in (q, k, v)), None).transpose(1, 2)

    group = SequenceGroup(dist.group.WORLD)
    counts = group.counts(TOKENS)
    theirs, found = DistributedAttention(plain, dist.group.WORLD, scatter_idx=2, gather_idx=1), []
    for ulysses in (True, False):
        parts = inputs()
        mine = [x[:, :, group.spans(TOKENS)[group.rank]] for x in parts]
        if ulysses:
            answer = theirs(*(x.transpose(1, 2).contiguous() for x in mine), batch_dim_idx=0).transpose(1, 2)
        else:
            answer = group.gather_heads(attend(*(group.scatter_heads(x, counts) for x in mine), None), counts)
        answer.square().sum().backward()
        found.append((answer.detach(), *(x.grad for x in parts)))
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_exchange_equals_that_of_deepspeed():
    q, k, v = inputs()
    whole = attend(q, k, v, None)
    whole.square().sum().backward()
    for rank, found in enumerate(run_on(2, both_ways)):
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        mine = slice(rank * 6, rank * 6 + 6)
        torch.testing.assert_close(found[1][0], whole.detach()[:, :, mine], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found[1][1][:, :, mine], q.grad[:, :, mine], atol=1e-5, rtol=1e-5)
