"""A run from command to checkpoint, without Ray (one rank in this process) and once with it."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoint_parts import list_checkpoints
from tests.helpers.latent_dataset import write_dataset
from tests.helpers.small_training import EVERY_PART_AT_ONCE, SMALL, killed_at, run
from workflows.checkpoints.load import load_export, load_metadata, load_weights
from workflows.training import worker
from workflows.training.train import train_stage


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def test_every_stage_trains_from_its_parents(tmp_path, data):
    uni = {stage: run(stage, tmp_path, data) for stage in ("video", "audio")}
    for result in uni.values():
        assert result["samples_seen"] == 32
        assert result["losses"]["last"] < result["losses"]["first"]
    joint = run("joint", tmp_path, data)
    record = json.loads(Path(joint["run_dir"], "run.json").read_text())
    assert record["from"].keys() == {"video", "audio"}
    assert joint["losses"]["first"] < uni["video"]["losses"]["first"] + uni["audio"]["losses"]["first"]
    mutual = run("mutual", tmp_path, data, sets=EVERY_PART_AT_ONCE)
    keys = mutual["losses"]["held_out_first"].keys()
    assert keys == {f"{t}/{m}" for t in ("flow_matching", "shortcut") for m in ("video", "audio")}
    logged = [json.loads(row) for row in Path(mutual["run_dir"], "metrics.jsonl").read_text().splitlines()]
    assert "dmd/video" in logged[-1]
    assert "fake_score/audio" in logged[-1]
    assert load_metadata(mutual["run_dir"]).stage == "mutual"


def test_joint_starts_with_the_weights_of_both_parents(tmp_path, data):
    parents = {stage: run(stage, tmp_path, data) for stage in ("video", "audio")}
    still = ("steps=1", "optim.lr=1e-30", "optim.warm_up=0")
    joint = run("joint", tmp_path, data, sets=(*still, "model.cross_bias=-4"))
    weights = load_weights(joint["run_dir"])
    for stage, result in parents.items():
        for name, value in load_weights(result["run_dir"]).items():
            assert torch.equal(weights[name], value), (stage, name)
    assert {name.split(".")[1] for name in weights} == {"video", "audio"}
    assert all(bool((w == -4).all()) for name, w in weights.items() if ".cross_bias." in name)
    no_bias = "model.cross_bias=null"
    with pytest.raises(ValueError, match=r"another size: cross_bias -4.0 there, None here"):
        run("mutual", tmp_path, data, init_from=[joint["run_dir"]], sets=(no_bias,), dry_run=True)
    run("joint", tmp_path, data, sets=(*still, no_bias), run="old")
    assert run("mutual", tmp_path, data, init_from=["old"], sets=("model.cross_bias=-4",), dry_run=True)


def test_a_killed_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path, data):
    whole = run("video", tmp_path / "a", data, run="v")
    with pytest.raises(KeyboardInterrupt):
        train_stage("video", data=data, sets=SMALL, runs_dir=tmp_path / "b", run="v", launch=killed_at(6))
    assert len(list_checkpoints(tmp_path / "b" / "v" / "checkpoints")) == 1
    resumed = run("video", tmp_path / "b", data, run="v")
    assert resumed["losses"] == whole["losses"]
    for weights in ("ema", "raw"):
        a, b = load_weights(whole["run_dir"], weights), load_weights(resumed["run_dir"], weights)
        assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [
        [json.loads(row) for row in Path(r["run_dir"], "metrics.jsonl").read_text().splitlines()]
        for r in (whole, resumed)
    ]
    steps = [[entry["step"] for entry in log] for log in logs]
    assert steps[0] == steps[1] == [0, 2, 4, 6, 8], "no step is logged twice or missing"
    assert [e.get("flow_matching/video") for e in logs[0]] == [e.get("flow_matching/video") for e in logs[1]]


def test_a_finished_run_is_not_trained_again(tmp_path, data):
    result = run("audio", tmp_path, data)

    def launch(job):
        raise AssertionError("nothing to do")

    assert train_stage("audio", data=data, sets=SMALL, runs_dir=tmp_path, launch=launch) == result


def test_the_latest_dataset_is_the_default(tmp_path):
    with pytest.raises(ValueError, match=r"mfctl preprocess .* --data"):
        train_stage("video", runs_dir=tmp_path)
    write_dataset(tmp_path / "old")
    new = write_dataset(tmp_path / "demo" / "new")
    plan = train_stage("video", runs_dir=tmp_path, sets=SMALL, dry_run=True)
    assert plan["costs"]["parameters"]["total"] > 0
    assert plan["data"] == new
    assert plan["config"]["data"]["batch"] == 4
    assert not Path(plan["run_dir"]).exists()


@pytest.mark.parametrize(("preset", "billions"), [("small", 0.1), ("base", 3.0), ("full", 13.9)])
def test_a_dry_run_without_data_estimates_a_preset(tmp_path, preset, billions):
    result = train_stage("joint", preset=preset, runs_dir=tmp_path, dry_run=True)
    counted = result["costs"]["parameters"]
    assert counted["total"] / 1e9 == pytest.approx(billions, rel=0.05)
    assert counted["video"] == pytest.approx(counted["audio"], rel=0.01)
    states = list(result["costs"]["state_bytes_per_rank"].values())
    assert states == sorted(states, reverse=True)
    assert states[0] == 20 * counted["total"]
    assert "mfctl preprocess" in result["missing"]
    assert not list(tmp_path.iterdir())


def test_missing_inputs_are_reported(tmp_path, data):
    with pytest.raises(ValueError, match=r"finished video run.*mfctl train --stage video"):
        run("joint", tmp_path, data)
    with pytest.raises(ValueError, match="unknown preset 'tny'"):
        run("video", tmp_path, data, preset="tny")
    for name in ("", "..", "../elsewhere/v"):
        with pytest.raises(ValueError, match="without slashes"):
            run("video", tmp_path, data, run=name)
    assert list(tmp_path.iterdir()) == [], "a refused command writes nothing"


def test_a_run_of_the_same_stage_gives_the_first_weights(tmp_path, data):
    short = ("steps=1",)
    video, audio = (run(stage, tmp_path, data, sets=short)["run_dir"] for stage in ("video", "audio"))
    first = run("joint", tmp_path, data, init_from=[video, audio], sets=short)["run_dir"]
    with pytest.raises(ValueError, match="is of stage joint, which continues from its weights"):
        run("joint", tmp_path, data, init_from=[first, video], run="second")
    still = ("steps=1", "optim.lr=1e-60", "optim.warm_up=0")  # 0 in float32: some biases are 0 and show 1e-30
    second = run("joint", tmp_path, data, init_from=[first], run="second", sets=still)["run_dir"]
    assert list(json.loads(Path(second, "run.json").read_text())["from"]) == ["joint"]
    weights = load_weights(first)
    assert all(torch.equal(value, weights[name]) for name, value in load_weights(second).items())


def test_a_parent_of_another_stage_size_or_codec_is_an_error(tmp_path, data):
    video = run("video", tmp_path, data)["run_dir"]
    audio = run("audio", tmp_path, data)["run_dir"]
    with pytest.raises(ValueError, match="is of stage video; stage mutual starts from a finished joint run"):
        run("mutual", tmp_path, data, init_from=[video])
    with pytest.raises(ValueError, match=r"another size: dim 32 there, 64 here"):
        run("joint", tmp_path, data, init_from=[video, audio], sets=("model.dim=64",))
    other = write_dataset(tmp_path / "other", channels=5)
    with pytest.raises(ValueError, match="another size|trained on video latents"):
        run("joint", tmp_path, other, init_from=[video, audio])
    with pytest.raises(ValueError, match="names two video runs"):
        run("joint", tmp_path, data, init_from=[video, video])


def test_statistics_are_frozen_by_the_first_stage(tmp_path, data):
    for stage in ("video", "audio"):
        run(stage, tmp_path, data)
    grown = Path(write_dataset(tmp_path / "grown"))
    facts = json.loads((grown / "_dataset.json").read_text())
    facts["stats"]["video"]["mean"] = [9.0] * 3
    (grown / "_dataset.json").write_text(json.dumps(facts))
    joint = run("joint", tmp_path, str(grown))
    assert load_metadata(joint["run_dir"]).stats["video"].mean == (0.1,) * 3


def test_a_run_does_not_change_its_settings_or_its_data(tmp_path, data):
    with pytest.raises(KeyboardInterrupt):
        train_stage("video", data=data, sets=SMALL, runs_dir=tmp_path, run="v", launch=killed_at(5))
    with pytest.raises(ValueError, match=r"config.optim.lr: 0.003 -> 0.001"):
        run("video", tmp_path, data, run="v", sets=("optim.lr=1e-3",))
    with pytest.raises(ValueError, match="dataset.fingerprint"):
        run("video", tmp_path, write_dataset(tmp_path / "x", fingerprint="f2"), run="v")


def test_a_second_driver_is_an_error(tmp_path, data):
    def launch(job):
        with pytest.raises(ValueError, match="is being written by"):
            run("video", tmp_path, data, run="v")
        worker.run_worker(job)

    train_stage("video", data=data, sets=SMALL, runs_dir=tmp_path, run="v", launch=launch)


def test_a_non_finite_loss_stops_before_the_step(tmp_path, data, monkeypatch):
    step = worker.TrainingBatchLoader.micro_batches

    def poisoned(self, number):
        batches = step(self, number)
        if number == 5:
            batches[0].streams["video"].latents[1] = float("nan")
        return batches

    monkeypatch.setattr(worker.TrainingBatchLoader, "micro_batches", poisoned)
    with pytest.raises(
        RuntimeError, match=r"stage video, step 5: not finite: .*flow_matching/video on clips clip-.*samples 20\.\.23"
    ) as raised:
        run("video", tmp_path, data, run="v")
    assert "rank 0: student: activations are not finite after block 0: video chunk 0 (" in str(raised.value)
    monkeypatch.undo()
    assert run("video", tmp_path, data, run="v")["samples_seen"] == 32, "the same command resumes"


def test_samples_are_generated_once_and_listed(tmp_path, data):
    made = []

    def sample(run_dir: Path):
        model, card = load_export(run_dir)
        assert not model.training
        made.append(card.stage)
        (run_dir / "sample.mp4").write_bytes(b"")
        return [run_dir / "sample.mp4"]

    for _ in range(2):
        result = run("video", tmp_path, data, sample=sample)
    assert made == ["video"]
    assert result["samples"] == [str(Path(result["run_dir"], "sample.mp4"))]
