"""A device other than the CPU, of which every machine has one: "meta" computes shapes alone, and does not mix with the
CPU. Weights, latents and conditions on it, clocks and masks on the CPU, as on a GPU."""

from contextlib import nullcontext

import pytest
import torch

from mfcore.model.ring import ring_of
from mfcore.rollout import noise_starts, rollout
from mfcore.steps import Context, levels
from mfcore.types import VIDEO
from tests.mfcore.test_streaming import MOST, PLAN
from tests.mfcore.tiny import SHAPES, TIMELINE, batch, network

ELSEWHERE = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Which this device does not have."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.parametrize("changes", [{}, {"layout": "wan"}, {"coupled": False}, {"kv_heads": 1}], ids=str)
def test_training_mixes_no_devices(changes):
    net, data = network(**changes).to(ELSEWHERE), batch(2, 4).to(ELSEWHERE)
    t = levels(data.streams, dict.fromkeys(data.streams, 0.5))
    u = Context(model=net, cond=data.cond).remember(data.streams, None).velocity(data.streams, t, t)
    assert {m: v.shape for m, v in u.items()} == {m: s.latents.shape for m, s in data.streams.items()}
    sum(v.square().sum() for v in u.values()).backward()
    assert net.branch(VIDEO).block(0).qkv.weight.grad.device == ELSEWHERE


@torch.no_grad()
def test_streaming_mixes_no_devices_and_never_asks_for_a_number():
    """A number would make the CPU wait; on this device asking for one is an error."""
    net, data = network().to(ELSEWHERE), batch(2, 1).to(ELSEWHERE)
    context = Context(model=net, cond=data.cond).opened().with_memories(lambda memory: ring_of(memory, MOST))
    starts = noise_starts(TIMELINE, SHAPES, range(8), 0, torch.arange(2), data.cond.caption)
    made = [chunk.clean[VIDEO].latents for chunk in rollout(context, starts, PLAN)]
    assert len(made) == 8 and all(x.device == ELSEWHERE for x in made)
