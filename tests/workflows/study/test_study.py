"""The study: its world and readers, its bars, and a whole small one that is interrupted."""

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

from mfcore.metrics.windows import TimeWindow
from mfcore.rollout import rollout
from mfcore.types import AUDIO, VIDEO
from tests.helpers.published_study import published_study_dir
from workflows.cli.study import _which
from workflows.study import latent_world, plots, tasks
from workflows.study import study as study_report
from workflows.study.claims import check_claims
from workflows.study.config import StudyConfig, study_preset
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
from workflows.study.tasks import DeadlineReached, StudyTask, pending_tasks, plan_tasks, run_task

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
    """The clips' streams with one modality's latents changed."""
    streams = dict(clips.batch.streams)
    return streams | {modality: streams[modality].with_latents(how(streams[modality].latents))}


def moved(clips, modality, where, by):
    """The clips' streams with a factor changed."""
    turn = latent_world.mixing_matrix(modality)

    def how(latents):
        factors = read_factors(modality, latents)
        factors[..., where] = by(factors[..., where])
        return (factors @ turn).reshape(latents.shape)

    return change(clips, modality, how)


class TestWorld:
    def test_a_clip_depends_on_its_number_alone(self):
        some = sample_clips(0, torch.tensor([5, 3]), 4)
        one = sample_clips(0, torch.tensor([3]), 4)
        for m in (VIDEO, AUDIO):
            assert torch.allclose(some.batch.streams[m].latents[1:], one.batch.streams[m].latents, atol=1e-6)

    def test_latents_stand_on_the_timeline_and_are_mixed_by_a_rotation(self, clips):
        for m in (VIDEO, AUDIO):
            assert clips.batch.streams[m].latents.shape[1] == latent_world.TIMELINE.count(m, 10)
            turn = latent_world.mixing_matrix(m)
            assert torch.allclose(turn @ turn.T, torch.eye(len(turn)), atol=1e-5)

    def test_choices_are_separated_by_twenty_spreads(self, clips):
        video = read_factors(VIDEO, clips.batch.streams[VIDEO].latents)
        brow = video[..., latent_world.BROW].flatten()
        assert 2 / brow[brow > 0].std() == pytest.approx(20, rel=0.1)

    @pytest.mark.parametrize("voices", [latent_world.VOICES, 8])
    def test_a_voice_is_one_of_a_few_and_stays(self, real, voices):
        streams = sample_clips(0, MANY, 10, voices).batch.streams
        voice = read_factors(AUDIO, streams[AUDIO].latents)[..., latent_world.VOICE]
        far = torch.cdist(voice, latent_world.voice_means(voices))
        assert (far.argmin(-1) == far.argmin(-1)[:, :1]).all()
        assert far.min(-1).values.max() < 6 * latent_world.NOISE
        assert real["voice_error"] < 0.03
        assert torch.equal(torch.unique(far[:, 0].argmin(-1)), torch.arange(voices))

    def test_the_first_frame_tells_no_voice(self):
        many = sample_clips(0, torch.arange(2000), 1)
        first = read_factors(VIDEO, many.batch.cond.first_frame[:, None])[:, 0]
        both = torch.cat([first, many.truth.voice], dim=1).T
        assert both.corrcoef()[: len(first.T), len(first.T) :].abs().max() < 0.08  # 3.6 / sqrt(2000)

    def test_pose_goes_on_across_chunks_and_gestures_stay(self, real):
        assert real["gesture_flips"] == pytest.approx(0.15, abs=0.04)
        assert real["seam"] == pytest.approx(1, abs=0.1)


