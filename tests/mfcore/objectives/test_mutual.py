"""Mutual step: rows, phases, gradients, and draws that do not depend on the batch."""

import itertools
from dataclasses import replace

import pytest
import torch

from mfcore.objectives.histories import draw_step
from mfcore.objectives.losses import LossTerm, StepInfo, total_loss
from mfcore.objectives.mutual import MutualForcingObjective
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.types import AUDIO, VIDEO, AVBatch, Stream
from tests.helpers.analytic_models import EmptyCache
from tests.helpers.mutual_objective import CONFIG, Watched, at_step, found, four, rows_of, trio
from tests.helpers.tiny_model import network


def run(config: MutualConfig, models, data: AVBatch, step: int = 0) -> dict[str, list[LossTerm]]:
    return MutualForcingObjective(config)(models, data, at_step(step))


def test_all_terms_are_finite_and_have_their_rows():
    terms = run(CONFIG, trio(), four())
    assert found(terms["student"]) == {"flow_matching": 2, "shortcut": 4, "dmd": 2}
    assert found(terms["fake"]) == {"fake_score": 2}
    for t in terms["student"] + terms["fake"]:
        assert t.values.shape[1] == 3
        assert bool(t.values.isfinite().all())
        assert float(t.values.detach().min()) > 0
    assert {t.name: round(t.weight, 4) for t in terms["student"]} == {
        "flow_matching": 1.0,
        "shortcut": 0.6667,
        "dmd": 0.3333,
    }
    assert {t.modality for t in terms["student"]} == {VIDEO, AUDIO}


def test_history_is_real_coupled_or_free_by_sample_number():
    watched = {name: Watched(model) for name, model in trio().items()}
    data = four()
    run(CONFIG, watched, data)
    history, _ = watched["ema"].history[0]
    real = data.streams[VIDEO].chunks(0, 2).latents  # nobody comes after the last chunk
    assert torch.equal(history[0], real[0])
    assert not any(torch.allclose(history[i], real[i], atol=1e-3) for i in (1, 2, 3))
    labels = [c.trust for c in watched["student"].calls if c.store and c.x]
    assert labels[0] is None
    assert [label.tolist() for label in labels[1:]] in ([[s], [s], [1, 1], [1, 1]] for s in (0.5, 0.25))
    turned = four(first=1)  # the cycle goes by sample number, not by place in the batch
    assert [CONFIG.row_kind(int(s), 0) for s in turned.samples] == ["free", "coupled", "free", "real"]


def test_coupled_history_stays_with_the_clip_and_free_history_does_not():
    """A model with velocity 0 keeps (1 - s) of the clip in coupled history, and noise in free history."""

    def zero_velocity(x, t, r, cond, *, cache=None, store=False, trust=None):
        return {m: torch.zeros_like(stream.latents) for m, stream in x.items()}, cache or EmptyCache()

    watched, data = Watched(zero_velocity), four()
    run(replace(CONFIG, strengths=(2,)), {"student": zero_velocity, "ema": watched, "fake": zero_velocity}, data)
    history, real = watched.history[0][0], data.streams[VIDEO].chunks(0, 2).latents
    share = [float((history[i] * real[i]).mean()) for i in range(4)]
    s = 2 * 0.25 / 1.25  # the video's shift of 2 takes 1/4 to 0.4
    assert share == pytest.approx([1, 0, 1 - s, 0], abs=0.15)


def test_the_literal_row_anchors_the_clip_on_free_history():
    config = replace(CONFIG, rows=("literal",), finest_rows=(True,))
    watched, data = {name: Watched(model) for name, model in trio().items()}, four()
    terms = run(config, watched, data)
    assert found(terms["student"]) == {"flow_matching": 4, "shortcut": 4}
    assert "fake" not in terms
    assert [c.trust.tolist() for c in watched["student"].calls if c.store and c.x] == [[1, 1, 1, 1]] * 2
    assert [label.tolist() for _, label in watched["ema"].history] == [[1, 1, 1, 1]] * 2  # as flow matching has it
    later = {m: s.with_latents(torch.where(_in_chunk(s, 2), -s.latents, s.latents)) for m, s in data.streams.items()}
    other = rows_of(run(config, trio(), replace(data, streams=later))["student"])
    for key, values in rows_of(terms["student"]).items():  # the clip is the clean chunk of both terms
        assert torch.equal(values[:, :2], other[key][:, :2])
        assert not torch.isclose(values[:, 2], other[key][:, 2], rtol=1e-3).any()


def _in_chunk(stream: Stream, k: int) -> torch.Tensor:
    return (stream.chunk == k).reshape(-1, *(1,) * (stream.latents.ndim - 2))


