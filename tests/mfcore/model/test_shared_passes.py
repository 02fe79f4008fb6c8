"""Shared passes over the same chunks compute the data that is independent of noise levels once."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from mfcore.model.block import TextAttention
from mfcore.model.kv_cache import LayeredKVCache
from mfcore.objectives.shortcut import dyadic_intervals, shortcut_target
from mfcore.rollout import noise_starts
from mfcore.solver import DenoiserContext, constant_levels, denoise, schedule, solver_step
from mfcore.types import AUDIO, VIDEO
from tests.helpers.tiny_model import SHAPES, TIMELINE, batch, network

PLAN = schedule(4, {VIDEO: 1.0, AUDIO: 1.0})
EXIT = 2


@pytest.fixture
def projections(monkeypatch) -> list[bool]:
    """Record for every text projection of a layer if gradients are enabled."""
    recorded: list[bool] = []
    project_text = TextAttention.project_text

    def counted(self, *args, **kwargs):
        recorded.append(torch.is_grad_enabled())
        return project_text(self, *args, **kwargs)

    monkeypatch.setattr(TextAttention, "project_text", counted)
    return recorded


def after_two_chunks(recompute: bool = False) -> tuple[DenoiserContext, dict]:
    """Return a context with two cached chunks, and a start for the third."""
    net, data = network(seed=3), batch(2, 3, seed=4)
    net.recompute = recompute
    first = {m: s.chunks(0, 2) for m, s in data.streams.items()}
    start = next(noise_starts(TIMELINE, SHAPES, range(2, 3), seed=0, samples=torch.arange(2), like=data.cond.caption))
    return DenoiserContext(model=net, cond=data.cond).append_history(first, torch.tensor([0.0, 1.0])), start


@pytest.mark.parametrize("recompute", [False, True])
def test_shared_passes_equal_separate_passes(recompute):
    context, start = after_two_chunks(recompute)
    separate = context.detach()
    data = separate.shared_passes()
    assert data.cache.passes.entries == {} and separate.cache.passes is None

    def made(after: DenoiserContext) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        now = start
        for j in range(4):
            t, r = (constant_levels(now, {m: line[i] for m, line in PLAN.items()}) for i in (j, j + 1))
            with torch.set_grad_enabled(j >= EXIT):
                now = solver_step(after, now, t, r, mode="few")
        out = [s.latents for s in now.values()]
        weights = list(context.model.parameters())
        return out, torch.autograd.grad(sum(x.square().sum() for x in out), weights, allow_unused=True)

    (ours, mine), (theirs, other) = made(data), made(separate)
    assert data.cache.passes.entries.keys() == {False, True} and separate.cache.passes is None
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [g is None for g in mine] == [g is None for g in other] and sum(g is not None for g in mine) > 50
    for a, b in zip(mine, other, strict=True):  # shared gradients are summed in another order
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_text_is_projected_once_without_and_once_with_gradient(projections):
    context, start = after_two_chunks()
    projections.clear()
    denoise(context, start, PLAN, exit_step=EXIT)
    layers = 2 * context.model.config.layers  # of two branches
    assert projections == [False] * layers + [True] * layers
    projections.clear()
    denoise(context, start, PLAN)
    assert projections == [False] * layers


@torch.no_grad()
def test_shared_passes_are_not_used_for_other_conditions_or_chunks():
    """Alternate between two texts and two chunks."""
    context, start = after_two_chunks()
    shared_context = context.detach().shared_passes()
    later = {m: replace(s, times=s.times + 0.5, chunk=s.chunk + 1) for m, s in start.items()}
    t = constant_levels(start, {VIDEO: 0.5, AUDIO: 0.5})
    outputs = []
    for cond, x in (
        (shared_context.cond, start),
        (shared_context.null_condition, start),
        (shared_context.cond, later),
        (shared_context.cond, start),
    ):
        shared, separate = (replace(some, cond=cond).velocity(x, t, t) for some in (shared_context, context))
        assert all(torch.equal(shared[m], separate[m]) for m in x)
        outputs.append(shared[AUDIO])
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_the_four_calls_of_a_base_rule_project_the_text_once(projections):
    """Use guidance: two branches, each with its own condition."""
    context, start = after_two_chunks()
    teacher = DenoiserContext(model=context.model, cond=context.cond, guidance=2.0).prefill()
    whole = torch.tensor([[0], [0]])
    at = dyadic_intervals(torch.tensor([2, 2]), whole * 0.6, {VIDEO: 1.0, AUDIO: 1.0})
    projections.clear()
    shortcut_target(teacher, start, at, torch.tensor([True, True]), base="two_midpoints")
    assert projections == [False] * 2 * 2 * context.model.config.layers


def test_a_shared_cache_is_freed_without_the_garbage_collector():
    """Keys and values fill most of the GPU, so no cycle may keep them alive."""
    context, start = after_two_chunks()
    shared_context = context.detach().shared_passes()
    t = constant_levels(start, {VIDEO: 0.5, AUDIO: 0.5})
    u = shared_context.velocity(start, t, t)
    assert shared_context.cache.passes.entries
    gone, kept = weakref.ref(shared_context.cache.past[0].k), weakref.ref(shared_context.cache.passes.entries[True][0])
    gc.disable()
    try:
        del u, shared_context
        assert gone() is None and kept() is None
    finally:
        gc.enable()


def test_recomputed_layers_do_not_keep_shared_text(monkeypatch):
    """Without this, every chunk of a rollout would keep its text until the backward pass."""
    context, start = after_two_chunks(recompute=True)
    passes: list[weakref.ref] = []
    build_pass = context.model._build_pass

    def recorded(*args, **kwargs):
        prepared = build_pass(*args, **kwargs)
        passes.append(weakref.ref(prepared))
        return prepared

    monkeypatch.setattr(context.model, "_build_pass", recorded)
    gc.disable()
    try:
        made, _ = denoise(context, start, PLAN, exit_step=EXIT)
        without, with_gradient = (prepared() for prepared in passes)
        assert without is None and with_gradient is not None and with_gradient.text_keys is None
        assert all(s.latents.requires_grad for s in made.values())
    finally:
        gc.enable()


def test_derived_caches_have_no_shared_passes():
    context, start = after_two_chunks()
    cache = context.detach().shared_passes().cache
    assert isinstance(cache, LayeredKVCache) and cache.passes.entries == {}
    t = constant_levels(start, {VIDEO: 0.5, AUDIO: 0.5})
    with torch.no_grad():
        context.model(start, t, t, context.cond, cache=cache)
        assert cache.passes.entries.keys() == {False}
        rows = torch.tensor([1, 0])
        for other in (
            cache.rows(rows),
            cache.evict_before(4),
            cache.detach(),
            LayeredKVCache.stack([cache, cache]),
        ):
            assert other.passes is None
        assert cache.shared_passes().passes.entries == {}
