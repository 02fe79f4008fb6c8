"""Sequence parallelism gives the results of one rank: velocities, gradients, rollouts."""

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
    {"heads": 4, "kv_heads": 2, "cross_bias": -4.0},
]


def velocities_and_gradients(changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return velocities on real history, a streamed clip, and gradients averaged over ranks."""
    net, data = network(**changes), batch(2, 3)  # 48 and 23 tokens: uneven on two ranks
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
    return made | averaged_gradients(net)


def averaged_gradients(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, p in net.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        if dist.is_initialized():
            dist.all_reduce(grad)
            grad = grad / dist.get_world_size()
        found[name] = grad
    return found


def mutual_step() -> dict[str, torch.Tensor]:
    """Run a step of the mutual stage: rollouts, guidance, three networks."""
    nets = {name: network(layers=1, seed=i) for i, name in enumerate(("student", "ema", "fake"))}
    if dist.is_initialized():
        for net in nets.values():
            net.sequence = SequenceGroup(dist.group.WORLD)
    terms = MutualForcingObjective(CONFIG)(nets, four(), StepInfo(seed=0, step=0, stage_step=0))
    for own in terms.values():
        total_loss(own).backward()
    losses = {t.key: t.values.detach() for own in terms.values() for t in own}
    return losses | {
        f"{name}/{k}": v for name in ("student", "fake") for k, v in averaged_gradients(nets[name]).items()
    }


def basic_results() -> list[dict[str, torch.Tensor]]:
    return [velocities_and_gradients({})]


def all_results() -> list[dict[str, torch.Tensor]]:
    return [*(velocities_and_gradients(changes) for changes in CHANGES), mutual_step()]


@pytest.mark.parametrize("results", [basic_results, pytest.param(all_results, marks=pytest.mark.slow)])
def test_two_ranks_that_share_tokens_equal_one(results):
    single = results()
    for shared in run_on(2, results):
        for one, other in zip(single, shared, strict=True):
            assert one.keys() == other.keys() and len(one) > 20
            for name, value in one.items():
                difference = float((other[name] - value).abs().max())
                assert torch.allclose(other[name], value, atol=2e-5, rtol=2e-5), f"{name}: {difference}"


class _ThreeRanks(SequenceGroup):
    def __init__(self) -> None:
        self.rank, self.size = 0, 3


def test_fewer_tokens_than_ranks_are_rejected():
    assert _ThreeRanks().counts(10) == [4, 3, 3] and _ThreeRanks().spans(5)[1] == slice(2, 4)
    with pytest.raises(ValueError, match="2 tokens .* 3 ranks: set engine.sequence to 2"):
        _ThreeRanks().counts(2)
