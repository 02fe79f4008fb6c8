"""Bias on attention logits between branches: exact values, and equal results on every path."""

import pytest
import torch

from mfcore.ema import Ema, EmaConfig
from mfcore.model.attention import AttentionVisibility, attend_with_bias
from mfcore.model.init import initial_cross_bias
from mfcore.optim import OptimConfig, build_adamw
from mfcore.solver import DenoiserContext, constant_levels
from mfcore.types import AUDIO, VIDEO
from mfcore.weights import load_strict, merge_branches
from tests.helpers.tiny_model import batch, model_config, network


def velocities(model, data):
    """Return the velocities of all chunks on the history of the same clip."""
    t = constant_levels(data.streams, dict.fromkeys(data.streams, 0.6))
    return DenoiserContext(model=model, cond=data.cond).append_history(data.streams, None).velocity(data.streams, t, t)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_result_is_a_softmax_with_the_bias_added(groups, masked):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 8, generator=draw, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, 9, 8, generator=draw, dtype=torch.float64)
    bias = torch.randn(4, 6, generator=draw, dtype=torch.float64)
    factor = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 1.0], dtype=torch.float64)
    visible = AttentionVisibility(
        chunk=torch.arange(6) // 2,
        first=torch.zeros(9, dtype=torch.int64),
        last=torch.arange(9),
        track=torch.zeros(6, dtype=torch.int64),
        key_track=torch.zeros(9, dtype=torch.int64),
    )
    mask = visible.mask("sdpa", q.device) if masked else None
    got = attend_with_bias(q, k, v, mask, query_bias=bias, key_factor=factor)
    k, v = (part.repeat_interleave(4 // groups, dim=1) for part in (k, v))
    logits = q @ k.mT / 8**0.5 + bias[..., None] * factor
    if masked:
        logits = logits.masked_fill(~visible.dense(), -torch.inf)
    torch.testing.assert_close(got, logits.softmax(-1) @ v, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_each_direction_has_its_bias():
    """Bias only the logits of video queries to audio keys: video becomes independent of audio, audio does not."""
    model, data = network(cross_bias=-4.0), batch()
    for m, bias in ((VIDEO, -1000.0), (AUDIO, 0.0)):
        start = {n: w for n, w in initial_cross_bias(model, bias).items() if n.startswith(f"branches.{m}.")}
        model.load_state_dict(start, strict=False)
    plain = velocities(model, data)
    changed = dict(data.streams)
    changed[AUDIO] = changed[AUDIO].with_latents(changed[AUDIO].latents + 1)
    other = velocities(model, type(data)(streams=changed, cond=data.cond, samples=data.samples))
    torch.testing.assert_close(other[VIDEO], plain[VIDEO])
    changed = dict(data.streams)
    changed[VIDEO] = changed[VIDEO].with_latents(changed[VIDEO].latents + 1)
    other = velocities(model, type(data)(streams=changed, cond=data.cond, samples=data.samples))
    assert float((other[AUDIO] - plain[AUDIO]).abs().max()) > 1e-2


@torch.no_grad()
def test_a_joint_network_starts_close_to_its_parents():
    data = batch()
    parents = {m: network(m, seed=i) for i, m in enumerate((VIDEO, AUDIO))}
    weights = merge_branches({m: net.state_dict() for m, net in parents.items()})
    separate = network(coupled=False)
    load_strict(separate, weights, "parents")
    alone = velocities(separate, data)

    def distance(bias: float | None) -> float:
        joint = network(cross_bias=bias)
        load_strict(joint, initial_cross_bias(joint, bias or 0.0) | weights, "parents")
        found = velocities(joint, data)
        return max(float((found[m] - alone[m]).square().mean() / alone[m].square().mean()) for m in alone)

    assert distance(-40.0) < 1e-9
    assert 0 < distance(-4.0) < 0.02 * distance(None)


@torch.no_grad()
def test_a_bias_of_zero_leaves_the_network_unchanged():
    old, data = network(), batch()
    new = network(cross_bias=-4.0)
    load_strict(new, initial_cross_bias(new, 0.0) | old.state_dict(), "the old network")
    assert_close = torch.testing.assert_close
    for m, v in velocities(old, data).items():
        assert_close(velocities(new, data)[m], v, atol=1e-5, rtol=1e-5)


def test_uni_modal_and_uncoupled_networks_have_no_bias():
    for model in (network(VIDEO, cross_bias=-4.0), network(coupled=False, cross_bias=-4.0), network()):
        assert not initial_cross_bias(model, -4.0)
    with pytest.raises(ValueError, match="cross_bias"):
        model_config(VIDEO, AUDIO, cross_bias=float("nan"))


def test_every_head_and_direction_has_a_gradient_and_no_weight_decay():
    model, data = network(cross_bias=-4.0), batch(2, 3)
    sum(v.square().mean() for v in velocities(model, data).values()).backward()
    biases = {n: p for n, p in model.named_parameters() if ".cross_bias." in n}
    assert len(biases) == 4 and all(p.shape == (2,) for p in biases.values())
    assert all(bool((p.grad.abs() > 1e-9).all()) for p in biases.values() if p.grad is not None)
    assert all(p.grad is not None for p in biases.values())
    undecayed = {id(p) for p in build_adamw(model, OptimConfig()).param_groups[1]["params"]}
    assert all(id(p) in undecayed for p in biases.values())
    average = Ema(model, EmaConfig(decay=0.5))
    assert any(".cross_bias." in name for name, _ in average.weights())