def test_a_free_row_does_not_depend_on_the_clip():
    models, data = trio(), four()
    other = replace(data, streams={m: s.with_latents(-s.latents) for m, s in data.streams.items()})
    config = replace(CONFIG, rows=("free",), finest_rows=(True,))
    first, second = (rows_of(run(config, models, d)["student"]) for d in (data, other))
    assert first.keys() == {f"{name}/{m}" for name in ("shortcut", "dmd") for m in (VIDEO, AUDIO)}
    assert all(torch.equal(second[key], values) for key, values in first.items())


def test_teacher_and_fake_score_use_the_history_of_the_student():
    """The trust label of the teacher is capped at the labels that flow matching trains."""
    watched = {name: Watched(model) for name, model in trio().items()}
    run(CONFIG, watched, four())
    wrote = [c for c in watched["student"].calls if c.store and c.x]
    history = torch.empty_like(four().streams[VIDEO].chunks(0, 2).latents)
    for rows, calls in (([0], wrote[:1]), ([2], wrote[1:3]), ([1, 3], wrote[3:])):
        history[rows] = torch.cat([c.x[VIDEO].latents for c in calls], dim=1)
    teacher = watched["ema"].history
    assert len(teacher) == 2  # with its conditions, and the null branch of guidance
    coupled = float(wrote[1].trust)
    assert 0 < coupled < 1
    assert all(torch.equal(h, history) and label.tolist() == [0, coupled, coupled, coupled] for h, label in teacher)
    ((seen, label),) = watched["fake"].history
    assert torch.equal(seen, history[[1, 3]])
    assert label.tolist() == [1, 1]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_step_evaluates_its_networks_as_often_as_derived_on_paper(step, shared):
    """Rows x chunks of every network: 4 rows (real, free, coupled, free), K chunks, S calls per free chunk.

    student   sink 4; keys and values 4 (K - 1); velocities: coupled K, free 2 S K, flow matching 2 K, ShortCut 4 K
    ema       sink 4; keys and values of both branches of guidance 8 (K - 1); velocities: finest ShortCut target of
              2 rows, two guided calls, 8 K; coarser ones of 2 rows, two plain calls, 4 K; DMD, 2 rows, guided, 4 K
    fake      velocities 2 K; with separate history sink 2 and keys and values 2 (K - 1)
    """
    watched = {name: Watched(model) for name, model in trio().items()}
    config, k = replace(CONFIG, rollout_steps=(4,), share_history=shared), 3
    run(config, watched, four(), step)
    student, ema, fake = (watched[name] for name in ("student", "ema", "fake"))
    assert (student.sinks, student.written, student.asked) == (4, 4 * (k - 1), k + 2 * 4 * k + 2 * k + 4 * k)
    assert (ema.sinks, ema.written, ema.asked) == (4, 8 * (k - 1), 8 * k + 4 * k + 4 * k)
    assert (fake.sinks, fake.written, fake.asked) == ((0, 0, 2 * k) if shared else (2, 2 * (k - 1), 2 * k))
    assert len([c for c in student.calls if c.chunks == k and not c.store]) == 1  # flow matching and ShortCut


def test_no_network_is_evaluated_twice_on_the_same_input():
    """Captions distinguish the two branches of guidance."""
    watched = {name: Watched(model) for name, model in trio().items()}
    data = four()
    cond = replace(data.cond, caption_mask=torch.ones_like(data.cond.caption_mask))
    run(replace(CONFIG, rollout_steps=(4,)), watched, replace(data, cond=cond))
    for name, network_ in watched.items():
        inputs = [entry for call in network_.calls for entry in call.inputs()]
        assert len(inputs) > 4
        assert len(set(inputs)) == len(inputs), name


def test_guidance_is_in_the_targets_of_dmd():
    models, data = trio(), four()
    plain, guided = (
        rows_of(run(replace(CONFIG, guidance=w, shortcut_weight=0.0), models, data)["student"]) for w in (1.0, 2.0)
    )
    assert torch.equal(plain["flow_matching/video"], guided["flow_matching/video"])
    assert not torch.allclose(plain["dmd/video"], guided["dmd/video"], rtol=1e-3)


def test_two_halves_of_a_batch_equal_the_whole():
    models, data = trio(), four()
    whole = run(CONFIG, models, data, step=5)
    halves = [run(CONFIG, models, data.rows(slice(i, i + 2)), step=5) for i in (0, 2)]
    for owner in ("student", "fake"):
        first, second = (rows_of(half[owner]) for half in halves)
        for key, values in rows_of(whole[owner]).items():
            torch.testing.assert_close(values, torch.cat([first[key], second[key]]), atol=1e-5, rtol=1e-5)