class TestScores:
    def test_real_clips_are_right(self, real):
        assert real["valid"] > 0.99
        assert real["syllable_error"] < 0.02
        assert real["sync"] > 0.95
        assert real["identity_error"] < 0.03
        assert real["entropy"] > 0.99
        assert real["motion"] == pytest.approx(1, abs=0.1)
        assert real["failed"] == 0

    def test_more_noise_is_worse(self, clips, ref, real):
        before = real
        for scale in (0.2, 0.6):
            noisy = change(clips, VIDEO, lambda x, scale=scale: x + scale * torch.randn_like(x))
            now = score_window(noisy, clips.truth, WHOLE, ref)
            assert now["frechet"] > before["frechet"]
            assert now["valid"] < before["valid"]
            assert now["sync"] < before["sync"]
            before = now

    def test_another_clips_sound_is_out_of_sync_and_says_the_wrong_thing(self, clips, ref):
        now = score_window(change(clips, AUDIO, lambda x: x.roll(1, 0)), clips.truth, WHOLE, ref)
        assert abs(now["sync"]) < 0.15
        assert now["syllable_error"] > 0.7

    def test_late_sound_is_seen(self, clips, ref):
        now = score_window(change(clips, AUDIO, lambda x: x.roll(2, 1)), clips.truth, WHOLE, ref)
        assert now["offset_ms"] == pytest.approx(250, abs=30)

    def test_a_jump_at_every_border_is_seam_energy(self, clips, ref):
        jump = 2.0 * (clips.batch.streams[VIDEO].chunk % 2)[:, None]
        now = score_window(moved(clips, VIDEO, latent_world.POSE, lambda x: x + jump), clips.truth, WHOLE, ref)
        assert now["seam"] > 10

    def test_another_face_is_an_identity_error(self, clips, ref):
        now = score_window(moved(clips, VIDEO, latent_world.IDENTITY, lambda x: x + 0.5), clips.truth, WHOLE, ref)
        assert now["identity_error"] == pytest.approx(0.5, abs=0.02)

    def test_a_voice_that_changes_on_the_way_is_a_voice_error(self, clips, ref, real):
        late = (clips.batch.streams[AUDIO].chunk >= 5)[:, None] * 0.5
        now = score_window(
            moved(clips, AUDIO, latent_world.VOICE, lambda x: x + late), clips.truth, TimeWindow(start=2.5, end=5), ref
        )
        assert now["voice_error"] == pytest.approx(0.5, abs=0.02)
        assert now["voice_changes"] == 0
        assert now["frechet"] > 100 * real["frechet"]  # 0.5 is 16 spreads of a chunk's mean

    def test_a_clip_that_ends_with_another_voice_has_changed_it(self, clips, ref, real):
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

    def test_another_voice_from_the_start_is_none(self, clips, ref, real):
        """Which of them speaks is free: the first frame does not say."""
        now = score_window(moved(clips, AUDIO, latent_world.VOICE, lambda x: -x), clips.truth, WHOLE, ref)
        assert now["voice_error"] == pytest.approx(real["voice_error"], abs=1e-4)
        assert now["frechet"] == pytest.approx(real["frechet"], rel=0.1)

    def test_one_choice_for_all_is_no_entropy(self, clips, ref):
        now = score_window(moved(clips, VIDEO, latent_world.BROW, lambda x: x.abs()), clips.truth, WHOLE, ref)
        assert now["entropy"] == pytest.approx(0.8, abs=0.02)

    def test_one_voice_for_all_is_no_voice_entropy(self, clips, ref, real):
        def lone(voice):
            return voice - clips.truth.voice[:, None] + clips.truth.voices[0]

        now = score_window(moved(clips, AUDIO, latent_world.VOICE, lone), clips.truth, WHOLE, ref)
        assert now["voice_entropy"] == 0
        assert real["voice_entropy"] > 0.95

    def test_numbers_that_are_not_finite_fail(self, clips, ref):
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
    """Rows of a study whose claims hold, with changes to what Mutual Forcing does early on at 4 steps."""
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


