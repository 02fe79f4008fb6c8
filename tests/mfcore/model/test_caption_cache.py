"""A stream computes the keys and values of its caption once, and never hears an old one."""

from dataclasses import replace

import pytest
import torch

from mfcore.model.caption_cache import TensorVersions
from mfcore.model.cuda_graphs import CUDAGraphModel
from mfcore.rollout import join_chunks, rollout
from mfcore.solver import DenoiserContext
from mfcore.types import AUDIO, VIDEO
from tests.helpers.op_recorder import warmed_tape
from tests.helpers.streaming import CHUNKS, PLAN, in_ring, starts, streamed
from tests.helpers.tiny_model import batch, network


def nothing_kept(monkeypatch) -> None:
    monkeypatch.setattr(TensorVersions, "is_current", lambda *_: False)


def assert_equal(one, other) -> None:
    assert all(torch.equal(one[m].latents, other[m].latents) for m in one)


def counted(model) -> dict[str, int]:
    """How often each branch asks its second block for the caption's keys, from now on."""
    calls = {VIDEO: 0, AUDIO: 0}
    for m in calls:
        layer = model.branch(m).block(1).text.caption
        layer.register_forward_hook(lambda *_, m=m: calls.update({m: calls[m] + 1}))
    return calls


@pytest.mark.parametrize("changes", [{}, {"layout": "wan"}, {"kv_heads": 1}], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_keeping_a_caption_changes_no_bit(changes, guidance, monkeypatch):
    model, data = network(**changes), batch()
    other = replace(data.cond, caption=-data.cond.caption, caption_mask=data.cond.caption_mask.roll(1, 0))
    conds = [data.cond] * 3 + [other] * 3 + [data.cond] * (CHUNKS - 6)
    context = DenoiserContext(model=model, cond=data.cond, guidance=guidance)
    kept = streamed(context, data, conds=conds)
    nothing_kept(monkeypatch)
    assert_equal(kept, streamed(context, data, conds=conds))


@torch.no_grad()
def test_a_caption_is_read_once_for_all_chunks_while_the_words_change():
    model, data = network(), batch()
    context = in_ring(DenoiserContext(model=model, cond=data.cond))
    calls = counted(model)
    conds = (replace(data.cond, words=data.cond.words * k) for k in range(CHUNKS))
    assert len(list(rollout(context, starts(data), PLAN, conds=conds))) == CHUNKS
    assert calls == {VIDEO: 1, AUDIO: 1}
    conds = [data.cond] * 2 + [replace(data.cond, caption=-data.cond.caption)] * 2
    list(rollout(in_ring(context.snapshot()), starts(data, CHUNKS, 4), PLAN, conds=conds))
    assert calls == {VIDEO: 3, AUDIO: 3}


@torch.no_grad()
def test_each_branch_of_guidance_reads_it_once():
    model, data = network(), batch()
    context = in_ring(DenoiserContext(model=model, cond=data.cond, guidance=2.0))
    calls = counted(model)
    list(rollout(context, starts(data), PLAN))
    assert calls == {VIDEO: 2, AUDIO: 2}


def change_caption(model, caption) -> None:
    caption.mul_(-1.0)


def change_weight(model, caption) -> None:
    model.branch(VIDEO).block(0).text.caption.weight.mul_(2.0)


def load_others(model, caption) -> None:
    model.load_state_dict(network(seed=5).state_dict())


def assign_others(model, caption) -> None:
    model.load_state_dict(network(seed=5).state_dict(), assign=True)


def change_embedding(model, caption) -> None:
    model.branch(AUDIO).text.caption.bias.add_(1.0)


def give_other_numbers(model, caption) -> None:
    """As ``Module.to`` does: the same tensor, with the same count of writes."""
    weight = model.branch(VIDEO).block(0).text.caption.weight
    weight.data = weight * 2.0


CHANGES = [change_caption, change_weight, load_others, assign_others, change_embedding, give_other_numbers]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_written_into_caption_or_weights_is_heard_by_the_next_chunk(change, monkeypatch):
    def changed_on_the_way():
        model, data = network(), batch()
        chunks = rollout(in_ring(DenoiserContext(model=model, cond=data.cond)), starts(data), PLAN)
        made = [next(chunks).clean for _ in range(4)]
        change(model, data.cond.caption)
        return join_chunks([*made, *(chunk.clean for chunk in chunks)])

    kept = changed_on_the_way()
    before = streamed(DenoiserContext(model=network(), cond=batch().cond), batch())
    late = before[VIDEO].chunk >= 4
    assert not torch.allclose(kept[VIDEO].latents[:, late], before[VIDEO].latents[:, late], atol=1e-2)
    nothing_kept(monkeypatch)
    assert_equal(kept, changed_on_the_way())


@torch.no_grad()
def test_a_change_of_precision_is_heard():
    model, data = network(), batch()
    calls = counted(model)
    chunks = rollout(in_ring(DenoiserContext(model=model, cond=data.cond)), starts(data), PLAN)
    next(chunks), next(chunks)
    already = dict(calls)
    with torch.autocast("cpu", torch.bfloat16):
        next(chunks), next(chunks)
    assert calls == {m: n + 1 for m, n in already.items()}


def test_in_inference_mode_nothing_is_taken_for_unchanged():
    """Torch does not count what is written into tensors made there."""
    model = network()
    with torch.inference_mode():
        data = batch()
        chunks = rollout(in_ring(DenoiserContext(model=model, cond=data.cond)), starts(data), PLAN)
        made = [next(chunks).clean for _ in range(3)]
        data.cond.caption.mul_(-1.0)
        made += [chunk.clean for chunk in chunks]
    before = streamed_before(model)
    late = before[VIDEO].chunk >= 3
    assert not torch.allclose(join_chunks(made)[VIDEO].latents[:, late], before[VIDEO].latents[:, late], atol=1e-2)


@torch.no_grad()
def streamed_before(model):
    return streamed(DenoiserContext(model=model, cond=batch().cond), batch())


@torch.no_grad()
def test_two_streams_of_one_network_hear_their_own():
    model, data = network(), batch()
    other = replace(data.cond, caption=-data.cond.caption)
    own = [DenoiserContext(model=model, cond=cond) for cond in (data.cond, other)]
    alone = [streamed(context, data) for context in own]
    turns = zip(*(rollout(in_ring(context), starts(data), PLAN) for context in own), strict=True)
    for made, expected in zip(zip(*turns, strict=True), alone, strict=True):
        assert_equal(join_chunks(chunk.clean for chunk in made), expected)


@torch.no_grad()
def test_recorded_passes_hear_a_new_caption():
    """Nothing but the caption changes, after every kind of chunk has been recorded."""
    model, data = network(window=2), batch()
    other = replace(data.cond, caption=-data.cond.caption)
    conds = [data.cond] * 8 + [other] * 8
    plain = streamed(DenoiserContext(model=model, cond=data.cond), data, conds=conds, chunks=16)
    graphed = CUDAGraphModel(model, warmed_tape)
    context = DenoiserContext(model=graphed, cond=data.cond)
    played = streamed(context, data, conds=conds, chunks=16)
    for m in plain:
        torch.testing.assert_close(played[m].latents, plain[m].latents, atol=1e-5, rtol=1e-5)
