"""The network: causality, cached = parallel, branches, gates (TRUTHS, exact properties 6 and 7)."""

from dataclasses import replace

import pytest
import torch

from mfcore.flow import noise_streams
from mfcore.model.rope import rotate, rotation, rotation_angles
from mfcore.model.transformer import build_model
from mfcore.rollout import coupled_starts, join_chunks, noise_starts, rollout
from mfcore.solver import DenoiserContext, constant_levels, history_of, schedule
from mfcore.types import AUDIO, VIDEO, AVBatch, Streams
from tests.helpers.tiny_model import SHAPES, TIMELINE, batch, model_config, network

SHIFT = {VIDEO: 1.0, AUDIO: 1.0}


def parallel(model, data: AVBatch, noisy: Streams, *, t: float, r: float, trust=None) -> dict[str, torch.Tensor]:
    context = DenoiserContext(model=model, cond=data.cond).append_history(data.streams, trust)
    return context.velocity(
        noisy, constant_levels(noisy, dict.fromkeys(noisy, t)), constant_levels(noisy, dict.fromkeys(noisy, r))
    )


def noisy_version(data: AVBatch, t: float, seed: int = 9) -> Streams:
    draw = torch.Generator().manual_seed(seed)
    eps = {m: torch.randn(s.latents.shape, generator=draw) for m, s in data.streams.items()}
    x = noise_streams(data.streams, eps, constant_levels(data.streams, dict.fromkeys(data.streams, t)))
    return {m: s.with_latents(x[m]) for m, s in data.streams.items()}


@torch.no_grad()
def test_a_chunk_never_sees_the_future():
    model, data = network(), batch()
    noisy = noisy_version(data, 0.6)
    before = parallel(model, data, noisy, t=0.6, r=0.3)
    for changed in (VIDEO, AUDIO):
        later = {m: s.chunk >= 2 for m, s in data.streams.items()}
        history = dict(data.streams)
        latents = history[changed].latents.clone()
        latents[:, later[changed]] += 1
        history[changed] = history[changed].with_latents(latents)
        x = dict(noisy)
        latents = x[changed].latents.clone()
        latents[:, later[changed]] -= 1
        x[changed] = x[changed].with_latents(latents)
        after = parallel(model, AVBatch(streams=history, cond=data.cond, samples=data.samples), x, t=0.6, r=0.3)
        for m in before:
            assert torch.equal(before[m][:, ~later[m]], after[m][:, ~later[m]])
            assert not torch.equal(before[m][:, later[m]], after[m][:, later[m]])


@torch.no_grad()
def test_parallel_pass_equals_chunk_by_chunk_with_the_cache():
    model, data = network(window=2), batch(chunks=6)
    noisy, trust = noisy_version(data, 0.7), torch.tensor([0.2, 0.0])
    whole = parallel(model, data, noisy, t=0.7, r=0.2, trust=trust)
    context = DenoiserContext(model=model, cond=data.cond).prefill()
    for k in range(6):
        x = {m: s.chunks(k, k + 1) for m, s in noisy.items()}
        u = context.velocity(x, constant_levels(x, dict.fromkeys(x, 0.7)), constant_levels(x, dict.fromkeys(x, 0.2)))
        for m, s in noisy.items():
            torch.testing.assert_close(u[m], whole[m][:, s.chunk == k], atol=1e-5, rtol=1e-5)
        clean = {m: s.chunks(k, k + 1) for m, s in data.streams.items()}
        context = context.append_history(clean, trust).evict_before(k + 1)