class TestBars:
    def test_claims_that_hold(self):
        found = check_claims(made_up(), 50)
        assert len(found) == 20
        assert all(bar.met for bar in found), [bar for bar in found if not bar.met]

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
        missed = [bar.claim for bar in check_claims(made_up(**change), 50) if not bar.met]
        assert any(claim in text for text in missed)

    def test_growth_is_counted_beyond_that_of_real_clips(self):
        """The same numbers, but real clips of the later window measure 0.4 more: nothing has grown then."""
        windows = [("0-5", 0.0), ("15-25", 0.4)]
        rows = [row("real", "multi", 0, w, frechet=0.1 + more) for w, more in windows]
        rows += [row("hybrid_forced", "few", 4, w, frechet=0.5 + 2 * more) for w, more in windows]
        rows += [row("mutual", "few", 4, w, frechet=0.5 + more) for w, more in windows]
        (bar,) = [b for b in check_claims(ResultTable(rows, []), 50) if b.claim.startswith("frechet: growth")]
        assert (bar.measured, bar.met) == ("0.000 against 0.400", True)

    def test_what_is_compared_is_of_the_same_seeds(self):
        """A seed that the other row has not is in no bar: its values would be in one mean, and not in the other."""
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
    def test_who_does_not_grow_grows_by_no_more_than_half(self, ours, theirs, met):
        rows = [row("real", "multi", 0, w, frechet=0.1) for w in ("0-5", "15-25")]
        for name, growth in (("mutual", ours), ("hybrid_forced", theirs)):
            rows += [row(name, "few", 4, w, frechet=0.5 + g) for w, g in (("0-5", 0.0), ("15-25", growth))]
        (bar,) = [b for b in check_claims(ResultTable(rows, []), 50) if b.claim.startswith("frechet: growth")]
        assert bar.met is met

    def test_without_guidance_it_is_many_steps_that_are_met(self):
        rows, costs = made_up_rows(), made_up_costs()
        plain = [r | {"guidance": 1.0} for r in rows if r["guidance"] == 1.0 or r["window"] == "15-25"]
        found = check_claims(ResultTable(plain, costs), 50)
        assert len(found) == 20
        assert sum("teacher forcing at 50" in bar.claim for bar in found) == 6

    def test_the_page_says_what_was_missed(self):
        page = to_markdown(made_up(valid=0.8), 50)
        assert "MISSED" in page
        assert "h) Mutual Forcing" in page

    def test_an_ablation_stands_beside_the_method_on_the_same_seeds(self):
        """Seed 1 of the unchanged method would hide, in a mean, what one change does on seed 0."""
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
            if (name, steps) != ("no_label", 8)  # not asked yet
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


class TestPictures:
    def test_ablations_have_a_picture_of_their_own(self, tmp_path, monkeypatch):
        """What is drawn, by its axes: rows of ablations neither crowd the other plots nor are they lost."""
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


def small() -> StudyConfig:
    whole = study_preset("quick")
    return replace(
        whole,
        model=replace(whole.model, dim=16, layers=1, heads=1),
        joint_batch=4,
        joint_chunks=(3,),
        joint_steps=3,
        batch=4,
        chunks=(3,),
        steps=4,
        method=replace(whole.method, real_until=1, free_from=2, fake_from=2, dmd_from=3, dmd_ramp=1),
        counts=(1, 2),
        clips=3,
        seconds=3.0,
        long_clips=1,
        long_seconds=4.0,
        windows="0-1,1-3,3-4",
    )


