"""The EMA follows its closed form in float32, and is a network that runs."""

import pytest
import torch
from torch import nn

from mfcore.ema import Ema, EmaConfig, ema_decay


def test_the_ema_is_the_weighted_sum_of_its_updates():
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(5.0)
    ema = Ema(net, EmaConfig(decay=0.9, warm_up=False))
    seen = [1.0, 2.0, 4.0]
    for step, value in enumerate(seen):
        ema.update([("weight", torch.tensor([[value]]))], step)
    expected = 0.9**3 * 5 + 0.1 * (0.81 * 1 + 0.9 * 2 + 4)
    assert float(ema.module(torch.ones(1, 1))) == pytest.approx(expected, rel=1e-6)


def test_small_steps_of_bfloat16_networks_are_not_lost():
    net = nn.Linear(1, 1, bias=False).bfloat16()
    net.weight.data.fill_(1.0)
    ema = Ema(net, EmaConfig(decay=0.999, warm_up=False))
    ema.update([("weight", torch.tensor([[1.01]]))], 0)
    assert float(ema.state_dict()["weight"]) == pytest.approx(1.00001, abs=1e-7)


def test_the_decay_warms_up():
    config = EmaConfig(decay=0.99)
    assert [ema_decay(config, s) for s in (0, 8, 10**6)] == [0.1, 0.5, 0.99]


def test_the_copy_is_frozen_independent_and_strict():
    net = nn.Linear(2, 2)
    ema = Ema(net, EmaConfig())
    assert not any(p.requires_grad for p in ema.module.parameters())
    before = ema.state_dict()["weight"].clone()
    net.weight.data += 1
    assert torch.equal(ema.state_dict()["weight"], before)
    with pytest.raises(ValueError, match="another network: bias"):
        ema.load_state_dict({"weight": before})