@torch.no_grad()
def test_only_history_inside_the_window_has_an_effect():
    model, data = network(window=1, layers=1), batch(chunks=4)
    noisy = noisy_version(data, 0.5)
    before = parallel(model, data, noisy, t=0.5, r=0.5)
    latents = data.streams[VIDEO].latents.clone()
    first = data.streams[VIDEO].chunk == 0
    latents[:, first] += 1
    history = dict(data.streams) | {VIDEO: data.streams[VIDEO].with_latents(latents)}
    after = parallel(model, AVBatch(streams=history, cond=data.cond, samples=data.samples), noisy, t=0.5, r=0.5)
    chunk = data.streams[AUDIO].chunk
    assert not torch.equal(before[AUDIO][:, chunk == 1], after[AUDIO][:, chunk == 1])
    assert torch.equal(before[AUDIO][:, chunk >= 2], after[AUDIO][:, chunk >= 2])


@torch.no_grad()
def test_cache_size_stays_constant_while_streaming():
    model, data = network(window=2), batch(chunks=1)
    starts = noise_starts(TIMELINE, SHAPES, range(12), seed=0, samples=data.samples, like=data.cond.caption)
    chunks = rollout(DenoiserContext(model=model, cond=data.cond), starts, schedule(1, SHIFT))
    sizes = [len(chunk.context.cache.past_positions) for chunk in chunks]
    assert max(sizes[2:]) - min(sizes[2:]) <= 1  # counts of audio latents differ by one between chunks


@torch.no_grad()
def test_interval_embedding_has_no_effect_on_the_multi_step_mode():
    model, data = network(), batch()
    noisy = noisy_version(data, 0.6)
    multi, few = parallel(model, data, noisy, t=0.6, r=0.6), parallel(model, data, noisy, t=0.6, r=0.1)
    for branch in model.branches.values():
        for p in branch.levels.interval.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    again, few_again = parallel(model, data, noisy, t=0.6, r=0.6), parallel(model, data, noisy, t=0.6, r=0.1)
    for m in multi:
        assert torch.equal(multi[m], again[m])
        assert not torch.equal(few[m], few_again[m])


