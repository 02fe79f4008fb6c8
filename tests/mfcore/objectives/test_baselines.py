"""Baselines: parts of the full method with other settings."""

from dataclasses import replace

import pytest
import torch

from mfcore.objectives import baselines
from mfcore.objectives.histories import draw_step, write_histories
from mfcore.solver import DenoiserContext, constant_levels, history_of, solver_step
from mfcore.types import AUDIO, VIDEO, AVBatch
from tests.helpers.gradients import assert_same_gradient
from tests.helpers.mutual_objective import CONFIG, Watched, at_step, found, four, rows_of, trio

LATE = 50


def terms_of(objective, models=None, data: AVBatch | None = None):
    return objective(models or trio(), data or four(), at_step(LATE))


def changed(data: AVBatch, chunk: int) -> AVBatch:
    """Return the clips with other latents in one chunk."""
    streams = {
        m: s.with_latents(
            torch.where((s.chunk == chunk).reshape(-1, *(1,) * (s.latents.ndim - 2)), -s.latents, s.latents)
        )
        for m, s in data.streams.items()
    }
    return replace(data, streams=streams)


@pytest.mark.parametrize(
    ("objective", "student", "fake"),
    [
        (baselines.teacher_forcing, {"flow_matching": 4}, False),
        (baselines.shortcut_forced, {"flow_matching": 4, "shortcut": 4}, False),
        (baselines.dmd_forced, {"flow_matching": 4, "dmd": 4}, True),
        (baselines.dmd_self_forcing, {"dmd": 4}, True),
        (baselines.hybrid_forced, {"flow_matching": 4, "shortcut": 4, "dmd": 4}, True),
        (baselines.shortcut_only, {"flow_matching": 2, "shortcut": 4}, False),
        (baselines.dmd_only, {"flow_matching": 2, "dmd": 2}, True),
        (baselines.literal_mutual_forcing, {"flow_matching": 2, "shortcut": 4, "dmd": 2}, True),
        (baselines.mutual_forcing, {"flow_matching": 2, "shortcut": 4, "dmd": 2}, True),
    ],
)
def test_baselines_have_the_expected_terms_and_rows(objective, student, fake):
    terms = terms_of(objective(CONFIG))
    assert found(terms["student"]) == student
    assert ("fake" in terms) is fake


def test_forced_rows_score_single_chunks_after_real_history():
    """DMD of chunk k depends on the clip before k, not on later chunks or on other samples."""
    objective, models = baselines.dmd_forced(CONFIG), trio()
    first, last = (rows_of(terms_of(objective, models, d)["student"]) for d in (four(), changed(four(), 2)))
    for m in (VIDEO, AUDIO):
        assert torch.equal(first[f"dmd/{m}"], last[f"dmd/{m}"])
        early = rows_of(terms_of(objective, models, changed(four(), 0))["student"])[f"dmd/{m}"]
        assert torch.allclose(early[:, 0], first[f"dmd/{m}"][:, 0], atol=1e-6)
        assert not torch.allclose(early[:, 1:], first[f"dmd/{m}"][:, 1:], atol=1e-4)


def test_all_networks_of_a_forced_row_use_unlabeled_real_history():
    watched = {name: Watched(model) for name, model in trio().items()}
    terms_of(baselines.hybrid_forced(CONFIG), watched)
    clip = four().streams[VIDEO].chunks(0, 2).latents
    for network in watched.values():
        assert network.history
        for seen, label in network.history:
            assert torch.equal(seen, clip)
            assert label is None or not label.any()


def test_self_forcing_does_not_depend_on_the_clip():
    models = trio()
    one, other = (
        rows_of(terms_of(baselines.dmd_self_forcing(CONFIG), models, d)["student"])
        for d in (four(), changed(four(), 1))
    )
    assert all(torch.equal(other[key], values) for key, values in one.items())


def test_the_gradient_of_a_forced_sample_starts_at_the_exit_step():
    """As in a rollout: the gradient is that of the calls from the exit state on, with history as data."""
    net, data = trio()["student"], four()
    info = at_step(LATE)
    config = replace(CONFIG, rows=("forced",), finest_rows=(True,), rollout_steps=(4,))
    draws = replace(draw_step(config, data.streams, info), exit_step=2)
    own = write_histories(config, net, data, draws=draws, info=info, samples="distilled").samples
    assert own is not None and own.exit_state is not None
    assert not any(s.latents.requires_grad for s in own.exit_state.values())
    history = (
        DenoiserContext(model=net, cond=data.cond).prefill().append_history(history_of(data.streams), None).detach()
    )
    again = own.exit_state
    for j in (2, 3):
        t = constant_levels(again, {m: levels[j] for m, levels in draws.plan.items()})
        r = constant_levels(again, {m: levels[j + 1] for m, levels in draws.plan.items()})
        again = solver_step(history, again, t, r, mode="few")
    assert_same_gradient(own.streams, again, net)


@pytest.mark.parametrize("baseline", [baselines.dmd_self_forcing, baselines.dmd_forced])
def test_dmd_trains_the_student_only(baseline):
    models = trio()
    terms = terms_of(baseline(replace(CONFIG, rollout_steps=(2,))), models)
    next(t.values for t in terms["student"] if t.name == "dmd").mean().backward()
    assert models["student"].branches[VIDEO].head.weight.grad.abs().max() > 0
    assert all(p.grad is None for name in ("ema", "fake") for p in models[name].parameters())


def test_a_baseline_changes_only_its_named_settings():
    """Including weights and phases. Rows c and d start DMD after the first steps of the fake score."""
    whole = replace(CONFIG, shortcut_weight=2.0, dmd_weight=2.0, real_until=4, free_from=5, fake_from=5, dmd_from=7)
    assert baselines.dmd_only(whole).config == replace(whole, shortcut_weight=0.0)
    assert baselines.shortcut_only(whole).config == replace(whole, dmd_weight=0.0)
    assert baselines.hybrid_forced(whole).config == replace(whole, rows=("forced",) * 4)
    assert baselines.literal_mutual_forcing(whole).config == replace(whole, rows=("literal", "free", "literal", "free"))
    early = {"shortcut_weight": 0.0, "dmd_weight": 1.0} | {
        "real_until": 0,
        "free_from": 0,
        "fake_from": 0,
        "dmd_from": 2,
    }
    assert baselines.dmd_forced(whole).config == replace(whole, rows=("forced",) * 4, **early)
    assert baselines.dmd_self_forcing(whole).config == replace(whole, rows=("free",) * 4, **early)


def test_forced_rows_do_not_mix_with_free_rows():
    with pytest.raises(ValueError, match="cut the loop"):
        replace(CONFIG, rows=("forced", "free", "real", "real"))
