"""Check the study: synthetic world, metrics, claims, task order, interruption and tracking."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mfcore.metrics.windows import TimeWindow
from mfcore.rollout import rollout
from mfcore.types import AUDIO, VIDEO
from tests.helpers.published_study import published_study_dir
from tests.helpers.small_study import small_study
from workflows.cli.study import _scope
from workflows.study import latent_world, plots, tasks
from workflows.study import study as study_report
from workflows.study.claims import check_claims
from workflows.study.config import study_preset
from workflows.study.latent_world import read_factors, sample_clips
from workflows.study.methods import ABLATIONS, BASELINES, GROUPS, METHODS
from workflows.study.metrics import real_statistics, score_window
from workflows.study.results_table import ResultTable
from workflows.study.scheduler import (
    StudyOutcome,
    claim_study_dir,
    import_networks,
    load_costs,
    load_scores,
    parse_seeds,
    run_tasks,
    select_methods,
)
from workflows.study.tables import to_markdown
from workflows.study.tasks import DeadlineReached, StudyTask, _build_trainer, pending_tasks, plan_tasks, run_task

WHOLE = TimeWindow(start=0.0, end=5.0)
MANY = torch.arange(96) + 7000


@pytest.fixture(scope="module")
def ref():
    return real_statistics(0)


@pytest.fixture(scope="module")
def clips():
    return sample_clips(0, MANY, 10)


@pytest.fixture(scope="module")
def real(ref, clips):
    return score_window(clips.batch.streams, clips.truth, WHOLE, ref)


def change(clips, modality, how):
    """Return the clips' streams with changed latents of one modality."""
    streams = dict(clips.batch.streams)
    return streams | {modality: streams[modality].with_latents(how(streams[modality].latents))}


def moved(clips, modality, where, by):
    """Return the clips' streams with one changed factor."""
    turn = latent_world.mixing_matrix(modality)

    def how(latents):
        factors = read_factors(modality, latents)
        factors[..., where] = by(factors[..., where])
        return (factors @ turn).reshape(latents.shape)

    return change(clips, modality, how)


class TestWorld:
    def test_clip_depends_on_its_sample_number_only(self):
        some = sample_clips(0, torch.tensor([5, 3]), 4)
        one = sample_clips(0, torch.tensor([3]), 4)
        for m in (VIDEO, AUDIO):
            assert torch.allclose(some.batch.streams[m].latents[1:], one.batch.streams[m].latents, atol=1e-6)

    def test_latents_follow_the_timeline_and_are_mixed_by_a_rotation(self, clips):
        for m in (VIDEO, AUDIO):
            assert clips.batch.streams[m].latents.shape[1] == latent_world.TIMELINE.count(m, 10)
            turn = latent_world.mixing_matrix(m)
            assert torch.allclose(turn @ turn.T, torch.eye(len(turn)), atol=1e-5)

    def test_choices_are_separated_by_twenty_spreads(self, clips):
        video = read_factors(VIDEO, clips.batch.streams[VIDEO].latents)
        brow = video[..., latent_world.BROW].flatten()
        assert 2 / brow[brow > 0].std() == pytest.approx(20, rel=0.1)

    @pytest.mark.parametrize("voices", [latent_world.VOICES, 8])
    def test_voice_is_one_of_a_few_and_constant(self, real, voices):
        streams = sample_clips(0, MANY, 10, voices).batch.streams
        voice = read_factors(AUDIO, streams[AUDIO].latents)[..., latent_world.VOICE]
        far = torch.cdist(voice, latent_world.voice_means(voices))
        assert (far.argmin(-1) == far.argmin(-1)[:, :1]).all()
        assert far.min(-1).values.max() < 6 * latent_world.NOISE
        assert real["voice_error"] < 0.03
        assert torch.equal(torch.unique(far[:, 0].argmin(-1)), torch.arange(voices))

    def test_first_frame_is_uncorrelated_with_the_voice(self):
        many = sample_clips(0, torch.arange(2000), 1)
        first = read_factors(VIDEO, many.batch.cond.first_frame[:, None])[:, 0]
        both = torch.cat([first, many.truth.voice], dim=1).T
        assert both.corrcoef()[: len(first.T), len(first.T) :].abs().max() < 0.08  # 3.6 / sqrt(2000)

    def test_pose_is_continuous_across_chunks_and_gestures_persist(self, real):
        assert real["gesture_flips"] == pytest.approx(0.15, abs=0.04)
        assert real["seam"] == pytest.approx(1, abs=0.1)