def test_student_losses_have_gradients_for_the_student_only():
    models = trio()
    terms = run(CONFIG, models, four())
    total_loss(terms["student"]).backward()
    grads = {name: p.grad for name, p in models["student"].named_parameters()}
    # The last queries and outputs of the sink have no gradient; all parts of the velocity must have one.
    for branch in (VIDEO, AUDIO):
        for part in ("head.weight", "embed.weight", "levels.interval.2.weight", "levels.trust.2.weight"):
            assert float(grads[f"branches.{branch}.{part}"].abs().max()) > 0
    assert all(p.grad is None for other in ("ema", "fake") for p in models[other].parameters())
    before = {name: g.clone() for name, g in grads.items() if g is not None}
    total_loss(terms["fake"]).backward()
    assert all(torch.equal(models["student"].get_parameter(name).grad, g) for name, g in before.items())
    assert float(models["fake"].branches[VIDEO].head.weight.grad.abs().max()) > 0
    assert all(p.grad is None for p in models["ema"].parameters())


@pytest.mark.parametrize("jump", [False, True])
def test_dmd_does_not_train_the_history_pass(jump):
    """Only the history pass reads the trust label."""
    for rows, wanted in ((("coupled",), True), (("free",), False)):
        models = trio()
        config = replace(CONFIG, rows=rows, finest_rows=(True,), shortcut_weight=0.0, jump_exit=jump)
        total_loss(run(config, models, four())["student"]).backward()
        grad = models["student"].branches[VIDEO].levels.trust[2].weight.grad
        assert (grad is not None and float(grad.abs().max()) > 0) is wanted


def test_each_term_trains_its_mode():
    """Flow matching trains the multi-step mode (interval embedding off), ShortCut and DMD the few-step mode."""
    for rows, weight, wanted in ((("real",), 0.0, False), (("real",), 1.0, True), (("free",), 0.0, True)):
        models = trio()
        config = replace(CONFIG, rows=rows, finest_rows=(True,), shortcut_weight=weight)
        total_loss(run(config, models, four())["student"]).backward()
        grad = models["student"].branches[AUDIO].levels.interval[2].weight.grad
        assert (grad is not None and float(grad.abs().max()) > 0) is wanted


@pytest.mark.parametrize("shared", [False, True])
def test_further_updates_of_the_fake_score_evaluate_it_alone(shared):
    config = replace(CONFIG, fake_updates=3, share_history=shared)
    watched = {name: Watched(net) for name, net in trio().items()}
    rounds = MutualForcingObjective(config).rounds(watched, four(), at_step(0))
    first = next(rounds)
    assert {name: found(terms) for name, terms in first.items()} == {
        name: found(terms) for name, terms in run(CONFIG, trio(), four()).items()
    }
    before = {name: len(net.calls) for name, net in watched.items()}
    further = list(rounds)
    assert [{name: found(terms) for name, terms in more.items()} for more in further] == [
        {"fake": {"fake_score": 2}}
    ] * 2
    assert {name: len(net.calls) - before[name] for name, net in watched.items() if name != "fake"} == {
        "student": 0,
        "ema": 0,
    }
    values = [terms["fake"][0].values for terms in (first, *further)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(values, 2))  # at other noise, each


def test_a_further_update_uses_the_updated_weights():
    models = trio()
    rounds = MutualForcingObjective(replace(CONFIG, fake_updates=2)).rounds(models, four(), at_step(0))
    untouched = list(MutualForcingObjective(replace(CONFIG, fake_updates=2)).rounds(models, four(), at_step(0)))[1]
    next(rounds)
    with torch.no_grad():
        for p in models["fake"].parameters():
            p.add_(0.01)
    assert not torch.equal(next(rounds)["fake"][0].values, untouched["fake"][0].values)


