import torch
from torch import nn

from mfcore.types import Streams


def assert_same_gradient(made: Streams, again: Streams, net: nn.Module) -> None:
    """Two ways to the same samples have the same gradient for every weight."""
    for m in made:
        torch.testing.assert_close(made[m].latents, again[m].latents, atol=1e-5, rtol=1e-5)
    sums = [torch.stack([s.latents.square().sum() for s in sample.values()]).sum() for sample in (made, again)]
    mine, theirs = (torch.autograd.grad(x, list(net.parameters()), allow_unused=True) for x in sums)
    assert any(g is not None for g in theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert float((one - other).norm()) < 1e-4 * float(other.norm())