class TestScores:
    def test_real_clips_have_ideal_scores(self, real):
        assert real["valid"] > 0.99
        assert real["syllable_error"] < 0.02
        assert real["sync"] > 0.95
        assert real["identity_error"] < 0.03
        assert real["entropy"] > 0.99
        assert real["motion"] == pytest.approx(1, abs=0.1)
        assert real["failed"] == 0

    def test_more_noise_worsens_the_scores(self, clips, ref, real):
        before = real
        for scale in (0.2, 0.6):
            noisy = change(clips, VIDEO, lambda x, scale=scale: x + scale * torch.randn_like(x))
            now = score_window(noisy, clips.truth, WHOLE, ref)
            assert now["frechet"] > before["frechet"]
            assert now["valid"] < before["valid"]
            assert now["sync"] < before["sync"]
            before = now

    def test_audio_of_another_clip_fails_sync_and_syllables(self, clips, ref):
        now = score_window(change(clips, AUDIO, lambda x: x.roll(1, 0)), clips.truth, WHOLE, ref)
        assert abs(now["sync"]) < 0.15
        assert now["syllable_error"] > 0.7

    def test_late_audio_is_detected(self, clips, ref):
        now = score_window(change(clips, AUDIO, lambda x: x.roll(2, 1)), clips.truth, WHOLE, ref)
        assert now["offset_ms"] == pytest.approx(250, abs=30)

    def test_jumps_at_chunk_borders_raise_seam_energy(self, clips, ref):
        jump = 2.0 * (clips.batch.streams[VIDEO].chunk % 2)[:, None]
        now = score_window(moved(clips, VIDEO, latent_world.POSE, lambda x: x + jump), clips.truth, WHOLE, ref)
        assert now["seam"] > 10

    def test_changed_identity_raises_identity_error(self, clips, ref):
        now = score_window(moved(clips, VIDEO, latent_world.IDENTITY, lambda x: x + 0.5), clips.truth, WHOLE, ref)
        assert now["identity_error"] == pytest.approx(0.5, abs=0.02)

    def test_voice_drift_raises_voice_error(self, clips, ref, real):
        late = (clips.batch.streams[AUDIO].chunk >= 5)[:, None] * 0.5
        now = score_window(
            moved(clips, AUDIO, latent_world.VOICE, lambda x: x + late), clips.truth, TimeWindow(start=2.5, end=5), ref
        )
        assert now["voice_error"] == pytest.approx(0.5, abs=0.02)
        assert now["voice_changes"] == 0
        assert now["frechet"] > 100 * real["frechet"]  # 0.5 is 16 spreads of a chunk's mean

    def test_clip_with_another_final_voice_counts_as_voice_change(self, clips, ref, real):
        turned = (
            1 - 2.0 * ((clips.batch.streams[AUDIO].chunk >= 5) & (torch.arange(len(MANY)) < 24)[:, None])[..., None]
        )
        now = score_window(
            moved(clips, AUDIO, latent_world.VOICE, lambda x: x * turned),
            clips.truth,
            TimeWindow(start=2.5, end=5),
            ref,
        )
        assert now["voice_changes"] == 0.25
        assert real["voice_changes"] == 0
        assert now["voice_error"] == pytest.approx(real["voice_error"], abs=0.01)

    def test_another_voice_from_the_start_is_no_voice_error(self, clips, ref, real):
        """The first frame does not determine the voice."""
        now = score_window(moved(clips, AUDIO, latent_world.VOICE, lambda x: -x), clips.truth, WHOLE, ref)
        assert now["voice_error"] == pytest.approx(real["voice_error"], abs=1e-4)
        assert now["frechet"] == pytest.approx(real["frechet"], rel=0.1)

    def test_one_choice_for_all_clips_lowers_entropy(self, clips, ref):
        now = score_window(moved(clips, VIDEO, latent_world.BROW, lambda x: x.abs()), clips.truth, WHOLE, ref)
        assert now["entropy"] == pytest.approx(0.8, abs=0.02)

    def test_one_voice_for_all_clips_has_zero_voice_entropy(self, clips, ref, real):
        def replace_voice(voice):
            return voice - clips.truth.voice[:, None] + clips.truth.voices[0]

        now = score_window(moved(clips, AUDIO, latent_world.VOICE, replace_voice), clips.truth, WHOLE, ref)
        assert now["voice_entropy"] == 0
        assert real["voice_entropy"] > 0.95

    def test_non_finite_latents_count_as_failed(self, clips, ref):
        broken = change(clips, AUDIO, lambda x: torch.where(torch.arange(len(x))[:, None, None] < 24, torch.nan, x))
        now = score_window(broken, clips.truth, WHOLE, ref)
        assert now["failed"] == 0.25
        assert now["valid"] < 0.8
        assert now["voice_error"] > 100


def row(method, mode, steps, window, *, guidance=1.0, seed=0, nfe=None, **metrics):
    usual = dict.fromkeys(
        ("frechet", "valid", "syllable_error", "sync", "offset_ms", "identity_error", "voice_error", "entropy", "seam"),
        0.5,
    )
    rest = dict.fromkeys(("voice_changes", "voice_entropy", "lag1", "motion", "loudness", "failed"), 0.5)
    return {
        "method": method,
        "mode": mode,
        "steps": steps,
        "nfe": nfe,
        "guidance": guidance,
        "window": window,
        "seed": seed,
        "metrics": usual | rest | metrics,
    }