def test_phases_start_in_order():
    config = replace(CONFIG, real_until=2, free_from=4, fake_from=6, dmd_from=8, dmd_ramp=4)
    models, data = trio(), four()
    real_only, mixed = {"flow_matching": 4, "shortcut": 4}, {"flow_matching": 2, "shortcut": 4}
    kinds = {step: [config.row_kind(i, step) for i in range(4)] for step in (1, 2, 3, 4)}
    assert kinds[1] == ["real"] * 4
    assert kinds[2] == kinds[3] == ["real", "coupled", "coupled", "coupled"]
    assert kinds[4] == ["real", "free", "coupled", "free"]
    for step, expected in ((1, real_only), (5, mixed)):
        terms = run(config, models, data, step)
        assert found(terms["student"]) == expected
        assert "fake" not in terms
    fake_alone = run(config, models, data, 7)
    assert found(fake_alone["student"]) == mixed
    assert found(fake_alone["fake"]) == {"fake_score": 2}
    for step, weight in ((8, 1 / 12), (20, 1 / 3)):
        dmd = next(t for t in run(config, models, data, step)["student"] if t.name == "dmd")
        assert dmd.weight == pytest.approx(weight)
    assert [config.dmd_scale(s) for s in (7, 8, 9, 10, 11, 12)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_the_stage_step_sets_the_phase_and_not_the_step_of_the_run():
    config = replace(CONFIG, real_until=2)
    terms = MutualForcingObjective(config)(trio(), four(), StepInfo(seed=0, step=100, stage_step=0))
    assert found(terms["student"]) == {"flow_matching": 4, "shortcut": 4}


def test_draws_that_shape_control_flow_depend_on_the_step_alone():
    """Calls of the student are equal for all samples of one step, and differ between steps."""
    models, config = trio(), replace(CONFIG, shortcut_weight=0.0, rollout_steps=(1, 4))

    def calls(step: int, first: int) -> list[tuple]:
        watched = Watched(network(layers=1))
        run(config, models | {"student": watched}, four(first), step)
        rolled = [c for c in watched.calls if c.chunks == 1]  # chunk by chunk
        level = lambda levels: round(float(levels[AUDIO][0, 0]), 5)
        levels = [(c.store, level(c.t), level(c.r)) for c in rolled]
        return [levels, [(c.store, c.chunks, c.rows) for c in watched.calls]]

    seen = [calls(step, first=0) for step in range(4)]
    assert [calls(step, first=40) for step in range(4)] == seen
    assert len({str(s) for s in seen}) > 2


@pytest.mark.parametrize(
    ("setting", "terms"),
    [
        ({"online_targets": True}, {"shortcut", "dmd"}),
        ({"base": "euler"}, {"shortcut"}),
        ({"base": "two_midpoints"}, {"shortcut"}),
        ({"depth_power": 0.2}, {"shortcut"}),
        ({"dmd_floor": 10.0}, {"dmd"}),
        ({"jump_exit": True}, {"dmd", "fake_score"}),
        ({"time": replace(CONFIG.time, logit_mean=1.0)}, {"flow_matching"}),
        ({"time": replace(CONFIG.time, uniform_share=1.0)}, {"flow_matching"}),
        ({"guidance": 1.5}, {"shortcut", "dmd"}),
        ({"rollout_sampler": "renoise"}, {"shortcut", "dmd", "fake_score"}),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_a_setting_changes_its_own_terms_and_no_other(setting, terms):
    def values(**changes) -> dict[str, torch.Tensor]:
        config = replace(CONFIG, rollout_steps=(4,), **changes)
        out = [run(config, trio(), four(), step) for step in (0, 1, 2)]
        values: dict[str, torch.Tensor] = {}
        for i, terms_of in enumerate(out):
            for term in itertools.chain(*terms_of.values()):
                values[f"{term.key}/{i}"] = term.values.detach()
        return values

    before, after = values(), values(**setting)
    assert {key.split("/")[0] for key in before if not torch.equal(before[key], after[key])} == terms


def test_the_base_rule_changes_rows_at_the_finest_level_only():
    models, data = trio(), four()
    before, after = (
        rows_of(run(replace(CONFIG, **change), models, data)["student"]) for change in ({}, {"base": "euler"})
    )
    for m in (VIDEO, AUDIO):
        same = torch.isclose(before[f"shortcut/{m}"], after[f"shortcut/{m}"], rtol=1e-6).all(dim=1)
        assert same.tolist() == [not finest for finest in CONFIG.finest_rows]


def test_the_fake_score_trains_on_jumps_from_its_first_step():
    """Also before DMD starts: otherwise it would learn another distribution than the one DMD uses."""
    phases = {"rollout_steps": (4,), "dmd_from": 9}
    exits = [draw_step(replace(CONFIG, **phases), four().streams, at_step(step)).exit_step for step in range(4)]
    for step, exit_step in enumerate(exits):
        finished, jumped = (
            run(replace(CONFIG, jump_exit=jump, **phases), trio(), four(), step)["fake"][0].values
            for jump in (False, True)
        )
        assert torch.allclose(finished, jumped, rtol=1e-5) is (exit_step == 3)  # the last call is a jump already
    assert len(set(exits)) > 1


def test_the_trust_label_can_be_left_out():
    watched = Watched(network(layers=1))
    run(replace(CONFIG, trust_label=False), trio() | {"student": watched}, four())
    assert all(c.trust is None for c in watched.calls)


def test_contradictions_are_rejected():
    with pytest.raises(ValueError, match="equal lengths"):
        replace(CONFIG, rows=("real",))
    with pytest.raises(ValueError, match="rollout_sampler 'euler': unknown. Use one of deterministic, renoise"):
        replace(CONFIG, rollout_sampler="euler")
    with pytest.raises(ValueError, match="strengths=4"):
        replace(CONFIG, strengths=(4,))
    with pytest.raises(ValueError, match="depth_power=0"):
        replace(CONFIG, depth_power=0.0)
    with pytest.raises(ValueError, match="dmd_from"):
        replace(CONFIG, fake_from=5, dmd_from=4)