def everything(out):
    """Files that count, without what depends on the clock."""
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
    def test_workers_end_with_a_study_that_is_killed(self, tmp_path):
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

    def test_an_interrupted_study_ends_as_one_that_was_not(self, tmp_path):
        config, methods = small(), select_methods(["mutual"], [0])
        for task in plan_tasks(config, methods):
            run_task(config, tmp_path / "whole", task, device="cpu", deadline=float("inf"))
        stops = 0
        for task in plan_tasks(config, methods):
            while not task.is_done(tmp_path / "cut"):
                with suppress(DeadlineReached):
                    stops += 1
                    run_task(
                        config, tmp_path / "cut", task, device="cpu", deadline=0.0
                    )  # the time is up after every step
        assert stops >= config.joint_steps + config.steps
        assert everything(tmp_path / "cut") == everything(tmp_path / "whole")

    @pytest.mark.parametrize("gone", ["seed-*/*/weights.safetensors", "seed-*/*/**/*.safetensors", "seed-*/*/st*"])
    def test_weights_that_are_gone_are_made_again_where_they_are_needed(self, tmp_path, gone):
        """Rows and costs are small and can be kept, weights and states are not."""
        config, planned = small(), plan_tasks(small(), select_methods(["mutual"], [0]))
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

    def test_every_method_trains(self, tmp_path):
        config = small()
        run_task(config, tmp_path, StudyTask(kind="train", method="joint", seed=0), device="cpu", deadline=float("inf"))
        for name in BASELINES:
            task = StudyTask(kind="train", method=name, seed=0)
            run_task(config, tmp_path, task, device="cpu", deadline=float("inf"))
            last = json.loads((task.result_path(tmp_path).parent / "log.jsonl").read_text().splitlines()[-1])
            terms = {key.split("/")[0] for key in last if "/" in key} - {"gradient_norm"}
            assert terms == TERMS[name], name

    def test_an_ablation_is_one_change_that_holds(self):
        """Each is another configuration than the method's, valid for both presets."""
        for preset in ("toy-study", "quick"):
            whole = study_preset(preset)
            changed = [METHODS[name].change(whole) for name in ABLATIONS]
            assert whole not in changed
            assert len({repr(c) for c in changed}) == len(ABLATIONS)
            slow = replace(whole, optim=replace(whole.optim, lr=whole.optim.lr * 2 / 3))
            own = {"dmd_forced": slow, "dmd_self_forcing": replace(slow, fake_ratio=4.0)}
            for name in BASELINES:
                assert METHODS[name].change(whole) == own.get(name, whole)

    def test_rows_that_are_less_free_differ_in_that_alone(self):
        """Where ShortCut's finest level stands: on every real row, on no coupled one, on half of the free ones."""
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
    def test_networks_are_asked_with_the_label_that_they_were_trained_with(self, tmp_path, monkeypatch, name, label):
        """A network that has learned no label would meet untrained weights in it."""
        told = []

        def spy(*args, trust, **kwargs):
            told.append(None if trust is None else set(trust.tolist()))
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
                run_task(small(), tmp_path, task, device="cpu", deadline=float("inf"))
        assert told == [None if label is None else {label}] * 2  # the clips that go on, and the others

    def test_ablations_are_asked_where_bars_are(self):
        planned = plan_tasks(study_preset("toy-study"), select_methods(["ablations"], [0]))
        steps = {task.steps for task in planned if task.kind == "score" and task.method in ABLATIONS}
        assert steps == {4, 8}

    def test_an_ablation_trains(self, tmp_path):
        run_task(
            small(), tmp_path, StudyTask(kind="train", method="joint", seed=0), device="cpu", deadline=float("inf")
        )
        for name in ("low_rank", "online_targets"):
            task = StudyTask(kind="train", method=name, seed=0)
            run_task(small(), tmp_path, task, device="cpu", deadline=float("inf"))
            assert task.is_done(tmp_path)

    def test_groups_name_methods(self):
        assert select_methods(["core"], [0, 1, 2]) == {name: [0, 1, 2] for name in GROUPS["core"]}
        found = select_methods(["ablations", "jump_exit"], [3, 4])
        assert {name for name, seeds in found.items() if seeds == [3, 4]} == {"mutual", "jump_exit"}
        assert {tuple(seeds) for seeds in found.values()} == {(3, 4), (3,)}

    @pytest.mark.parametrize(
        ("text", "seeds"), [("3", [0, 1, 2]), ("1", [0]), ("5,3,5", [3, 5]), ("7,", [7]), ("0, 2", [0, 2])]
    )
    def test_seeds_are_so_many_or_these(self, text, seeds):
        assert parse_seeds(text) == seeds

    @pytest.mark.parametrize("text", ["0", "", ",", "a", "-1", "1-3", "1,x"])
    def test_seeds_that_are_none_are_refused(self, text):
        with pytest.raises(ValueError, match="--seeds"):
            parse_seeds(text)

    def test_other_settings_are_refused(self, tmp_path):
        config = small()
        late = run_tasks(config, tmp_path, {"mutual": range(1)}, workers=1, device="cpu", minutes=1e-9)
        assert not late.done
        with pytest.raises(ValueError, match="steps: 4 -> 9"):
            run_tasks(replace(config, steps=9), tmp_path, {}, workers=1, device="cpu", minutes=None)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"windows": "abc"}, "no window of time"),
            ({"windows": "0-1,2-"}, "2- ends after the longest clip, at 4 s"),
            ({"windows": "0-1,3-5"}, "3-5 ends after the longest clip, at 4 s"),
            ({"windows": "0-4", "long_clips": 0}, "0-4 ends after the longest clip, at 3 s"),
            ({"windows": "1-1.5"}, "shorter than two chunks"),
            ({"counts": ()}, "numbers of steps"),
            ({"counts": (4, 2)}, "in rising order"),
            ({"counts": (2, 2)}, "each once"),
            ({"counts": (0, 2)}, "numbers of steps"),
            ({"steps": 3}, "last phase begins at step 3"),
        ],
        ids=str,
    )
    def test_what_would_fail_after_training_is_refused_before(self, change, says):
        with pytest.raises(ValueError, match=says):
            replace(small(), **change)

    def test_guidance_of_one_is_none(self):
        planned = plan_tasks(replace(small(), guidance=1.0), select_methods(["teacher_forcing"], [0]))
        assert len({task.name for task in planned}) == len(planned)

    def test_a_unit_that_fails_stops_no_other(self, tmp_path):
        begun = tmp_path / "seed-0" / "mutual" / "step.json"
        claim_study_dir(small(), tmp_path)
        begun.parent.mkdir(parents=True)
        begun.write_text("{")
        lines = []
        methods = select_methods(["mutual", "teacher_forcing"], [0])
        outcome = run_tasks(small(), tmp_path, methods, workers=2, device="cpu", minutes=None, log=lines.append)
        assert outcome.done
        assert list(outcome.failed) == ["seed-0-mutual"]
        assert str(begun) in outcome.failed["seed-0-mutual"]
        assert any("with it 3 tasks that need it" in line for line in lines)
        assert {one["method"] for one in load_scores(tmp_path)} == {"real", "joint", "teacher_forcing"}
        begun.unlink()  # as the message says
        assert run_tasks(small(), tmp_path, methods, workers=2, device="cpu", minutes=None) == StudyOutcome(done=True)

    @pytest.mark.parametrize("text", ["[{", "[]", "{}", '[{"metrics": {}}]', '["row"]'])
    def test_rows_that_are_none_are_named(self, tmp_path, text):
        done = published_study_dir()
        (tmp_path / "rows").mkdir()
        shutil.copy(next(done.glob("rows/seed-0-mutual-few-4.json")), tmp_path / "rows")
        assert len(load_scores(tmp_path)) == 4
        (tmp_path / "rows" / "seed-0-mutual-few-8.json").write_text(text)
        with pytest.raises(ValueError, match=r"seed-0-mutual-few-8.json is damaged: move it away"):
            load_scores(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_a_folder_of_another_program_is_refused(self, tmp_path, text):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(ValueError, match="choose a new folder"):
            claim_study_dir(small(), tmp_path)
        assert (tmp_path / "study.json").read_text() == text

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "notes").write_text("mine")
        for place in (tmp_path / "notes", tmp_path / "notes" / "study"):
            with pytest.raises(ValueError, match="is a file|cannot keep a study"):
                claim_study_dir(small(), place)

    @pytest.mark.parametrize(
        ("given", "found"),
        [
            ((False, None, None, None), ("toy-study", "3", ["all"])),
            ((True, None, None, None), ("quick", "1", ["quick"])),
            ((True, "quick", "2", "mutual,literal"), ("quick", "2", ["mutual", "literal"])),
            ((False, "quick", "3,4", None), ("quick", "3,4", ["all"])),
        ],
    )
    def test_quick_leaves_what_is_said(self, given, found):
        assert tuple(_which(*given).values()) == found

    def test_quick_is_no_other_preset(self):
        with pytest.raises(ValueError, match="leave out --preset toy-study"):
            _which(True, "toy-study", None, None)

    def test_a_device_that_is_none_is_refused_before_anything(self, tmp_path):
        words = {"preset": "quick", "seeds": "1", "methods": ["quick"], "workers": 1, "minutes": 1e-9}
        with pytest.raises(ValueError, match="--device foo"):
            study_report.run_study(out=str(tmp_path / "x"), device="foo", sets=[], dry_run=True, tracking="", **words)
        assert not (tmp_path / "x").exists()

    def test_a_limit_of_no_time_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="leave it out"):
            run_tasks(small(), tmp_path, {}, workers=1, device="cpu", minutes=0)

    def test_trained_networks_are_sampled_in_another_way(self, tmp_path):
        config, (here, there) = small(), (tmp_path / "here", tmp_path / "there")
        claim_study_dir(config, here)
        for name in ("joint", "mutual", "literal"):
            run_task(config, here, StudyTask(kind="train", method=name, seed=0), device="cpu", deadline=float("inf"))
        other = replace(config, counts=(3,), windows="0-2", long_seconds=5.0)
        claim_study_dir(other, there)
        (there / "seed-0" / "mutual").mkdir(parents=True)  # a copy that was interrupted
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
        assert import_networks(other, here, there, {"mutual": range(1)}) == 0  # what is there stays

    def test_four_steps_are_not_compared_with_themselves(self):
        done = published_study_dir()
        table = ResultTable(load_scores(done), load_costs(done))
        assert [sum("4 Euler" in bar.claim for bar in check_claims(table, most)) for most in (50, 4)] == [2, 0]

    def test_networks_trained_otherwise_are_not_taken(self, tmp_path):
        config, (here, there) = small(), (tmp_path / "here", tmp_path / "there")
        with pytest.raises(ValueError, match="holds no study"):
            import_networks(config, here, there, {"mutual": range(1)})
        assert not run_tasks(config, here, {"mutual": range(1)}, workers=1, device="cpu", minutes=1e-9).done
        with pytest.raises(ValueError, match=r"\(fake_ratio: 1.0 -> 3.0; steps: 4 -> 9\)"):
            import_networks(replace(config, steps=9, fake_ratio=3.0, clips=5), here, tmp_path / "third", {})
        assert import_networks(config, here, there, {"mutual": range(1)}) == 0  # none is trained

    def test_an_unknown_method_is_named(self):
        with pytest.raises(ValueError, match="teacher_forcing"):
            select_methods(["teacher"], [0])


