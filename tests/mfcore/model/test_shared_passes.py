"""Passes over the same chunks, after memory that is held, share what does not depend on noise levels."""

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
def asked(monkeypatch) -> list[bool]:
    """For every time that a layer reads the text anew: whether with gradient."""
    seen: list[bool] = []
    hear = TextAttention.project_text

    def counted(self, *args, **kwargs):
        seen.append(torch.is_grad_enabled())
        return hear(self, *args, **kwargs)

    monkeypatch.setattr(TextAttention, "project_text", counted)
    return seen


def after_two_chunks(recompute: bool = False) -> tuple[DenoiserContext, dict]:
    """Memory of two chunks and a start for the third."""
    net, data = network(seed=3), batch(2, 3, seed=4)
    net.recompute = recompute
    first = {m: s.chunks(0, 2) for m, s in data.streams.items()}
    start = next(noise_starts(TIMELINE, SHAPES, range(2, 3), seed=0, samples=torch.arange(2), like=data.cond.caption))
    return DenoiserContext(model=net, cond=data.cond).append_history(first, torch.tensor([0.0, 1.0])), start


@pytest.mark.parametrize("recompute", [False, True])
def test_steps_that_share_a_scene_are_those_that_do_not(recompute):
    context, start = after_two_chunks(recompute)
    apart = context.detach()
    data = apart.shared_passes()
    assert data.cache.passes.entries == {} and apart.cache.passes is None

    def made(after: DenoiserContext) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        now = start
        for j in range(4):
            t, r = (constant_levels(now, {m: line[i] for m, line in PLAN.items()}) for i in (j, j + 1))
            with torch.set_grad_enabled(j >= EXIT):
                now = solver_step(after, now, t, r, mode="few")
        out = [s.latents for s in now.values()]
        weights = list(context.model.parameters())
        return out, torch.autograd.grad(sum(x.square().sum() for x in out), weights, allow_unused=True)

    (ours, mine), (theirs, other) = made(data), made(apart)
    assert data.cache.passes.entries.keys() == {False, True} and apart.cache.passes is None
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [g is None for g in mine] == [g is None for g in other] and sum(g is not None for g in mine) > 50
    for a, b in zip(mine, other, strict=True):  # of what is shared gradients are added up in another order
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_text_is_read_once_without_and_once_with_gradient(asked):
    context, start = after_two_chunks()
    asked.clear()
    denoise(context, start, PLAN, exit_step=EXIT)
    layers = 2 * context.model.config.layers  # of two branches
    assert asked == [False] * layers + [True] * layers
    asked.clear()
    denoise(context, start, PLAN)
    assert asked == [False] * layers


@torch.no_grad()
def test_held_memory_that_is_asked_something_else_answers_that():
    """Another text, other chunks: what is kept is not theirs."""
    context, start = after_two_chunks()
    held = context.detach().shared_passes()
    later = {m: replace(s, times=s.times + 0.5, chunk=s.chunk + 1) for m, s in start.items()}
    t = constant_levels(start, {VIDEO: 0.5, AUDIO: 0.5})
    answers = []
    for cond, x in ((held.cond, start), (held.null_condition, start), (held.cond, later), (held.cond, start)):
        asked, apart = (replace(some, cond=cond).velocity(x, t, t) for some in (held, context))
        assert all(torch.equal(asked[m], apart[m]) for m in x)
        answers.append(asked[AUDIO])
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


def test_the_four_calls_of_a_base_rule_read_the_text_once(asked):
    """With guidance there are two branches, each with its own condition."""
    context, start = after_two_chunks()
    teacher = DenoiserContext(model=context.model, cond=context.cond, guidance=2.0).prefill()
    whole = torch.tensor([[0], [0]])
    at = dyadic_intervals(torch.tensor([2, 2]), whole * 0.6, {VIDEO: 1.0, AUDIO: 1.0})
    asked.clear()
    shortcut_target(teacher, start, at, torch.tensor([True, True]), base="two_midpoints")
    assert asked == [False] * 2 * 2 * context.model.config.layers


def test_held_memory_goes_with_those_who_hold_it():
    """Without the collector of cycles: keys and values are what fills a GPU."""
    context, start = after_two_chunks()
    held = context.detach().shared_passes()
    t = constant_levels(start, {VIDEO: 0.5, AUDIO: 0.5})
    u = held.velocity(start, t, t)
    assert held.cache.passes.entries
    gone, kept = weakref.ref(held.cache.past[0].k), weakref.ref(held.cache.passes.entries[True][0])
    gc.disable()
    try:
        del u, held
        assert gone() is None and kept() is None
    finally:
        gc.enable()


def test_layers_that_are_run_again_do_not_keep_what_steps_without_gradient_shared():
    """Else every chunk of a roll-out would hold its text until the backward pass."""
    context, start = after_two_chunks(recompute=True)
    scenes: list[weakref.ref] = []
    scene_of = context.model._build_pass

    def watched(*args, **kwargs):
        made = scene_of(*args, **kwargs)
        scenes.append(weakref.ref(made))
        return made

    context.model._build_pass = watched
    gc.disable()
    try:
        made, _ = denoise(context, start, PLAN, exit_step=EXIT)
        without, with_gradient = (scene() for scene in scenes)
        assert without is None and with_gradient is not None and with_gradient.text_keys is None
        assert all(s.latents.requires_grad for s in made.values())
    finally:
        gc.enable()


def test_memory_that_is_made_of_held_memory_is_not():
    context, start = after_two_chunks()
    memory = context.detach().shared_passes().cache
    assert isinstance(memory, LayeredKVCache) and memory.passes.entries == {}
    t = constant_levels(start, {VIDEO: 0.5, AUDIO: 0.5})
    with torch.no_grad():
        context.model(start, t, t, context.cond, cache=memory)
        assert memory.passes.entries.keys() == {False}
        rows = torch.tensor([1, 0])
        for other in (
            memory.rows(rows),
            memory.evict_before(4),
            memory.detach(),
            LayeredKVCache.stack([memory, memory]),
        ):
            assert other.passes is None
        assert memory.shared_passes().passes.entries == {}
