"""Learning rates at the corners of their schedule, weight decay of linear layers only, merged branches."""

import pytest
import torch
from torch import nn

from mfcore.model.config import BranchConfig
from mfcore.optim import OptimConfig, build_adamw, learning_rate
from mfcore.weights import load_strict, merge_branches
from tests.helpers.tiny_model import network


def test_the_rate_rises_then_falls_along_a_half_cosine():
    config = OptimConfig(lr=1.0, warm_up=10, final=0.2)
    rates = [learning_rate(config, step, 110) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.6, 0.2])
    assert learning_rate(OptimConfig(lr=1.0, warm_up=0), 10**6, 10) == 1.0


def test_only_matrices_decay():
    net = nn.Linear(3, 3)
    nn.init.ones_(net.weight)
    nn.init.ones_(net.bias)
    optimizer = build_adamw(net, OptimConfig(lr=0.1, weight_decay=0.5))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(net.weight, torch.full((3, 3), 0.95))
    assert torch.equal(net.bias, torch.ones(3))


@pytest.mark.parametrize("layout", ["own", "wan"])
def test_only_weights_of_linear_layers_decay(layout):
    """Anchor, null tokens and tables of gates are vectors in rows: without gradient they must keep their value."""
    branches = {"video": BranchConfig(channels=6, size=(4, 4), patch=(2, 2), anchor=4)}
    net = network("video", layout=layout, dim=96, heads=4, branches=branches)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = build_adamw(net, OptimConfig(lr=0.1, weight_decay=0.5))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    linear = {f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert moved == linear
    assert {"branches.video.anchor.weight", "branches.video.blocks.0.table.weight"} <= before.keys() - moved


def test_a_coupled_network_merges_uni_modal_networks():
    video, audio, both = network("video", seed=1), network("audio", seed=2), network(seed=3)
    load_strict(both, merge_branches({"video": video.state_dict(), "audio": audio.state_dict()}), "test")
    for net in (video, audio):
        assert all(torch.equal(both.state_dict()[name], value) for name, value in net.state_dict().items())


def test_weights_that_do_not_fit_are_listed():
    with pytest.raises(ValueError, match=r"here is of another network: branches\.audio"):
        load_strict(network("video"), network().state_dict(), "here")
    with pytest.raises(ValueError, match="of another size"):
        load_strict(network(dim=16), network().state_dict(), "here")
