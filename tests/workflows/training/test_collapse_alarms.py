"""A collapse raises alarms, real clips raise none, and sampling does not change the training."""

import json
import logging
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from mfcore.ema import Ema, EmaConfig, ReplicatedWeights
from mfcore.flow import TimeConfig
from mfcore.model.transformer import build_model
from mfcore.timeline import LatentClock, Timeline
from mfcore.types import AUDIO
from preprocessing.dataset.reader import open_dataset
from tests.helpers.analytic_models import LinearGaussian, linear_clips
from tests.helpers.latent_dataset import write_dataset
from tests.helpers.random_exports import random_card
from tests.helpers.small_training import SMALL, killed_at
from workflows.checkpoints.load import load_weights
from workflows.evaluation.held_out import EvaluationSet, select_evaluation_set
from workflows.evaluation.signals import DecodedClip, decode_real_clips
from workflows.training import worker
from workflows.training.collapse_alarms import (
    AlarmStore,
    FakeScoreRatio,
    HistoryUseMonitor,
    active_alarms,
    collapse_statistics,
    compare_to_real,
    fake_score_ratio,
)
from workflows.training.sample_callback import materialize_ema
from workflows.training.samples import final_samples
from workflows.training.train import train_stage


@pytest.fixture(scope="module")
def held(toy_data) -> EvaluationSet:
    return select_evaluation_set(toy_data, clips=2, seconds=None, fraction=0.5)


@pytest.fixture(scope="module")
def real(held) -> list[DecodedClip]:
    return decode_real_clips(held, [p.clip for p in held.prompts])


def frozen(clip: DecodedClip) -> DecodedClip:
    assert clip.frames is not None
    return replace(clip, frames=clip.frames[:1].expand_as(clip.frames))


def louder(clip: DecodedClip, gain: float) -> DecodedClip:
    assert clip.sound is not None
    return replace(clip, sound=clip.sound * gain)


def test_jumps_between_chunks_and_lost_variety_raise_alarms(held, real):
    timeline = held.meta.timeline()

    def jumping(clip: DecodedClip) -> DecodedClip:
        odd = timeline.chunk_index("video", 5)[: len(clip.latents["video"])] % 2
        jump = 3 * clip.latents["video"].std() * odd.reshape(-1, 1, 1, 1)
        return replace(clip, latents={**clip.latents, "video": clip.latents["video"] + jump})

    def same(clip: DecodedClip) -> DecodedClip:
        return replace(clip, latents={m: 0.5 * x for m, x in clip.latents.items()})

    before = collapse_statistics(real, timeline)
    assert before.seam.keys() == before.variance.keys() == {"video", "audio"}
    assert not compare_to_real("few", before, before)[1]
    numbers, wrong = compare_to_real("few", collapse_statistics([jumping(c) for c in real], timeline), before)
    assert numbers["alarm/seam/few/video"] > 2
    assert "seam/few/video" in wrong
    numbers, wrong = compare_to_real("few", collapse_statistics([same(c) for c in real], timeline), before)
    assert numbers["alarm/variance/few/audio"] == pytest.approx(0.25)
    assert {"variance/few/video", "variance/few/audio"} <= wrong.keys()


def test_chunks_without_continuity_raise_an_alarm(held, real):
    """Each chunk is real and from another clip than the previous one."""
    timeline = held.meta.timeline()

    def forgetful(clip: DecodedClip, other: DecodedClip) -> DecodedClip:
        odd = timeline.chunk_index("video", 5)[: len(clip.latents["video"])] % 2 == 1
        mixed = torch.where(odd.reshape(-1, 1, 1, 1), other.latents["video"], clip.latents["video"])
        return replace(clip, latents={**clip.latents, "video": mixed})

    before = collapse_statistics(real, timeline)
    assert before.lag1["video"] > 0.5
    numbers, wrong = compare_to_real(
        "few", collapse_statistics([forgetful(a, b) for a, b in (real, real[::-1])], timeline), before
    )
    assert numbers["alarm/lag1/few/video"] < 0
    assert "of the data's" in wrong["lag1/few/video"] and not any("audio" in name for name in wrong)


def test_chunk_correlation_equals_that_of_the_linear_world():
    """h_k = a h_{k-1} + sqrt(1 - a^2) w: correlation a from chunk to chunk, whatever the latents inside a chunk do."""
    a, draw = 0.9, torch.Generator().manual_seed(0)
    timeline = Timeline(clocks={AUDIO: LatentClock(rate=Fraction(8))}, chunk_seconds=Fraction(1, 2))
    slow = torch.zeros(4000, 1)
    for k in range(1, 4000):
        slow[k] = a * slow[k - 1] + (1 - a**2) ** 0.5 * torch.randn(1, generator=draw)
    latents = slow.repeat_interleave(4, 0) + torch.tensor([-1.0, 1.0, -1.0, 1.0]).repeat(4000)[:, None]
    clip = DecodedClip(frames=None, sound=None, latents={AUDIO: latents}, finite=True, words=())
    assert collapse_statistics([clip], timeline).lag1[AUDIO] == pytest.approx(a, abs=0.02)


