"""Low-rank fake score: it starts as the EMA, follows it, and trains only its terms."""

import copy

import pytest
import torch

from mfcore.ema import Ema, EmaConfig
from mfcore.model.lora import FakeScoreConfig, LoRAModel
from mfcore.solver import DenoiserContext, constant_levels
from tests.helpers.tiny_model import batch, network

CONFIG = FakeScoreConfig(rank=4)


def velocity(model, data=None):
    data = data or batch(rows=2, chunks=2)
    t, r = (constant_levels(data.streams, dict.fromkeys(data.streams, level)) for level in (0.7, 0.2))
    trust = torch.tensor([0.3, 1.0])
    return DenoiserContext(model=model, cond=data.cond).append_history(data.streams, trust).velocity(data.streams, t, r)


def squares(velocities) -> torch.Tensor:
    return sum(((v - 1) ** 2).mean() for v in velocities.values())


@torch.no_grad()
def test_initial_fake_score_is_bit_equal_to_its_base():
    ema = Ema(network(), EmaConfig())
    expected = velocity(ema.module)
    fake = LoRAModel(ema.module, CONFIG, 0)
    assert all(torch.equal(v, expected[m]) for m, v in velocity(fake).items())
    assert all(torch.equal(v, expected[m]) for m, v in velocity(ema.module).items())


def test_gradient_reaches_only_the_low_rank_terms():
    ema = Ema(network(), EmaConfig())
    fake = LoRAModel(ema.module, CONFIG, 0)
    trained = {name for name, p in fake.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in fake.named_parameters() if ".down." in name or ".up." in name}
    squares(velocity(fake)).backward()
    assert all(p.grad is None for p in ema.module.parameters())
    for name, p in fake.named_parameters():
        if ".up." in name:
            assert float(p.grad.abs().max()) > 0, name
            p.data -= 0.1 * p.grad
    fake.zero_grad()
    squares(velocity(fake)).backward()
    assert all(float(p.grad.abs().max()) > 0 for name, p in fake.named_parameters() if p.requires_grad), name


def test_teacher_and_fake_score_share_one_graph_without_interference():
    """Call both before the backward pass; the output of the teacher must not change."""
    ema = Ema(network(), EmaConfig())
    fake = LoRAModel(ema.module, CONFIG, 0)
    with torch.no_grad():
        expected = velocity(ema.module)
        for name, p in fake.named_parameters():
            if ".up." in name:
                p += 0.1
    own = velocity(fake)
    taught = velocity(ema.module)
    squares(own).backward()
    assert all(torch.equal(v, expected[m]) for m, v in taught.items())
    assert not any(torch.allclose(own[m], v, rtol=1e-3) for m, v in expected.items())


@torch.no_grad()
def test_the_base_follows_the_ema():
    student = network()
    ema = Ema(student, EmaConfig(decay=0.5, warm_up=False))
    fake = LoRAModel(ema.module, CONFIG, 0)
    ema.update(((name, p + 1) for name, p in student.named_parameters()), 0)
    assert all(torch.equal(v, velocity(fake)[m]) for m, v in velocity(ema.module).items())
    stored = {p.data_ptr() for p in fake.base.parameters()}
    assert {p.data_ptr() for p in fake.adapted.parameters() if not p.requires_grad} == stored, "no second copy"


def test_initial_terms_depend_on_seed_and_name():
    base = network()
    one, same, other = (LoRAModel(copy.deepcopy(base), CONFIG, seed) for seed in (0, 0, 1))
    first = dict(one.named_parameters())
    assert all(torch.equal(p, first[name]) for name, p in same.named_parameters())
    drawn = [name for name in first if ".down." in name]
    assert not any(torch.equal(p, first[name]) for name, p in other.named_parameters() if name in drawn)
    assert len({first[name].flatten()[0].item() for name in drawn}) == len(drawn)


def test_invalid_rank_or_gain_is_rejected():
    with pytest.raises(ValueError, match="null for a full copy.*0"):
        FakeScoreConfig(rank=0)
    with pytest.raises(ValueError, match="fake.gain.*0"):
        FakeScoreConfig(rank=1, gain=0)