@torch.no_grad()
def test_uncoupled_joint_network_equals_two_uni_modal_networks():
    joint, data = network(coupled=False), batch()
    noisy = noisy_version(data, 0.6)
    together = parallel(joint, data, noisy, t=0.6, r=0.2)
    for m in (VIDEO, AUDIO):
        alone = network(m)
        own = {k: v for k, v in joint.state_dict().items() if k.startswith(f"branches.{m}.")}
        alone.load_state_dict(own, strict=True)
        single = AVBatch(streams={m: data.streams[m]}, cond=data.cond, samples=data.samples)
        u = parallel(alone, single, {m: noisy[m]}, t=0.6, r=0.2)
        torch.testing.assert_close(u[m], together[m], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_coupling_carries_information_both_ways():
    model, data = network(), batch()
    noisy = noisy_version(data, 0.6)
    before = parallel(model, data, noisy, t=0.6, r=0.2)
    for changed, other in ((VIDEO, AUDIO), (AUDIO, VIDEO)):
        x = dict(noisy) | {changed: noisy[changed].with_latents(noisy[changed].latents + 1)}
        assert not torch.equal(parallel(model, data, x, t=0.6, r=0.2)[other], before[other])


@torch.no_grad()
def test_conditions_have_an_effect_and_trust_zero_has_none():
    model, data = network(), batch()
    noisy = noisy_version(data, 0.6)
    base = parallel(model, data, noisy, t=0.6, r=0.2)
    for drop in ("caption", "words"):
        flags = {"caption": torch.zeros(2, dtype=torch.bool), "words": torch.zeros(2, dtype=torch.bool)}
        flags[drop][0] = True
        changed = AVBatch(streams=data.streams, cond=data.cond.drop(**flags), samples=data.samples)
        u = parallel(model, changed, noisy, t=0.6, r=0.2)
        assert not torch.allclose(u[VIDEO][0], base[VIDEO][0]) and torch.equal(u[VIDEO][1], base[VIDEO][1])
    labeled = parallel(model, data, noisy, t=0.6, r=0.2, trust=torch.tensor([0.3, 0.0]))
    assert not torch.allclose(labeled[VIDEO][0], base[VIDEO][0])
    assert torch.equal(labeled[VIDEO][1], base[VIDEO][1])


@torch.no_grad()
def test_velocities_at_hour_three_equal_those_at_time_zero():
    model, data = network(), batch(chunks=3)
    noisy = noisy_version(data, 0.6)
    base = parallel(model, data, noisy, t=0.6, r=0.2)
    # 3 h is a whole number of chunks (0.5 s) and of audio latents (64 ms), so counts per chunk are the same
    hours = 10800.0
    moved = {
        m: type(s)(latents=s.latents, times=s.times + hours, chunk=s.chunk + 21600) for m, s in data.streams.items()
    }
    cond = type(data.cond)(**(vars(data.cond) | {"word_times": data.cond.word_times + hours}))
    later = {m: type(s)(latents=s.latents, times=s.times + hours, chunk=s.chunk + 21600) for m, s in noisy.items()}
    u = parallel(model, AVBatch(streams=moved, cond=cond, samples=data.samples), later, t=0.6, r=0.2)
    for m in base:
        torch.testing.assert_close(u[m], base[m], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_steps_from_the_exit_state_give_the_rollout():
    model, data = network(), batch(chunks=4)
    context = DenoiserContext(model=model, cond=data.cond)
    plan = schedule(4, SHIFT)
    starts = noise_starts(TIMELINE, SHAPES, range(4), seed=0, samples=data.samples, like=data.cond.caption)
    chunks = list(rollout(context, starts, plan, exit_step=2))
    history = join_chunks(c.clean for c in chunks)
    exit_state = join_chunks(c.exit_state for c in chunks)
    again = context.append_history(history, None)
    x = dict(exit_state)
    for j in (2, 3):
        t, r = (constant_levels(x, {m: plan[m][i] for m in x}) for i in (j, j + 1))
        u = again.velocity(x, t, r)
        x = {m: s.with_latents(s.latents - (plan[m][j] - plan[m][j + 1]) * u[m]) for m, s in x.items()}
    for m in x:
        torch.testing.assert_close(x[m].latents, history[m].latents, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_coupled_start_of_strength_zero_is_the_clip():
    data = batch(chunks=4)
    eps = {m: torch.zeros_like(s.latents) for m, s in data.streams.items()}
    near = join_chunks(coupled_starts(data.streams, eps, dict.fromkeys(data.streams, torch.tensor(0.0)), 4))
    for m, s in data.streams.items():
        assert torch.equal(near[m].latents, s.latents)


@torch.no_grad()
def test_guidance_uses_a_separate_history_for_the_null_branch():
    model, data = network(), batch()
    noisy = noisy_version(data, 0.6)
    t = constant_levels(noisy, dict.fromkeys(noisy, 0.6))
    plain = DenoiserContext(model=model, cond=data.cond).append_history(data.streams, None).velocity(noisy, t, t)
    null = (
        DenoiserContext(model=model, cond=data.cond.unconditional())
        .append_history(data.streams, None)
        .velocity(noisy, t, t)
    )
    guided = (
        DenoiserContext(model=model, cond=data.cond, guidance=3.0)
        .append_history(data.streams, None)
        .velocity(noisy, t, t)
    )
    for m in plain:
        torch.testing.assert_close(guided[m], null[m] + 3 * (plain[m] - null[m]), atol=1e-5, rtol=1e-5)


def test_rows_do_not_mix():
    model, data = network(), batch(rows=3)
    noisy = noisy_version(data, 0.6)
    whole = parallel(model, data, noisy, t=0.6, r=0.2)
    one = slice(1, 2)
    alone = parallel(model, data.rows(one), {m: s.rows(one) for m, s in noisy.items()}, t=0.6, r=0.2)
    for m in whole:
        torch.testing.assert_close(whole[m][one], alone[m], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_words_out_of_reach_are_not_embedded(monkeypatch):
    """Use a transcript of a minute; the velocities must not change."""
    model, data = network(), batch()
    count, near = 200, data.cond.words.shape[1]
    draw = torch.Generator().manual_seed(3)
    starts = torch.cat([data.cond.word_times[..., 0], 60 + torch.arange(count - near).expand(2, -1) * 0.3], dim=1)
    cond = replace(
        data.cond,
        words=torch.cat([data.cond.words, torch.randn(2, count - near, 8, generator=draw)], dim=1),
        words_mask=torch.ones(2, count, dtype=torch.bool),
        word_times=torch.stack([starts, starts + 0.2], dim=-1),
    )
    long, short = replace(data, cond=cond), data
    noisy = noisy_version(data, 0.6)
    embedded: list[int] = []
    for branch in model.branches.values():
        branch.text.words.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0].shape[1]))
    trimmed, alone = (parallel(model, some, noisy, t=0.6, r=0.3) for some in (long, short))
    assert max(embedded) <= near
    monkeypatch.setattr("mfcore.model.branch.FEW_WORDS", count)
    whole = parallel(model, long, noisy, t=0.6, r=0.3)
    assert max(embedded) == count
    for m in (VIDEO, AUDIO):
        torch.testing.assert_close(trimmed[m], whole[m], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(trimmed[m], alone[m], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_phases_are_the_position_of_a_latent_in_its_chunk():
    """Compare with fractions in [0, 1). Initial phase weights are zero."""
    model, data = network(), batch(chunks=3)
    for m, s in data.streams.items():
        branch = model.branch(m)
        phases = branch.phases(branch.positions(s, 0), torch.zeros(0))
        share = torch.atan2(phases[:, 4], phases[:, 0]).remainder(2 * torch.pi) / (2 * torch.pi)
        start = (s.times - 0.5 * s.chunk) / 0.5
        torch.testing.assert_close(share.double(), start.repeat_interleave(branch.config.tokens), atol=1e-5, rtol=0)
    assert not any(p.any() for n, p in build_model(model.config, 0).named_parameters() if "phase" in n)


@torch.no_grad()
def test_phases_distinguish_latents_of_a_chunk():
    """Use equal latents without text and rotation: only phases can make first and last differ."""
    data = batch(rows=1, chunks=1)
    silent = data.cond.drop(caption=torch.ones(1, dtype=torch.bool), words=torch.ones(1, dtype=torch.bool))
    alike = {m: s.with_latents(torch.ones_like(s.latents)) for m, s in data.streams.items()}
    at = constant_levels(alike, dict.fromkeys(alike, 0.5))
    for known in (True, False):
        model = network(rope_seconds_scale=1e-9, chunk_phase=known)
        v = (
            DenoiserContext(model=model, cond=silent)
            .append_history(history_of(alike), None)
            .velocity(alike, at, at)[VIDEO]
        )
        assert (float((v[:, 0] - v[:, -1]).abs().max()) > 1e-3) is known


@torch.no_grad()
def test_attention_starts_local():
    """Initial logits fall with distance in time; without the offset they do not."""
    seconds = torch.arange(4, dtype=torch.float64) / 16
    for local in (True, False):
        config = model_config(VIDEO, local_start=local)
        block = build_model(config, 0).branch(VIDEO).block(0)
        x = torch.randn(512, 4, config.dim, generator=torch.Generator().manual_seed(0))
        q, k = (block.norm_q, block.norm_k)
        heads = x.unflatten(-1, (config.heads, -1))
        by = rotation(rotation_angles(seconds, torch.zeros(4), torch.zeros(4), config)[:, None], x)
        query, key = rotate(q(heads.roll(1, 0)), by), rotate(k(heads), by)
        near = [float((query[:, 0] * key[:, i]).sum(-1).mean()) for i in range(4)]
        if local:
            assert near == sorted(near, reverse=True) and near[0] - near[3] > 1.5
        else:
            assert max(map(abs, near)) < 1


def test_the_wan_layout_rejects_a_local_start():
    with pytest.raises(ValueError, match="local_start"):
        model_config(VIDEO, layout="wan", local_start=True)