class TestHistoryUseMonitor:
    TIME = TimeConfig(shift={AUDIO: 1.0}, uniform_share=1.0)

    def test_a_network_that_ignores_its_history_raises_an_alarm(self, tmp_path):
        """The linear-Gaussian world: teacher forcing has a loss ratio of 10, the literal reading of 1.1."""
        watch = HistoryUseMonitor(tmp_path, [linear_clips(64, 16, 0)], self.TIME, 0)
        numbers, wrong = watch.measure(LinearGaussian(0.95, 0.0, 0.1))
        assert numbers["alarm/history_use/audio"] == pytest.approx(10, rel=0.15)
        assert not wrong
        numbers, wrong = watch.measure(LinearGaussian(0.07, 0.0, 1.0))
        assert numbers["alarm/history_use/audio"] < 1.5
        assert "at the start of the run" in wrong["history_use/audio"]

    def test_the_first_value_is_kept_across_restarts(self, tmp_path):
        HistoryUseMonitor(tmp_path, [linear_clips(64, 16, 0)], self.TIME, 0).measure(LinearGaussian(0.95, 0.0, 0.1))
        again = HistoryUseMonitor(tmp_path, [linear_clips(64, 16, 0)], self.TIME, 0)
        assert again.measure(LinearGaussian(0.07, 0.0, 1.0))[1]

    def test_one_clip_gives_no_history_use(self, tmp_path):
        watch = HistoryUseMonitor(tmp_path, [linear_clips(1, 16, 0)], self.TIME, 0)
        assert watch.measure(LinearGaussian(0.95, 0.0, 0.1)) == ({}, {})


@pytest.mark.parametrize(
    ("collapse", "expected"),
    [
        (frozen, "motion is 0.00 of the data's"),
        (lambda c: louder(c, 0.0), "loudness is 0.00 of the data's"),
        (lambda c: louder(c, 0.6), "loudness is 0.36 of the data's"),
        (lambda c: louder(c, float("nan")), "loudness is nan of the data's"),
        (lambda c: replace(c, finite=False), "non-finite"),
    ],
)
def test_a_planted_collapse_raises_an_alarm(real, collapse, expected):
    _, wrong = compare_to_real("few", collapse_statistics([collapse(clip) for clip in real]), collapse_statistics(real))
    (text,) = wrong.values()
    assert expected in text


def test_real_clips_raise_no_alarm(held, real):
    """Neither the clips of the prompts, slightly quieter, nor other clips of the dataset."""
    others = decode_real_clips(held, held.reference)
    for clips in (real, [louder(clip, 0.8) for clip in real], others):
        numbers, wrong = compare_to_real("few", collapse_statistics(clips), collapse_statistics(real))
        assert wrong == {}
        variances = {f"alarm/variance/few/{m}" for m in ("video", "audio")}
        assert numbers.keys() == {"alarm/motion/few", "alarm/loudness/few"} | variances


def test_static_or_silent_data_raises_no_alarm(real):
    flat = {m: torch.zeros_like(x) for m, x in real[0].latents.items()}
    dead = collapse_statistics([replace(frozen(louder(clip, 0.0)), latents=flat) for clip in real])
    assert compare_to_real("multi", dead, dead) == ({}, {})


def test_a_low_fake_score_loss_raises_an_alarm():
    levels = {"flow_matching/video/t0": 4.0, "flow_matching/video/t3": 1.0, "fake_score/video/t1": 9.0}
    fine = levels | {"fake_score/video": 3.0, "fake_score/video/t0": 3.6, "fake_score/video/t3": 0.9}
    assert fake_score_ratio(fine) == {"video": pytest.approx(0.9)}, "levels that one of them lacks do not count"
    gap = FakeScoreRatio()
    for _ in range(20):
        assert gap.measure(fine) == ({"alarm/fake_over_real/video": pytest.approx(0.9)}, {})
    easy = fine | {"fake_score/video/t0": 0.6, "fake_score/video/t3": 0.4}
    words = [gap.measure(easy)[1] for _ in range(10)]
    assert words[0] == {}, "one batch raises no alarm"
    assert "0.20 of the loss on real clips" in words[-1]["fake_over_real/video"]
    assert gap.measure({"flow_matching/video": 1.0})[0] == {}


