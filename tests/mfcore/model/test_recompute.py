"""Recomputing layers in the backward pass saves memory and changes no result."""

import torch

from mfcore.model.lora import FakeScoreConfig, LoRAModel
from mfcore.objectives.losses import StepInfo, total_loss
from mfcore.objectives.mutual import MutualForcingObjective
from mfcore.solver import DenoiserContext, constant_levels
from tests.helpers.mutual_objective import CONFIG, four
from tests.helpers.tiny_model import batch, network


def mutual_step(*, recompute: bool):
    """Return losses and gradients of a mutual step with all three networks."""
    student, average = network(layers=2), network(layers=2, seed=1)
    for net in (student, average):
        net.recompute = recompute
    fake = LoRAModel(average, FakeScoreConfig(rank=4), 0)
    models = {"student": student, "ema": average, "fake": fake}
    terms = MutualForcingObjective(CONFIG)(models, four(), StepInfo(seed=0, step=0, stage_step=0))
    for own in terms.values():
        total_loss(own).backward()
    grads = [p.grad for net in (student, fake) for p in net.parameters() if p.grad is not None]
    return [t.values.detach() for own in terms.values() for t in own], grads


def test_losses_and_gradients_are_bit_equal():
    for one, other in zip(mutual_step(recompute=False), mutual_step(recompute=True), strict=True):
        assert len(one) == len(other) > 0
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def saved_bytes(*, recompute: bool) -> int:
    """Return the bytes saved for the backward pass, without weights."""
    net, data = network(layers=4), batch(rows=2, chunks=3)
    net.recompute = recompute
    t = constant_levels(data.streams, dict.fromkeys(data.streams, 0.5))
    weights = {p.data_ptr() for p in net.parameters()}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in weights:
            saved[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = DenoiserContext(model=net, cond=data.cond).prefill().velocity(data.streams, t, t)
        assert all(v.requires_grad for v in out.values())
    return sum(saved.values())


def test_recomputation_saves_memory():
    assert saved_bytes(recompute=True) < 0.25 * saved_bytes(recompute=False)