def made_up_rows(**ours):
    """Return rows that meet all claims; ``ours`` changes early metrics of Mutual Forcing at 4 steps."""
    rows = [
        row("joint", "multi", 4, "0-5", valid=0.7),
        row("joint", "multi", 50, "0-5", valid=0.99),
        row("teacher_forcing", "multi", 4, "0-5", valid=0.7),
        row("teacher_forcing", "multi", 50, "0-5", valid=0.99),
    ]
    for window, worse in (("0-5", 0.0), ("15-25", 0.4)):
        rows.append(row("real", "multi", 0, window, frechet=0.1, identity_error=0.1, voice_error=0.1))
        late = {"frechet": 0.5 + worse, "identity_error": 0.6, "voice_error": 0.6}
        rows.append(row("teacher_forcing", "multi", 50, window, guidance=1.5, **late))
        grown = dict.fromkeys(("frechet", "identity_error", "voice_error"), 0.5 + worse)
        rows.append(row("hybrid_forced", "few", 4, window, **grown))
        early = ours if window == "0-5" else {}
        rows.append(row("mutual", "few", 4, window, **({"valid": 0.97, "seam": 1.1} | early)))
        rows.append(row("mutual", "few", 8, window, valid=0.97))
    return rows


def made_up_costs():
    use = {"video": 6.0, "audio": 9.0}
    return [
        {"method": m, "seed": 0, "history_use": use, "state_bytes": b, "cpu_seconds": b, "steps": 1, "seconds": 1.0}
        for m, b in (("joint", 1), ("mutual", 2), ("dmd_self_forcing", 3))
    ]


def made_up(**ours):
    return ResultTable(made_up_rows(**ours), made_up_costs())


class TestClaims:
    def test_claims_that_hold(self):
        found = check_claims(made_up(), 50)
        assert len(found) == 20
        assert all(claim.met for claim in found), [claim for claim in found if not claim.met]

    @pytest.mark.parametrize(
        ("change", "claim"),
        [
            ({"valid": 0.8}, "share of the gap"),
            ({"sync": 0.2}, "sync, 0-5 s: Mutual Forcing"),
            ({"frechet": 0.8}, "4 few steps not worse than 8"),
            ({"frechet": 0.1}, "growth from"),
        ],
    )
    def test_claims_that_fail(self, change, claim):
        missed = [claim.claim for claim in check_claims(made_up(**change), 50) if not claim.met]
        assert any(claim in text for text in missed)

    def test_growth_is_relative_to_real_clips(self):
        """If real clips of the later window measure 0.4 more, a rise by 0.4 counts as zero growth."""
        windows = [("0-5", 0.0), ("15-25", 0.4)]
        rows = [row("real", "multi", 0, w, frechet=0.1 + more) for w, more in windows]
        rows += [row("hybrid_forced", "few", 4, w, frechet=0.5 + 2 * more) for w, more in windows]
        rows += [row("mutual", "few", 4, w, frechet=0.5 + more) for w, more in windows]
        (claim,) = [b for b in check_claims(ResultTable(rows, []), 50) if b.claim.startswith("frechet: growth")]
        assert (claim.measured, claim.met) == ("0.000 against 0.400", True)

    def test_claims_compare_common_seeds(self):
        """A seed that one of the compared methods lacks must not enter the comparison."""
        rows, costs = made_up_rows(), made_up_costs()
        more = [r | {"seed": 1, "metrics": r["metrics"] | {"frechet": 99.0}} for r in rows if r["method"] == "mutual"]
        table = ResultTable([*rows, *more], costs)
        claims = {n: {b.claim for b in check_claims(table, 50) if len(b.seeds) == n} for n in (1, 2)}
        own = ("4 few steps not worse", "seam energy", "history use")  # of the method alone
        assert claims[2] == {b.claim for b in check_claims(table, 50) if any(text in b.claim for text in own)}
        assert len(claims[1]) == 13
        before, after = ({b.claim: b for b in check_claims(t, 50)} for t in (made_up(), table))
        assert all(before[claim] == after[claim] for claim in claims[1])
        assert "| 0, 1 |" in to_markdown(table, 50)

    @pytest.mark.parametrize(("ours", "theirs", "met"), [(-0.1, -0.3, True), (0.1, -0.3, False), (0.1, 0.3, True)])
    def test_drift_claim_for_negative_and_positive_growth(self, ours, theirs, met):
        rows = [row("real", "multi", 0, w, frechet=0.1) for w in ("0-5", "15-25")]
        for name, growth in (("mutual", ours), ("hybrid_forced", theirs)):
            rows += [row(name, "few", 4, w, frechet=0.5 + g) for w, g in (("0-5", 0.0), ("15-25", growth))]
        (claim,) = [b for b in check_claims(ResultTable(rows, []), 50) if b.claim.startswith("frechet: growth")]
        assert claim.met is met

    def test_without_guided_rows_claims_compare_with_unguided_ones(self):
        rows, costs = made_up_rows(), made_up_costs()
        plain = [r | {"guidance": 1.0} for r in rows if r["guidance"] == 1.0 or r["window"] == "15-25"]
        found = check_claims(ResultTable(plain, costs), 50)
        assert len(found) == 20
        assert sum("teacher forcing at 50" in claim.claim for claim in found) == 6

    def test_page_marks_missed_claims(self):
        page = to_markdown(made_up(valid=0.8), 50)
        assert "MISSED" in page
        assert "h) Mutual Forcing" in page

    def test_ablations_are_compared_with_the_method_on_the_same_seeds(self):
        """Seed 1 of the unchanged method must not enter the mean that an ablation on seed 0 is compared with."""
        rows = [
            row(
                name,
                "few",
                steps,
                window,
                seed=seed,
                frechet=value + steps + 20 * late,
                valid=steps / 10,
                syllable_error=steps / 100 + late,
                sync=0.9 - steps / 100 - late,
                seam=value + late,
                identity_error=0.1,
                voice_error=0.2,
            )
            for name, seed, value in (("mutual", 0, 1.0), ("mutual", 1, 100.0), ("no_label", 0, 2.0))
            for steps in (4, 8)
            for window, late in (("0-5", 0.0), ("15-25", 0.5))
            if (name, steps) != ("no_label", 8)  # not run yet
        ]
        cost = {"history_use": {"video": 6.0, "audio": 9.0}, "state_bytes": 3e6, "cpu_seconds": 1.0, "steps": 1}
        costs = [cost | {"method": m, "seed": s} for m, s in (("mutual", 0), ("mutual", 1), ("no_label", 0))]
        page = to_markdown(ResultTable(rows, costs), 50)
        section = page.split("## One change at a time")[1].split("##")[0]
        assert "Seeds: 0." in section
        lines = [line for line in section.splitlines() if line.startswith("| h")]
        same = "0.100 -> 0.100 | 0.200 -> 0.200 | 0.400 | 0.040 | 0.860"
        assert lines == [
            f"| h) Mutual Forcing | 5.000 -> 15.000 | {same} | 1.500 | 9.000 -> 19.000 | 0.800 | 6.00 / 9.00 | 3.0 |",
            f"| h1) no trust label | 6.000 -> 16.000 | {same} | 2.500 | - | - | 6.00 / 9.00 | 3.0 |",
        ]
        assert "## One change at a time" not in to_markdown(made_up(), 50)


