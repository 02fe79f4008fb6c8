import torch
from torch import nn

from mfcore.types import Streams


def assert_same_gradient(actual: Streams, expected: Streams, net: nn.Module) -> None:
    """Assert that two samples have equal latents and equal gradients for every weight."""
    for m in actual:
        torch.testing.assert_close(actual[m].latents, expected[m].latents, atol=1e-5, rtol=1e-5)
    sums = [torch.stack([s.latents.square().sum() for s in sample.values()]).sum() for sample in (actual, expected)]
    mine, theirs = (torch.autograd.grad(x, list(net.parameters()), allow_unused=True) for x in sums)
    assert any(g is not None for g in theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert float((one - other).norm()) < 1e-4 * float(other.norm())
