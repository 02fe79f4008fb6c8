"""A stream projects its caption once, and never uses an outdated one."""

from dataclasses import replace

import pytest
import torch

from mfcore.model.caption_cache import TensorVersions
from mfcore.model.cuda_graphs import CUDAGraphModel
from mfcore.rollout import join_chunks, rollout
from mfcore.solver import DenoiserContext
from mfcore.types import AUDIO, VIDEO
from tests.helpers.op_recorder import record_after_warm_up
from tests.helpers.streaming import CHUNKS, SCHEDULE, starts, streamed, with_ring_cache
from tests.helpers.tiny_model import batch, network


def disable_cache(monkeypatch) -> None:
    def never(self, other):
        return False

    monkeypatch.setattr(TensorVersions, "is_current", never)


def assert_equal(one, other) -> None:
    assert all(torch.equal(one[m].latents, other[m].latents) for m in one)


def count_projections(model) -> dict[str, int]:
    """Count from now on how often each branch projects the caption in its second block."""
    calls = {VIDEO: 0, AUDIO: 0}
    for m in calls:
        layer = model.branch(m).block(1).text.caption
        layer.register_forward_hook(lambda *_, m=m: calls.update({m: calls[m] + 1}))
    return calls


@pytest.mark.parametrize("changes", [{}, {"layout": "wan"}, {"kv_heads": 1}], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_a_cached_caption_gives_bit_equal_streams(changes, guidance, monkeypatch):
    model, data = network(**changes), batch()
    other = replace(data.cond, caption=-data.cond.caption, caption_mask=data.cond.caption_mask.roll(1, 0))
    conds = [data.cond] * 3 + [other] * 3 + [data.cond] * (CHUNKS - 6)
    context = DenoiserContext(model=model, cond=data.cond, guidance=guidance)
    kept = streamed(context, data, conds=conds)
    disable_cache(monkeypatch)
    assert_equal(kept, streamed(context, data, conds=conds))


@torch.no_grad()
def test_a_caption_is_projected_once_while_the_transcript_changes():
    model, data = network(), batch()
    context = with_ring_cache(DenoiserContext(model=model, cond=data.cond))
    calls = count_projections(model)
    conds = (replace(data.cond, words=data.cond.words * k) for k in range(CHUNKS))
    assert len(list(rollout(context, starts(data), SCHEDULE, conds=conds))) == CHUNKS
    assert calls == {VIDEO: 1, AUDIO: 1}
    conds = [data.cond] * 2 + [replace(data.cond, caption=-data.cond.caption)] * 2
    list(rollout(with_ring_cache(context.snapshot()), starts(data, CHUNKS, 4), SCHEDULE, conds=conds))
    assert calls == {VIDEO: 3, AUDIO: 3}


@torch.no_grad()
def test_each_branch_of_guidance_projects_its_caption_once():
    model, data = network(), batch()
    context = with_ring_cache(DenoiserContext(model=model, cond=data.cond, guidance=2.0))
    calls = count_projections(model)
    list(rollout(context, starts(data), SCHEDULE))
    assert calls == {VIDEO: 2, AUDIO: 2}


def change_caption(model, caption) -> None:
    caption.mul_(-1.0)


def change_weight(model, caption) -> None:
    model.branch(VIDEO).block(0).text.caption.weight.mul_(2.0)


def load_other_weights(model, caption) -> None:
    model.load_state_dict(network(seed=5).state_dict())


def assign_other_weights(model, caption) -> None:
    model.load_state_dict(network(seed=5).state_dict(), assign=True)


def change_embedding(model, caption) -> None:
    model.branch(AUDIO).text.caption.bias.add_(1.0)


def replace_data(model, caption) -> None:
    """Replace the data as ``Module.to`` does: same tensor, same version counter."""
    weight = model.branch(VIDEO).block(0).text.caption.weight
    weight.data = weight * 2.0


CHANGES = [
    change_caption,
    change_weight,
    load_other_weights,
    assign_other_weights,
    change_embedding,
    replace_data,
]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_of_caption_or_weights_reaches_the_next_chunk(change, monkeypatch):
    def stream_with_change():
        model, data = network(), batch()
        chunks = rollout(with_ring_cache(DenoiserContext(model=model, cond=data.cond)), starts(data), SCHEDULE)
        made = [next(chunks).clean for _ in range(4)]
        change(model, data.cond.caption)
        return join_chunks([*made, *(chunk.clean for chunk in chunks)])

    kept = stream_with_change()
    before = streamed(DenoiserContext(model=network(), cond=batch().cond), batch())
    late = before[VIDEO].chunk >= 4
    assert not torch.allclose(kept[VIDEO].latents[:, late], before[VIDEO].latents[:, late], atol=1e-2)
    disable_cache(monkeypatch)
    assert_equal(kept, stream_with_change())


@torch.no_grad()
def test_a_change_of_precision_projects_the_caption_again():
    model, data = network(), batch()
    calls = count_projections(model)
    chunks = rollout(with_ring_cache(DenoiserContext(model=model, cond=data.cond)), starts(data), SCHEDULE)
    next(chunks), next(chunks)
    before = dict(calls)
    with torch.autocast("cpu", torch.bfloat16):
        next(chunks), next(chunks)
    assert calls == {m: n + 1 for m, n in before.items()}


def test_inference_mode_disables_the_cache():
    """Tensors created there have no version counter."""
    model = network()
    with torch.inference_mode():
        data = batch()
        chunks = rollout(with_ring_cache(DenoiserContext(model=model, cond=data.cond)), starts(data), SCHEDULE)
        made = [next(chunks).clean for _ in range(3)]
        data.cond.caption.mul_(-1.0)
        made += [chunk.clean for chunk in chunks]
    before = streamed_unchanged(model)
    late = before[VIDEO].chunk >= 3
    assert not torch.allclose(join_chunks(made)[VIDEO].latents[:, late], before[VIDEO].latents[:, late], atol=1e-2)


@torch.no_grad()
def streamed_unchanged(model):
    return streamed(DenoiserContext(model=model, cond=batch().cond), batch())


@torch.no_grad()
def test_two_streams_of_one_network_use_their_own_captions():
    model, data = network(), batch()
    other = replace(data.cond, caption=-data.cond.caption)
    own = [DenoiserContext(model=model, cond=cond) for cond in (data.cond, other)]
    alone = [streamed(context, data) for context in own]
    interleaved = zip(*(rollout(with_ring_cache(context), starts(data), SCHEDULE) for context in own), strict=True)
    for made, expected in zip(zip(*interleaved, strict=True), alone, strict=True):
        assert_equal(join_chunks(chunk.clean for chunk in made), expected)


@torch.no_grad()
def test_recorded_passes_use_a_new_caption():
    """Change only the caption, after every kind of chunk has been recorded."""
    model, data = network(window=2), batch()
    other = replace(data.cond, caption=-data.cond.caption)
    conds = [data.cond] * 8 + [other] * 8
    plain = streamed(DenoiserContext(model=model, cond=data.cond), data, conds=conds, chunks=16)
    graphed = CUDAGraphModel(model, record_after_warm_up)
    context = DenoiserContext(model=graphed, cond=data.cond)
    played = streamed(context, data, conds=conds, chunks=16)
    for m in plain:
        torch.testing.assert_close(played[m].latents, plain[m].latents, atol=1e-5, rtol=1e-5)
