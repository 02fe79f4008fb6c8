"""Truths about the mutual step: rows, phases, ownership of gradients, and draws that do not depend on the batch."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from mfcore.flow import TimeConfig
from mfcore.model.transformer import AVTransformer
from mfcore.objectives.mutual import Mutual, MutualConfig
from mfcore.objectives.terms import StepInfo, Term, total
from mfcore.types import AUDIO, VIDEO, AVBatch, Condition, Levels, Streams, VelocityModel
from tests.mfcore.analytic import Nothing
from tests.mfcore.tiny import batch, network

CONFIG = MutualConfig(
    time=TimeConfig(shift={VIDEO: 2.0, AUDIO: 1.0}), finest=3, strengths=(1, 2), rollout_steps=(1, 2), guidance=2.0
)
Models = dict[str, AVTransformer]


def trio() -> Models:
    return {name: network(layers=1, seed=i) for i, name in enumerate(("student", "ema", "fake"))}


def four(first: int = 0) -> AVBatch:
    """One row of each place in the cycle: real, free, coupled, free."""
    data = batch(rows=4, chunks=3)
    return replace(data, samples=data.samples + first)


def at_step(step: int) -> StepInfo:
    return StepInfo(seed=0, step=step, stage_step=step)


def run(config: MutualConfig, models, data: AVBatch, step: int = 0) -> dict[str, list[Term]]:
    return Mutual(config)(models, data, at_step(step))


def found(terms: list[Term]) -> dict[str, int]:
    """Rows of each term, by its name."""
    return {t.name: t.values.shape[0] for t in terms}


@dataclass
class Watched:
    """A network that notes how it is called; it answers as the network does."""

    inner: VelocityModel
    calls: list[tuple] = field(default_factory=list)  # (writes history?, chunks, rows, level of row 0, next level)
    history: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list)  # latents, trust labels

    def __call__(
        self, x: Streams, t: Levels, r: Levels, cond: Condition, memory=None, *, store=False, trust=None
    ) -> tuple:
        if x:
            level, following = (round(float(v[AUDIO][0, 0]), 5) for v in (t, r))
            self.calls.append((store, t[AUDIO].shape[1], t[AUDIO].shape[0], level, following))
        if store and x and len(x[AUDIO].chunk.unique()) > 1:  # the whole clip at once: the pass with gradient
            assert not any(s.latents.requires_grad for s in x.values())
            self.history.append((x[VIDEO].latents, trust))
        return self.inner(x, t, r, cond, memory, store=store, trust=trust)


def test_every_term_is_there_finite_and_has_its_rows():
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
    watched = Watched(network(layers=1))
    data = four()
    run(CONFIG, trio() | {"student": watched}, data)
    ((history, trust),) = watched.history
    real = data.streams[VIDEO].latents
    assert torch.equal(history[0], real[0])
    assert not any(torch.allclose(history[i], real[i], atol=1e-3) for i in (1, 2, 3))
    assert trust is not None
    assert trust[[0, 1, 3]].tolist() == [0, 1, 1]
    assert trust[2] in (0.5, 0.25)
    turned = four(first=1)  # the cycle goes by sample number, not by place in the batch
    assert [CONFIG.kind(int(s), 0) for s in turned.samples] == ["free", "coupled", "free", "real"]


def test_coupled_history_stays_with_the_clip_and_free_history_does_not():
    """A model that moves nothing keeps (1 - s) of the clip where it finishes from s, and noise where it rolls out."""

    def still(x, t, r, cond, memory=None, *, store=False, trust=None):
        return {m: torch.zeros_like(stream.latents) for m, stream in x.items()}, memory or Nothing()

    watched, data = Watched(still), four()
    run(replace(CONFIG, strengths=(2,)), {"student": watched, "ema": still, "fake": still}, data)
    ((history, _),) = watched.history
    share = [float((history[i] * data.streams[VIDEO].latents[i]).mean()) for i in range(4)]
    s = 2 * 0.25 / 1.25  # the video's shift of 2 takes 1/4 to 0.4
    assert share == pytest.approx([1, 0, 1 - s, 0], abs=0.15)


def test_the_literal_row_anchors_the_clip_on_free_history():
    config = replace(CONFIG, rows=("literal",), finest_rows=(True,))
    watched = Watched(network(layers=1))
    terms = run(config, trio() | {"student": watched}, four())
    assert found(terms["student"]) == {"flow_matching": 4, "shortcut": 4}
    assert "fake" not in terms
    assert watched.history[0][1].tolist() == [1, 1, 1, 1]


def test_a_free_row_never_looks_at_the_clip():
    models, data = trio(), four()
    other = replace(data, streams={m: s.with_latents(-s.latents) for m, s in data.streams.items()})
    config = replace(CONFIG, rows=("free",), finest_rows=(True,))
    first, second = (rows_of(run(config, models, d)["student"]) for d in (data, other))
    assert first.keys() == {f"{name}/{m}" for name in ("shortcut", "dmd") for m in (VIDEO, AUDIO)}
    assert all(torch.equal(second[key], values) for key, values in first.items())


def test_teacher_and_fake_score_stand_on_the_history_of_the_student():
    """The teacher's label stays within what flow matching trains the multi-step mode with."""
    watched = {name: Watched(model) for name, model in trio().items()}
    run(CONFIG, watched, four())
    ((history, trust),) = watched["student"].history
    teacher = watched["ema"].history
    assert len(teacher) == 2  # with its conditions, and the null branch of guidance
    coupled = trust[trust < 1].max()
    assert coupled > 0
    assert all(torch.equal(h, history) and torch.equal(label, trust.clamp_max(coupled)) for h, label in teacher)
    ((seen, label),) = watched["fake"].history
    assert torch.equal(seen, history[[1, 3]])
    assert label.tolist() == [1, 1]