TERMS = {
    "teacher_forcing": {"flow_matching"},
    "shortcut_forced": {"flow_matching", "shortcut"},
    "dmd_forced": {"flow_matching", "dmd", "fake_score"},
    "dmd_self_forcing": {"dmd", "fake_score"},
    "hybrid_forced": {"flow_matching", "shortcut", "dmd", "fake_score"},
    "shortcut_only": {"flow_matching", "shortcut"},
    "dmd_only": {"flow_matching", "dmd", "fake_score"},
    "literal": {"flow_matching", "shortcut", "dmd", "fake_score"},
    "mutual": {"flow_matching", "shortcut", "dmd", "fake_score"},
}


class TestLog:
    """What MLflow shows is what is on disk, whichever machine made it and whatever was added since."""

    @pytest.fixture
    def publish(self, tmp_path, monkeypatch):
        """The command, on committed rows of the first seeds of one method: nothing is left to be done."""
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
                minutes=1e-9,  # whatever were left would not be done
                sets=[],
                dry_run=False,
                tracking=store or "",
            )
            return answer["mlflow_parent_run"]

        return run

    def test_a_store_gets_what_it_has_not(self, tmp_path, publish):
        from mlflow import MlflowClient

        store, other = (f"sqlite:///{tmp_path}/{name}.db" for name in ("here", "there"))
        client = MlflowClient(tracking_uri=store)

        def runs():
            experiment = client.get_experiment_by_name("study")
            assert experiment
            return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}

        assert publish(1, None) is None  # a machine without MLflow, whose folder goes to one with it
        parent = publish(1, store)
        first = runs()
        assert set(first) == {"study", "joint-multi", "mutual-few", "mutual-multi"}
        assert first["study"].info.run_id == parent
        assert {run.data.tags.get("mlflow.parentRunId") for run in first.values()} == {None, parent}
        rows = {s: self.row("mutual", "few", 4, s) for s in (0, 1)}
        assert self.at(client, first["mutual-few"], 4) == [rows[0]]
        assert publish(1, store) == parent
        assert self.at(client, runs()["mutual-few"], 4) == [rows[0]]  # not a second time
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
        """What was logged at a number of evaluations, oldest first."""
        history = client.get_metric_history(run.info.run_id, "15-25/frechet")
        return [m.value for m in sorted(history, key=lambda m: m.timestamp) if m.step == nfe]