class TestPlots:
    def test_ablations_have_a_separate_plot(self, tmp_path, monkeypatch):
        """Check the drawn axes: ablations appear in their plot only."""
        drawn = {}
        monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.update({path.name: figure.axes}) or path)
        rows = [
            row(name, "few", steps, window, nfe=steps, seam=seam)
            for name, seam in (("mutual", 1.0), ("no_label", 2.0), ("hybrid_forced", 3.0))
            for steps in (4, 8)
            for window in ("0-5", "15-25", "25-60")
        ]
        rows += [row("mutual", "few", 4, window, nfe=4, seed=1, seam=1.5) for window in ("0-5", "15-25")]
        assert [p.name for p in plots.draw_plots(rows, tmp_path)] == ["frontier.png", "drift.png", "ablations.png"]
        titles = ["ShortCut and DMD, real history", "Mutual Forcing"]
        seam = {name: axes[6] for name, axes in drawn.items()}
        for name in ("frontier.png", "drift.png"):
            assert [line.get_label() for line in seam[name].lines] == titles
        changed = seam["ablations.png"]
        points = [line for line in changed.lines if line.get_marker() == "o"]
        assert [(p.get_label(), list(p.get_xdata())) for p in points] == [("0-5 s", [2.0]), ("15-25 s", [2.0])]
        assert [text.get_text() for text in drawn["ablations.png"][4].get_yticklabels()] == ["h1) no trust label"]
        assert [(p.get_x(), p.get_width()) for p in changed.patches] == [(1.0, 0.5), (1.0, 0.5)]  # seeds of the method
        without = [r for r in rows if r["method"] != "no_label"]
        assert [p.name for p in plots.draw_plots(without, tmp_path)] == ["frontier.png", "drift.png"]
        longer = [r | {"window": "0-30"} for r in rows if r["window"] == "0-5"]
        assert [p.name for p in plots.draw_plots(longer, tmp_path)] == ["frontier.png", "ablations.png"]


def everything(out):
    """Return scores and costs without values that depend on the clock."""
    rows = load_scores(out)
    for one in rows:
        one["metrics"].pop("clip_seconds_per_second")
    return rows, [(c["method"], c["history_use"], c["state_bytes"]) for c in load_costs(out)]


POOL = """
import os, time
from workflows.study.scheduler import worker_pool

if __name__ == "__main__":
    with worker_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 100)
        time.sleep(100)
"""