def test_guidance_is_in_the_targets_of_dmd():
    models, data = trio(), four()
    plain, guided = (
        rows_of(run(replace(CONFIG, guidance=w, shortcut_weight=0.0), models, data)["student"]) for w in (1.0, 2.0)
    )
    assert torch.equal(plain["flow_matching/video"], guided["flow_matching/video"])
    assert not torch.allclose(plain["dmd/video"], guided["dmd/video"], rtol=1e-3)


def rows_of(terms: list[Term]) -> dict[str, torch.Tensor]:
    return {t.key: t.values.detach() for t in terms}


def test_two_halves_of_a_batch_are_the_whole():
    models, data = trio(), four()
    whole = run(CONFIG, models, data, step=5)
    halves = [run(CONFIG, models, data.rows(slice(i, i + 2)), step=5) for i in (0, 2)]
    for owner in ("student", "fake"):
        first, second = (rows_of(half[owner]) for half in halves)
        for key, values in rows_of(whole[owner]).items():
            torch.testing.assert_close(values, torch.cat([first[key], second[key]]), atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_student_and_never_the_average_or_the_fake_score():
    models = trio()
    terms = run(CONFIG, models, four())
    total(terms["student"]).backward()
    grads = {name: p.grad for name, p in models["student"].named_parameters()}
    # the sink's own last queries and outputs lead nowhere, everything that makes velocities must move
    for branch in (VIDEO, AUDIO):
        for part in ("head.weight", "embed.weight", "levels.interval.2.weight", "levels.trust.2.weight"):
            assert float(grads[f"branches.{branch}.{part}"].abs().max()) > 0
    assert all(p.grad is None for other in ("ema", "fake") for p in models[other].parameters())
    before = {name: g.clone() for name, g in grads.items() if g is not None}
    total(terms["fake"]).backward()
    assert all(torch.equal(models["student"].get_parameter(name).grad, g) for name, g in before.items())
    assert float(models["fake"].branches[VIDEO].head.weight.grad.abs().max()) > 0
    assert all(p.grad is None for p in models["ema"].parameters())


def test_dmd_does_not_train_what_writes_history():
    """The trust label is read where history is written, and nowhere else."""
    for rows, wanted in ((("coupled",), True), (("free",), False)):
        models, config = trio(), replace(CONFIG, rows=rows, finest_rows=(True,), shortcut_weight=0.0)
        total(run(config, models, four())["student"]).backward()
        grad = models["student"].branches[VIDEO].levels.trust[2].weight.grad
        assert (grad is not None and float(grad.abs().max()) > 0) is wanted


def test_each_term_trains_the_mode_it_is_for():
    """Flow matching: the multi-step mode (its interval embedder is silent). ShortCut and DMD: the few-step one."""
    for rows, weight, wanted in ((("real",), 0.0, False), (("real",), 1.0, True), (("free",), 0.0, True)):
        models = trio()
        config = replace(CONFIG, rows=rows, finest_rows=(True,), shortcut_weight=weight)
        total(run(config, models, four())["student"]).backward()
        grad = models["student"].branches[AUDIO].levels.interval[2].weight.grad
        assert (grad is not None and float(grad.abs().max()) > 0) is wanted


def test_phases_come_in_one_after_the_other():
    config = replace(CONFIG, real_until=2, free_from=4, fake_from=6, dmd_from=8, dmd_ramp=4)
    models, data, ladder = trio(), four(), ({"flow_matching": 4, "shortcut": 4}, {"flow_matching": 2, "shortcut": 4})
    kinds = {step: [config.kind(i, step) for i in range(4)] for step in (1, 2, 3, 4)}
    assert kinds[1] == ["real"] * 4
    assert kinds[2] == kinds[3] == ["real", "coupled", "coupled", "coupled"]
    assert kinds[4] == ["real", "free", "coupled", "free"]
    for step, expected in ((1, ladder[0]), (5, ladder[1])):
        terms = run(config, models, data, step)
        assert found(terms["student"]) == expected
        assert "fake" not in terms
    watching = run(config, models, data, 7)  # the fake score learns alone
    assert found(watching["student"]) == ladder[1]
    assert found(watching["fake"]) == {"fake_score": 2}
    weights = {s: next(t.weight for t in run(config, models, data, s)["student"] if t.name == "dmd") for s in (8, 20)}
    assert weights == pytest.approx({8: 1 / 12, 20: 1 / 3})
    assert [config.dmd_scale(s) for s in (7, 8, 9, 10, 11, 12)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_the_stage_step_sets_the_phase_and_not_the_step_of_the_run():
    config = replace(CONFIG, real_until=2)
    terms = Mutual(config)(trio(), four(), StepInfo(seed=0, step=100, stage_step=0))
    assert found(terms["student"]) == {"flow_matching": 4, "shortcut": 4}


def test_draws_that_shape_control_flow_depend_on_the_step_alone():
    """Whatever the samples, the student is called in the same way at the same step; steps differ among themselves."""
    models, config = trio(), replace(CONFIG, shortcut_weight=0.0, rollout_steps=(1, 4))

    def calls(step: int, first: int) -> list[tuple]:
        watched = Watched(network(layers=1))
        run(config, models | {"student": watched}, four(first), step)
        shape = [c for c in watched.calls if c[1] == 1]  # roll-outs, chunk by chunk
        counts = [c[:3] for c in watched.calls]
        return [shape, counts]

    seen = [calls(step, first=0) for step in range(4)]
    assert [calls(step, first=40) for step in range(4)] == seen
    assert len({str(s) for s in seen}) > 2


def test_the_trust_label_can_be_left_out():
    watched = Watched(network(layers=1))
    run(replace(CONFIG, trust_label=False), trio() | {"student": watched}, four())
    assert watched.history[0][1] is None


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="equal lengths"):
        replace(CONFIG, rows=("real",))
    with pytest.raises(ValueError, match="beyond the ShortCut depth"):
        replace(CONFIG, strengths=(4,))
    with pytest.raises(ValueError, match="must not come before"):
        replace(CONFIG, fake_from=5, dmd_from=4)
