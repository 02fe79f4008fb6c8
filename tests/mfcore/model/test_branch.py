"""Output of a branch: the Gaussian flow around the mean, and its learned spread."""

import math

import pytest
import torch

from mfcore.errors import UserInputError
from mfcore.flow import interpolate
from mfcore.model.branch import Branch, gaussian_flow
from mfcore.model.config import BranchConfig, ModelConfig
from mfcore.model.init import initialize

TRUE_STD = torch.tensor([0.05, 0.2, 1.0])


def audio_branch(*, learned_std: bool) -> Branch:
    config = BranchConfig(channels=3, data_std=0.2, learned_std=learned_std)
    model = ModelConfig(
        branches={"audio": config}, dim=32, layers=1, heads=2, text_dim=8, chunk_seconds=0.5, window_chunks=2
    )
    branch = Branch(model, config)
    initialize(branch, seed=0)
    return branch


def velocity(branch: Branch, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the velocity of one-latent clips at levels ``t``, with the correction of zero of a new head."""
    return branch.velocity(
        torch.zeros(len(noisy), 1, 32),
        final=torch.zeros(len(noisy), 1, 64),
        chunk_index=torch.zeros(1, dtype=torch.long),
        level_index=None,
        noisy=noisy,
        t=t,
        r=t,
        first_frame=None,
    )


def test_learned_spread_starts_at_data_std():
    noisy, t = torch.randn(4, 1, 3), torch.full((4, 1), 0.6)
    fixed = velocity(audio_branch(learned_std=False), noisy, t)
    torch.testing.assert_close(velocity(audio_branch(learned_std=True), noisy, t), fixed)


def test_learned_spread_finds_the_spread_of_each_channel():
    """Flow matching over Gaussian latents is lowest where the spread of every channel is the true one."""
    branch, draw = audio_branch(learned_std=True), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(branch.log_std.parameters(), lr=0.05)
    for _ in range(300):
        clean = torch.randn(512, 1, 3, generator=draw) * TRUE_STD
        noise, t = torch.randn(clean.shape, generator=draw), torch.rand(512, 1, generator=draw)
        loss = (velocity(branch, interpolate(clean, noise, t[..., None]), t) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = branch.data_std(torch.zeros(1, 1, 3))
    assert isinstance(learned, torch.Tensor)
    torch.testing.assert_close(learned.detach(), TRUE_STD, rtol=0.15, atol=0.0)


def test_gaussian_flow_of_a_spread_per_channel_equals_each_channel_alone():
    t, r = torch.tensor([[0.9]]), torch.tensor([[0.4]])
    together = gaussian_flow(t, r, TRUE_STD)
    for channel, std in enumerate(TRUE_STD.tolist()):
        for joint, alone in zip(together, gaussian_flow(t, r, std), strict=True):
            assert math.isclose(joint[0, channel].item(), alone.item(), rel_tol=1e-5)


def test_learned_spread_needs_data_std():
    with pytest.raises(UserInputError, match="data_std"):
        BranchConfig(channels=3, data_std=None, learned_std=True)