class TestRuns:
    def test_workers_exit_when_the_study_is_killed(self, tmp_path):
        script = tmp_path / "pool.py"
        script.write_text(POOL)
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env) as run:
            try:
                assert run.stdout
                worker = psutil.Process(int(run.stdout.readline()))
                assert worker.is_running()
            finally:
                run.kill()
        with suppress(psutil.NoSuchProcess):
            worker.wait(20)

    def test_resumed_study_equals_uninterrupted_study(self, tmp_path):
        config, methods = small_study(), select_methods(["mutual"], [0])
        for task in plan_tasks(config, methods):
            run_task(config, tmp_path / "whole", task, device="cpu", deadline=float("inf"))
        stops = 0
        for task in plan_tasks(config, methods):
            while not task.is_done(tmp_path / "cut"):
                with suppress(DeadlineReached):
                    stops += 1
                    run_task(
                        config, tmp_path / "cut", task, device="cpu", deadline=0.0
                    )  # the deadline stops it after every step
        assert stops >= config.joint_steps + config.steps
        assert everything(tmp_path / "cut") == everything(tmp_path / "whole")

    @pytest.mark.parametrize("gone", ["seed-*/*/weights.safetensors", "seed-*/*/**/*.safetensors", "seed-*/*/st*"])
    @pytest.mark.slow
    def test_deleted_weights_are_trained_again_if_needed(self, tmp_path, gone):
        """Rows and costs may be kept without weights and states."""
        config, planned = small_study(), plan_tasks(small_study(), select_methods(["mutual"], [0]))
        for task in planned:
            run_task(config, tmp_path, task, device="cpu", deadline=float("inf"))
        before = everything(tmp_path)
        for folder in [*tmp_path.glob(gone), *tmp_path.glob("seed-*/*/weights.safetensors")]:
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)
        assert pending_tasks(tmp_path, planned) == []
        (tmp_path / "rows" / f"{planned[-1].name}.json").unlink()
        left = pending_tasks(tmp_path, planned)
        assert [task.name for task in left] == ["seed-0-joint", "seed-0-mutual", planned[-1].name]
        assert [task.is_ready(tmp_path) for task in left] == [True, False, False]
        for task in left:
            run_task(config, tmp_path, task, device="cpu", deadline=float("inf"))
        assert everything(tmp_path) == before
        assert all(cost["cpu_seconds"] > 0 for cost in load_costs(tmp_path))

    @pytest.mark.slow
    def test_every_method_trains(self, tmp_path):
        config = small_study()
        run_task(config, tmp_path, StudyTask(kind="train", method="joint", seed=0), device="cpu", deadline=float("inf"))
        for name in BASELINES:
            task = StudyTask(kind="train", method=name, seed=0)
            run_task(config, tmp_path, task, device="cpu", deadline=float("inf"))
            last = json.loads((task.result_path(tmp_path).parent / "log.jsonl").read_text().splitlines()[-1])
            terms = {key.split("/")[0] for key in last if "/" in key} - {"gradient_norm"}
            assert terms == TERMS[name], name

    def test_self_forcing_starts_from_the_few_step_network_of_row_b(self, tmp_path):
        """Its training is planned even where its scores are not wanted; the frozen teacher is the joint network."""
        config = small_study()
        planned = plan_tasks(config, select_methods(["self_forcing"], [0]))
        trained = [task for task in planned if task.kind == "train"]
        assert [task.method for task in trained] == ["joint", "shortcut_forced", "self_forcing"]
        assert not any(task.method == "shortcut_forced" for task in planned if task.kind == "score")
        for task in trained:
            assert task.is_ready(tmp_path)
            run_task(config, tmp_path, task, device="cpu", deadline=float("inf"))
        trainer = _build_trainer(config, tmp_path, trained[-1], "cpu")
        few = load_file(tmp_path / "seed-0" / "shortcut_forced" / "weights.safetensors")
        joint = load_file(tmp_path / "seed-0" / "joint" / "weights.safetensors")
        assert all(torch.equal(few[name], weight.cpu()) for name, weight in trainer.engines["student"].weights())
        assert all(torch.equal(joint[name], p) for name, p in trainer._teacher.named_parameters())
        assert trainer.config.method.fake_updates == 5

    def test_each_ablation_changes_a_valid_configuration(self):
        """Every ablation differs from the method and is valid for both presets."""
        for preset in ("toy-study", "quick"):
            whole = study_preset(preset)
            changed = [METHODS[name].change(whole) for name in ABLATIONS]
            assert whole not in changed
            assert len({repr(c) for c in changed}) == len(ABLATIONS)
            slow = replace(whole, optim=replace(whole.optim, lr=whole.optim.lr * 2 / 3))
            five = replace(slow, method=replace(slow.method, fake_updates=5))
            own = {"dmd_forced": slow, "dmd_self_forcing": replace(slow, fake_ratio=4.0), "self_forcing": five}
            for name in BASELINES:
                assert METHODS[name].change(whole) == own.get(name, whole)

    def test_less_free_keeps_the_finest_level_shares(self):
        """The finest level is on every real row, on no coupled row and on half of the free rows."""
        for config in (study_preset("toy-study"), METHODS["less_free"].change(study_preset("toy-study"))):
            cycle = list(zip(config.method.rows, config.method.finest_rows, strict=True))
            share = {kind: [finest for k, finest in cycle if k == kind] for kind in ("real", "coupled", "free")}
            assert {kind: sum(some) / len(some) for kind, some in share.items()} == {
                "real": 1,
                "coupled": 0,
                "free": 0.5,
            }
            assert sum(config.method.finest_rows) / len(cycle) == 0.5
            assert config.batch % len(cycle) == 0
        assert len(share["free"]) / len(cycle) == 0.25

    @pytest.mark.parametrize(("name", "label"), [("mutual", 1.0), ("no_label", None), ("joint", None)])
    def test_rollout_uses_the_trust_label_only_if_trained(self, tmp_path, monkeypatch, name, label):
        """Without training, the label embedding has untrained weights."""
        labels = []

        def spy(*args, trust, **kwargs):
            labels.append(None if trust is None else set(trust.tolist()))
            return rollout(*args, trust=trust, **kwargs)

        monkeypatch.setattr(tasks, "rollout", spy)
        mode = "few" if name in METHODS else "multi"
        score = StudyTask(kind="score", method=name, seed=0, mode=mode, steps=2)
        for task in [
            StudyTask(kind="train", method="joint", seed=0),
            StudyTask(kind="train", method=name, seed=0),
            score,
        ]:
            if not task.is_done(tmp_path):
                run_task(small_study(), tmp_path, task, device="cpu", deadline=float("inf"))
        assert labels == [None if label is None else {label}] * 2  # long and short clips

    def test_the_few_step_mode_is_scored_with_each_sampler(self, tmp_path):
        config = replace(small_study(), samplers=("deterministic", "renoise"))
        planned = plan_tasks(config, select_methods(["mutual"], [0]))
        assert len({task.name for task in planned}) == len(planned)
        few = [task for task in planned if task.kind == "score" and task.mode == "few"]
        assert [(task.steps, task.sampler) for task in few] == [
            (1, "deterministic"),
            (2, "deterministic"),
            (1, "renoise"),
            (2, "renoise"),
        ]
        assert all(task.sampler == "deterministic" for task in planned if task.mode == "multi")
        for task in planned:
            if task.kind == "train" or task in few:
                run_task(config, tmp_path, task, device="cpu", deadline=float("inf"))
        rows = {(r["steps"], r.get("sampler")): r["metrics"] for r in load_scores(tmp_path) if r["window"] == "0-1"}
        assert rows[1, None]["frechet"] == rows[1, "renoise"]["frechet"]  # one step has no noise to add
        assert rows[2, None]["frechet"] != rows[2, "renoise"]["frechet"]
        table = ResultTable(load_scores(tmp_path), [])
        titles = [key.series.mode_title for key in table.keys if key.window == "0-1"]
        assert titles == ["few-step", "few-step", "few-step, renoise", "few-step, renoise"]

    def test_ablations_are_scored_at_four_and_eight_steps(self):
        planned = plan_tasks(study_preset("toy-study"), select_methods(["ablations"], [0]))
        steps = {task.steps for task in planned if task.kind == "score" and task.method in ABLATIONS}
        assert steps == {4, 8}

    def test_ablations_train(self, tmp_path):
        run_task(
            small_study(),
            tmp_path,
            StudyTask(kind="train", method="joint", seed=0),
            device="cpu",
            deadline=float("inf"),
        )
        for name in ("low_rank", "online_targets"):
            task = StudyTask(kind="train", method=name, seed=0)
            run_task(small_study(), tmp_path, task, device="cpu", deadline=float("inf"))
            assert task.is_done(tmp_path)

    def test_groups_expand_to_methods(self):
        assert select_methods(["core"], [0, 1, 2]) == {name: [0, 1, 2] for name in GROUPS["core"]}
        found = select_methods(["ablations", "jump_exit"], [3, 4])
        assert {name for name, seeds in found.items() if seeds == [3, 4]} == {"mutual", "jump_exit"}
        assert {tuple(seeds) for seeds in found.values()} == {(3, 4), (3,)}

    @pytest.mark.parametrize(
        ("text", "seeds"), [("3", [0, 1, 2]), ("1", [0]), ("5,3,5", [3, 5]), ("7,", [7]), ("0, 2", [0, 2])]
    )
    def test_seeds_are_a_count_or_a_list(self, text, seeds):
        assert parse_seeds(text) == seeds

    @pytest.mark.parametrize("text", ["0", "", ",", "a", "-1", "1-3", "1,x"])
    def test_invalid_seeds_are_rejected(self, text):
        with pytest.raises(ValueError, match="--seeds"):
            parse_seeds(text)

    def test_other_settings_are_rejected(self, tmp_path):
        config = small_study()
        late = run_tasks(config, tmp_path, {"mutual": range(1)}, workers=1, device="cpu", minutes=1e-9)
        assert not late.done
        with pytest.raises(ValueError, match="steps: 4 -> 9"):
            run_tasks(replace(config, steps=9), tmp_path, {}, workers=1, device="cpu", minutes=None)

    def test_a_study_of_an_earlier_version_continues_with_the_defaults_of_newer_settings(self, tmp_path):
        config = small_study()
        run_tasks(config, tmp_path, {}, workers=1, device="cpu", minutes=None)
        stored = json.loads((tmp_path / "study.json").read_text())
        del stored["model"]["branches"]["video"]["learned_std"]
        (tmp_path / "study.json").write_text(json.dumps(stored))
        assert run_tasks(config, tmp_path, {}, workers=1, device="cpu", minutes=None).done

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"windows": "abc"}, "abc"),
            ({"windows": "0-1,2-"}, r"2- .*\(4 s\)"),
            ({"windows": "0-1,3-5"}, r"3-5 .*\(4 s\)"),
            ({"windows": "0-4", "long_clips": 0}, r"0-4 .*\(3 s\)"),
            ({"windows": "1-1.5"}, "1-1.5"),
            ({"counts": ()}, r"counts=\[\]"),
            ({"counts": (4, 2)}, "ascending"),
            ({"counts": (2, 2)}, "distinct"),
            ({"counts": (0, 2)}, "at least 1"),
            ({"steps": 3}, "steps=3: .* step 3. Raise steps"),
            ({"samplers": ()}, r"samplers=\[\]: give at least one of deterministic, renoise, mixed"),
            ({"samplers": ("euler",)}, "samplers=\\['euler'\\]: give at least one of"),
        ],
        ids=str,
    )
    def test_invalid_settings_are_rejected_before_training(self, change, message):
        with pytest.raises(ValueError, match=message):
            replace(small_study(), **change)

    def test_guidance_of_one_adds_no_tasks(self):
        planned = plan_tasks(replace(small_study(), guidance=1.0), select_methods(["teacher_forcing"], [0]))
        assert len({task.name for task in planned}) == len(planned)

    @pytest.mark.slow
    def test_failed_task_skips_only_its_dependents(self, tmp_path):
        begun = tmp_path / "seed-0" / "mutual" / "step.json"
        claim_study_dir(small_study(), tmp_path)
        begun.parent.mkdir(parents=True)
        begun.write_text("{")
        lines = []
        methods = select_methods(["mutual", "teacher_forcing"], [0])
        outcome = run_tasks(small_study(), tmp_path, methods, workers=2, device="cpu", minutes=None, log=lines.append)
        assert outcome.done
        assert list(outcome.failed) == ["seed-0-mutual"]
        assert str(begun) in outcome.failed["seed-0-mutual"]
        assert any("Skipped 3 dependent tasks" in line for line in lines)
        assert {one["method"] for one in load_scores(tmp_path)} == {"real", "joint", "teacher_forcing"}
        begun.unlink()  # the remedy of the message
        assert run_tasks(small_study(), tmp_path, methods, workers=2, device="cpu", minutes=None) == StudyOutcome(
            done=True
        )

    @pytest.mark.parametrize("text", ["[{", "[]", "{}", '[{"metrics": {}}]', '["row"]'])
    def test_corrupt_score_file_is_named(self, tmp_path, text):
        done = published_study_dir()
        (tmp_path / "rows").mkdir()
        shutil.copy(next(done.glob("rows/seed-0-mutual-few-4.json")), tmp_path / "rows")
        assert len(load_scores(tmp_path)) == 4
        (tmp_path / "rows" / "seed-0-mutual-few-8.json").write_text(text)
        with pytest.raises(ValueError, match=r"seed-0-mutual-few-8.json is damaged: move it away"):
            load_scores(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_folder_with_other_files_is_rejected(self, tmp_path, text):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(ValueError, match="choose a new folder"):
            claim_study_dir(small_study(), tmp_path)
        assert (tmp_path / "study.json").read_text() == text

    def test_file_as_output_folder_is_rejected(self, tmp_path):
        (tmp_path / "notes").write_text("mine")
        for place in (tmp_path / "notes", tmp_path / "notes" / "study"):
            with pytest.raises(ValueError, match="--out"):
                claim_study_dir(small_study(), place)

    @pytest.mark.parametrize(
        ("given", "found"),
        [
            ((False, None, None, None), ("toy-study", "3", ["all"])),
            ((True, None, None, None), ("quick", "1", ["quick"])),
            ((True, "quick", "2", "mutual,literal"), ("quick", "2", ["mutual", "literal"])),
            ((False, "quick", "3,4", None), ("quick", "3,4", ["all"])),
        ],
    )
    def test_quick_keeps_explicit_options(self, given, found):
        assert tuple(_scope(*given).values()) == found

    def test_quick_with_another_preset_is_rejected(self):
        with pytest.raises(ValueError, match="--preset toy-study"):
            _scope(True, "toy-study", None, None)

    def test_unknown_device_is_rejected_before_any_file(self, tmp_path):
        options = {"preset": "quick", "seeds": "1", "methods": ["quick"], "workers": 1, "minutes": 1e-9}
        with pytest.raises(ValueError, match="--device foo"):
            study_report.run_study(out=str(tmp_path / "x"), device="foo", sets=[], dry_run=True, tracking="", **options)
        assert not (tmp_path / "x").exists()

    @pytest.mark.slow
    def test_imported_networks_are_sampled_with_other_settings(self, tmp_path):
        config, (here, there) = small_study(), (tmp_path / "here", tmp_path / "there")
        claim_study_dir(config, here)
        for name in ("joint", "mutual", "literal"):
            run_task(config, here, StudyTask(kind="train", method=name, seed=0), device="cpu", deadline=float("inf"))
        other = replace(config, counts=(3,), windows="0-2", long_seconds=5.0)
        claim_study_dir(other, there)
        (there / "seed-0" / "mutual").mkdir(parents=True)  # an interrupted copy
        assert import_networks(other, here, there, {"mutual": range(1)}) == 2
        planned = plan_tasks(other, {"mutual": range(1)})
        assert {task.kind for task in pending_tasks(there, planned)} == {"score"}
        for task in pending_tasks(there, planned):
            run_task(other, there, task, device="cpu", deadline=float("inf"))
        assert {(r["method"], r["steps"], r["window"]) for r in load_scores(there)} == {
            (m, n, "0-2") for m, n in [("real", 0), ("joint", 4), ("joint", 3), ("mutual", 3)]
        }
        costs = {c["method"]: c for c in load_costs(here)}
        assert load_costs(there) == [costs["joint"], costs["mutual"]]
        assert import_networks(other, here, there, {"mutual": range(1)}) == 0  # existing networks are kept

    def test_claims_need_more_than_four_steps_for_comparison(self):
        done = published_study_dir()
        table = ResultTable(load_scores(done), load_costs(done))
        assert [sum("4 Euler" in claim.claim for claim in check_claims(table, most)) for most in (50, 4)] == [2, 0]

    def test_networks_with_other_training_settings_are_rejected(self, tmp_path):
        config, (here, there) = small_study(), (tmp_path / "here", tmp_path / "there")
        with pytest.raises(ValueError, match="holds no study"):
            import_networks(config, here, there, {"mutual": range(1)})
        assert not run_tasks(config, here, {"mutual": range(1)}, workers=1, device="cpu", minutes=1e-9).done
        with pytest.raises(ValueError, match=r"\(fake_ratio: 1.0 -> 3.0; steps: 4 -> 9\)"):
            import_networks(replace(config, steps=9, fake_ratio=3.0, clips=5), here, tmp_path / "third", {})
        assert import_networks(config, here, there, {"mutual": range(1)}) == 0  # none is trained yet

    def test_unknown_method_is_rejected(self):
        with pytest.raises(ValueError, match="teacher_forcing"):
            select_methods(["teacher"], [0])


TERMS = {
    "teacher_forcing": {"flow_matching"},
    "shortcut_forced": {"flow_matching", "shortcut"},
    "dmd_forced": {"flow_matching", "dmd", "fake_score"},
    "dmd_self_forcing": {"dmd", "fake_score"},
    "self_forcing": {"dmd", "fake_score"},
    "hybrid_forced": {"flow_matching", "shortcut", "dmd", "fake_score"},
    "shortcut_only": {"flow_matching", "shortcut"},
    "dmd_only": {"flow_matching", "dmd", "fake_score"},
    "literal": {"flow_matching", "shortcut", "dmd", "fake_score"},
    "mutual": {"flow_matching", "shortcut", "dmd", "fake_score"},
}


class TestTracking:
    """MLflow shows the results on disk, also after moves between machines and additions."""

    @pytest.fixture
    def publish(self, tmp_path, monkeypatch):
        """Return a function that runs the command on published rows, with no pending task."""
        monkeypatch.setattr(study_report, "_draw_plots", lambda rows, folder: [])
        done, out = published_study_dir(), tmp_path / "study"

        def run(seeds: int, store: str | None) -> str | None:
            files = [done / "study.json"]
            for s in range(seeds):
                for name in ("joint", "mutual", "real"):
                    files += [*done.glob(f"seed-{s}/{name}/train.json"), *done.glob(f"rows/seed-{s}-{name}-*.json")]
            for file in files:
                (out / file.relative_to(done)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, out / file.relative_to(done))
            monkeypatch.setenv("MFCTL_TRACKER", "" if store else "json")
            answer = study_report.run_study(
                out=str(out),
                preset="toy-study",
                seeds=str(seeds),
                methods=["mutual"],
                device="cpu",
                workers=1,
                minutes=1e-9,  # no task would run
                sets=[],
                dry_run=False,
                tracking=store or "",
            )
            return answer["mlflow_parent_run"]

        return run

    @pytest.mark.slow
    def test_store_receives_missing_results(self, tmp_path, publish):
        from mlflow import MlflowClient

        store, other = (f"sqlite:///{tmp_path}/{name}.db" for name in ("here", "there"))
        client = MlflowClient(tracking_uri=store)

        def runs():
            experiment = client.get_experiment_by_name("study")
            assert experiment
            return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}

        assert publish(1, None) is None  # a machine without MLflow; the folder then moves to one with it
        parent = publish(1, store)
        first = runs()
        assert set(first) == {"study", "joint-multi", "mutual-few", "mutual-multi"}
        assert first["study"].info.run_id == parent
        assert {run.data.tags.get("mlflow.parentRunId") for run in first.values()} == {None, parent}
        rows = {s: self.row("mutual", "few", 4, s) for s in (0, 1)}
        assert self.at(client, first["mutual-few"], 4) == [rows[0]]
        assert publish(1, store) == parent
        assert self.at(client, runs()["mutual-few"], 4) == [rows[0]]  # not logged twice
        assert publish(2, store) == parent
        second = runs()
        assert {name: run.info.run_id for name, run in second.items()} == {n: r.info.run_id for n, r in first.items()}
        assert self.at(client, second["mutual-few"], 4)[-1] == pytest.approx((rows[0] + rows[1]) / 2)
        assert publish(2, other) != parent
        assert len(runs()) == len(first)

    @staticmethod
    def row(method: str, mode: str, steps: int, seed: int) -> float:
        done = published_study_dir() / "rows" / f"seed-{seed}-{method}-{mode}-{steps}.json"
        return next(r["metrics"]["frechet"] for r in json.loads(done.read_text()) if r["window"] == "15-25")

    @staticmethod
    def at(client, run, nfe: int) -> list[float]:
        """Return the logged values at one NFE, oldest first."""
        history = client.get_metric_history(run.info.run_id, "15-25/frechet")
        return [m.value for m in sorted(history, key=lambda m: m.timestamp) if m.step == nfe]
