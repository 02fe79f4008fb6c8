"""Ranks that share the tokens of the same clips compute what one rank does: answers, gradients, roll-outs."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mfcore.model.sequence_parallel import SequenceGroup
from mfcore.objectives.losses import StepInfo, total_loss
from mfcore.objectives.mutual import MutualForcingObjective
from mfcore.solver import DenoiserContext, constant_levels
from tests.helpers.gloo_processes import run_on
from tests.helpers.mutual_objective import CONFIG, four
from tests.helpers.streaming import streamed
from tests.helpers.tiny_model import batch, network

CHANGES: list[dict[str, Any]] = [
    {},
    {"heads": 4, "kv_heads": 2},
    {"coupled": False, "window": 1},
    {"layout": "wan"},
]


def answers(changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Velocities of all chunks on a real history, a streamed clip, and gradients, averaged over the ranks."""
    net, data = network(**changes), batch(2, 3)  # 48 and 23 tokens: no even number for two ranks
    net.recompute = bool(changes)
    if dist.is_initialized():
        net.sequence = SequenceGroup(dist.group.WORLD)
    t = constant_levels(data.streams, dict.fromkeys(data.streams, 0.6))
    context = DenoiserContext(model=net, cond=data.cond).append_history(data.streams, torch.tensor([0.3, 0.0]))
    u = context.velocity(data.streams, t, {m: 0.5 * level for m, level in t.items()})
    sum(v.square().mean() for v in u.values()).backward()
    with torch.no_grad():
        clip = streamed(DenoiserContext(model=net, cond=data.cond), data, chunks=5)
    made = {f"u/{m}": v.detach() for m, v in u.items()} | {f"stream/{m}": s.latents for m, s in clip.items()}
    return made | averaged(net)


def averaged(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, p in net.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        if dist.is_initialized():
            dist.all_reduce(grad)
            grad = grad / dist.get_world_size()
        found[name] = grad
    return found


def mutual() -> dict[str, torch.Tensor]:
    """A step of the mutual stage: roll-outs, guidance, three networks."""
    nets = {name: network(layers=1, seed=i) for i, name in enumerate(("student", "ema", "fake"))}
    if dist.is_initialized():
        for net in nets.values():
            net.sequence = SequenceGroup(dist.group.WORLD)
    terms = MutualForcingObjective(CONFIG)(nets, four(), StepInfo(seed=0, step=0, stage_step=0))
    for own in terms.values():
        total_loss(own).backward()
    losses = {t.key: t.values.detach() for own in terms.values() for t in own}
    return losses | {f"{name}/{k}": v for name in ("student", "fake") for k, v in averaged(nets[name]).items()}


def usual() -> list[dict[str, torch.Tensor]]:
    return [answers({})]


def everything() -> list[dict[str, torch.Tensor]]:
    return [*(answers(changes) for changes in CHANGES), mutual()]


@pytest.mark.parametrize("what", [usual, pytest.param(everything, marks=pytest.mark.slow)])
def test_two_ranks_that_share_tokens_are_one(what):
    alone = what()
    for together in run_on(2, what):
        for one, other in zip(alone, together, strict=True):
            assert one.keys() == other.keys() and len(one) > 20
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


class _Three(SequenceGroup):
    def __init__(self) -> None:
        self.rank, self.size = 0, 3


def test_what_cannot_be_shared_is_named():
    assert _Three().counts(10) == [4, 3, 3] and _Three().spans(5)[1] == slice(2, 4)
    with pytest.raises(ValueError, match="2 tokens cannot be shared by 3 ranks: set engine.sequence to 2 or less"):
        _Three().counts(2)