def test_alarms_are_logged_on_change_and_kept_across_restarts(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    alarms = AlarmStore(tmp_path)
    for wrong in ({}, {"loudness/few": "few: 0.3"}, {"loudness/few": "few: 0.2"}):
        alarms.update("samples", wrong, 10)
    assert len(caplog.messages) == 1
    again = AlarmStore(tmp_path)
    again.update("fake score", {"fake_over_real/video": "easy"}, 20)
    assert active_alarms(tmp_path) == ["few: 0.2", "easy"]
    again.update("samples", {"motion/few": "still"}, 30)
    assert sorted(active_alarms(tmp_path)) == ["easy", "still"]
    assert [line.split(".")[0] for line in caplog.messages] == [
        "ALARM at step 10: few: 0",
        "ALARM at step 20: easy",
        "ALARM at step 30: still",
        "alarm off at step 30: loudness/few",
    ]


@pytest.mark.slow
def test_sampling_does_not_change_the_training(tmp_path, toy_data, monkeypatch):
    """A killed and resumed run with samples has the weights of a run without. After four steps it has no motion."""
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    sets = (*SMALL, "data.held_out=0.5", "steps=4", "checkpoint.every=8")
    kept = {"data": toy_data, "run": "v"}
    plain = train_stage("video", sets=sets, runs_dir=tmp_path / "plain", launch=worker.run_worker, **kept)
    sampled = {"sets": (*sets, "sample_every=8"), "runs_dir": tmp_path / "looked", "sample": final_samples, **kept}
    with pytest.raises(KeyboardInterrupt):
        train_stage("video", launch=killed_at(3), **sampled)
    result = train_stage("video", launch=worker.run_worker, **sampled)
    folder = Path(result["run_dir"])
    before, after = load_weights(plain["run_dir"]), load_weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result["losses"] == plain["losses"]
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    looks = {entry["step"]: entry for entry in logged if "alarm/raised" in entry}
    assert list(looks) == [2, 4]
    assert looks[4]["sample/motion/real"] > 0.5
    ratio = looks[4]["sample/motion/multi"] / looks[4]["sample/motion/real"]
    assert looks[4]["alarm/motion/multi"] == pytest.approx(ratio) and ratio < 0.5
    made = sorted(path.name for path in (folder / "samples").iterdir())
    clips = min(2, len(open_dataset(toy_data).split(0.5)[1]))
    assert made == [f"step-{s:08d}-multi-8-steps-clip-{i}.mp4" for s in (2, 4) for i in range(clips)]
    assert result["samples"] == [str(folder / "samples" / name) for name in made[-clips:]]
    assert result["alarms"] == [f"multi: motion is {looks[4]['alarm/motion/multi']:.2f} of the data's"]
    assert result["alarms"] == json.loads((folder / "outcome.json").read_text())["alarms"]
    files = [json.loads(line)["path"] for line in (folder / "artifacts.jsonl").read_text().splitlines()]
    assert [path for path in files if path.endswith("step-00000002-multi-8-steps-clip-0.mp4")]


def test_a_run_without_samples_is_scored_at_its_end(tmp_path, toy_data, monkeypatch):
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    sets = (*SMALL, "data.held_out=0.5", "steps=2")
    result = train_stage(
        "audio", data=toy_data, sets=sets, runs_dir=tmp_path, run="a", launch=worker.run_worker, sample=final_samples
    )
    logged = [json.loads(line) for line in Path(result["run_dir"], "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["step"] == 2
    assert logged[-1]["alarm/loudness/multi"] < 0.5
    assert "loudness" in result["alarms"][0]


def test_failed_samples_do_not_stop_a_run(tmp_path, monkeypatch):
    """The codecs of these latents are missing: no sample, but all steps."""
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    data = write_dataset(tmp_path / "set")
    result = train_stage(
        "video", data=data, sets=(*SMALL, "sample_every=16"), runs_dir=tmp_path, run="v", launch=worker.run_worker
    )
    assert result["samples_seen"] == 32
    log = Path(result["run_dir"], "log.txt").read_text()
    assert log.count("no samples at step") == 2
    assert "unknown text codec" in log


def test_a_sharded_ema_is_gathered_for_samples():
    """ZeRO-3 shards the base of a low-rank fake score: the module alone has no whole weight."""
    card = random_card("video")
    ema = Ema(build_model(card.model, 1), EmaConfig())
    assert materialize_ema(ema, card) is ema.module
    whole = {name: value.clone() for name, value in ema.state_dict().items()}

    class Parts(ReplicatedWeights):
        def value(self, p):
            return next(whole[name] for name, mine in ema.module.named_parameters() if mine is p)

    ema.storage = Parts()
    copied = materialize_ema(ema, card)
    assert copied is not ema.module
    assert all(torch.equal(value, whole[name]) for name, value in copied.state_dict().items())
