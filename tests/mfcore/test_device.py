"""Device placement, tested on the "meta" device, which computes shapes and does not mix with the CPU.

Weights, latents and conditions are on it; clocks and masks are on the CPU, as for a GPU.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfcore.flow import TimeConfig
from mfcore.metrics.history_use import mode_history_use
from mfcore.model.ring_cache import to_ring_cache
from mfcore.objectives import baselines
from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective
from mfcore.objectives.losses import StepInfo, total_loss
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.rollout import noise_starts, rollout
from mfcore.solver import DenoiserContext, constant_levels
from mfcore.types import AUDIO, VIDEO
from tests.helpers.streaming import MAX_TOKENS, SCHEDULE
from tests.helpers.tiny_model import SHAPES, TIMELINE, batch, network

ELSEWHERE = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Disable autocast, which the meta device lacks."""

    def disabled(*args, **kwargs):
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", disabled)


class Copies(TorchDispatchMode):
    """Counter of copies from the CPU to the other device, and of the blocking ones among them."""

    total = 0
    blocking = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and out.device == ELSEWHERE:
            self.total += 1
            self.blocking += not (kwargs or {}).get("non_blocking", False)
        return out


@pytest.mark.parametrize("changes", [{}, {"layout": "wan"}, {"coupled": False}, {"kv_heads": 1}], ids=str)
def test_training_mixes_no_devices(changes):
    net, data = network(**changes).to(ELSEWHERE), batch(2, 4).to(ELSEWHERE)
    t = constant_levels(data.streams, dict.fromkeys(data.streams, 0.5))
    u = DenoiserContext(model=net, cond=data.cond).append_history(data.streams, None).velocity(data.streams, t, t)
    assert {m: v.shape for m, v in u.items()} == {m: s.latents.shape for m, s in data.streams.items()}
    sum(v.square().sum() for v in u.values()).backward()
    assert net.branch(VIDEO).block(0).qkv.weight.grad.device == ELSEWHERE


@torch.no_grad()
def test_streaming_mixes_no_devices_and_never_synchronizes():
    """Reading a value is an error on this device; on a GPU it would synchronize."""
    net, data = network().to(ELSEWHERE), batch(2, 1).to(ELSEWHERE)
    context = (
        DenoiserContext(model=net, cond=data.cond).prefill().map_caches(lambda cache: to_ring_cache(cache, MAX_TOKENS))
    )
    starts = noise_starts(TIMELINE, SHAPES, range(8), seed=0, samples=torch.arange(2), like=data.cond.caption)
    made = [chunk.clean[VIDEO].latents for chunk in rollout(context, starts, SCHEDULE)]
    assert len(made) == 8 and all(x.device == ELSEWHERE for x in made)


TIME = TimeConfig(shift={VIDEO: 1.0, AUDIO: 1.0})
METHOD = MutualConfig(time=TIME, finest=2, strengths=(1,), rollout_steps=(2,), base="two_midpoints", guidance=1.1)
OBJECTIVES = {
    "flow_matching": FlowMatchingObjective(FlowMatchingConfig(time=TIME)),
    "mutual": baselines.mutual_forcing(METHOD),
    "jump": baselines.mutual_forcing(replace(METHOD, jump_exit=True)),
    "forced": baselines.hybrid_forced(METHOD),
    "literal": baselines.literal_mutual_forcing(METHOD),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_training_step_mixes_no_devices_and_never_synchronizes(name):
    """Sample numbers, clocks and masks stay on the CPU; derived tensors are copied without blocking."""
    models = {some: network(layers=1).to(ELSEWHERE) for some in ("student", "ema", "fake")}
    data = batch(4, 3).to(ELSEWHERE)
    with Copies() as copies:
        terms = OBJECTIVES[name](models, data, StepInfo(seed=0, step=0, stage_step=0))
    assert copies.total and not copies.blocking
    assert {"student"} < terms.keys() or name == "flow_matching"
    for net, own in terms.items():
        total_loss(own).backward()
        assert models[net].branch(VIDEO).block(0).qkv.weight.grad.device == ELSEWHERE


@pytest.mark.parametrize("mode", ["few", "multi"])
def test_history_use_mixes_no_devices(mode):
    """Expect an error only where the two results are read at the end."""
    net, data = network(layers=1).to(ELSEWHERE), batch(2, 3).to(ELSEWHERE)
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        mode_history_use(net, data, TIME, mode=mode, trust=0.7 if mode == "few" else None)
