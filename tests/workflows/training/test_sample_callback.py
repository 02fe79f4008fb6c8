"""Samples during training: equal inline and asynchronously, scored as by ``mfctl evaluate``, logged at their step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.small_training import SMALL
from workflows.checkpoints.load import load_weights
from workflows.config.run import EngineConfig
from workflows.tracking.tracker import LATE_KEY, STEP_KEY, read_json_lines
from workflows.training import worker
from workflows.training.async_samples import SnapshotWriter, evaluate_snapshot, spare_resources
from workflows.training.samples import load_report, report_path
from workflows.training.train import train_stage

SETS = (*SMALL, "data.held_out=0.5", "steps=4", "log_every=1", "checkpoint.every=8", "sample_every=8")


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch):
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    torch.set_num_threads(1)


def sample_metrics(result) -> dict[int, dict[str, float]]:
    """Return the sample metrics by step, without the time."""
    entries = [e for e in read_json_lines(Path(result["run_dir"], "metrics.jsonl")) if LATE_KEY in e]
    return {e["step"]: {k: v for k, v in e.items() if k not in ("time", "sample/seconds")} for e in entries}


@pytest.mark.slow
def test_asynchronous_samples_equal_inline_ones(tmp_path, toy_data):
    """The first is evaluated during later steps, the last after the end."""
    plain = train_stage(
        "video", data=toy_data, sets=SETS, runs_dir=tmp_path / "line", run="v", launch=worker.run_worker
    )
    given: list[Path] = []

    def launch(job):
        worker.run_worker(job, snapshots=SnapshotWriter(job.run_dir / "ray" / "it", job.metadata, given.append))
        evaluate_snapshot(given[0], job.run_dir)

    result = train_stage("video", data=toy_data, sets=SETS, runs_dir=tmp_path / "async", run="v", launch=launch)
    ours, theirs = sample_metrics(result), sample_metrics(plain)
    assert list(ours) == list(theirs) == [2, 4]
    for step, numbers in theirs.items():
        assert ours[step] == pytest.approx(numbers, rel=1e-6, nan_ok=True)
    order = [(e["step"], LATE_KEY in e) for e in read_json_lines(Path(result["run_dir"], "metrics.jsonl"))]
    assert order.index((2, True)) > order.index((4, False)), "training had gone on"
    assert not any(folder.exists() for folder in given)
    assert "generated asynchronously" in Path(result["run_dir"], "log.txt").read_text()
    assert "no spare CPU" in Path(plain["run_dir"], "log.txt").read_text()
    before, after = load_weights(plain["run_dir"]), load_weights(result["run_dir"])
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_sample_report_has_the_metrics_of_a_sweep(tmp_path, toy_data):
    """Both modes, by window for long clips; unmeasured metrics have their requirement."""
    sets = (*SMALL, "data.held_out=0.5", "steps=1")
    parents = [
        train_stage(stage, data=toy_data, sets=sets, runs_dir=tmp_path, run=stage, launch=worker.run_worker)["run_dir"]
        for stage in ("video", "audio")
    ]
    joint = train_stage(
        "joint", data=toy_data, sets=sets, init_from=parents, runs_dir=tmp_path, run="j", launch=worker.run_worker
    )
    looked = (*sets, "sample_every=4")
    result = train_stage(
        "mutual", data=toy_data, sets=looked, init_from=[joint["run_dir"]], runs_dir=tmp_path, run="m",
        launch=worker.run_worker,
    )  # fmt: skip
    ((step, numbers),) = sample_metrics(result).items()
    assert step == 1
    for metric in ("sync", "syllable_error", "valid", "identity_error", "motion", "frechet", "seam", "loudness_db"):
        for mode in ("few", "multi", "real"):
            assert f"sample/{metric}/{mode}" in numbers
    assert numbers["sample/sync/real"] > 0.9
    assert numbers["sample/syllable_error/real"] < 0.2 < numbers["sample/syllable_error/few"]
    report = load_report(report_path(Path(result["run_dir"]), step))
    assert report.not_measured["lse_c"].startswith("not measured: needs --weights syncnet=")
    assert all(Path(path).stat().st_size > 1000 for path in report.files) and len(report.files) == 4


def test_asynchronous_samples_need_free_resources():
    cpu = EngineConfig(workers=2)
    assert spare_resources(cpu, {"CPU": 1.0}, {"CPU": 3.0}) == {"CPU": 1.0}
    assert spare_resources(cpu, {"CPU": 1.0}, {"CPU": 2.0}) == {}
    assert spare_resources(EngineConfig(workers=(1, 4)), {"CPU": 1.0}, {"CPU": 4.0}) == {}, "it may grow"
    gpu = EngineConfig(workers=1, use_gpu=True)
    assert spare_resources(gpu, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 9.0, "GPU": 1.0}) == {}
    assert spare_resources(gpu, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 9.0, "GPU": 2.0}) == {"CPU": 1.0, "GPU": 1.0}


def test_missing_weights_are_reported(tmp_path, toy_data):
    """The writer was killed before the last file."""

    def launch(job):
        worker.run_worker(job, snapshots=SnapshotWriter(job.run_dir / "ray" / "it", job.metadata, lambda folder: None))
        for file in job.run_dir.glob("ray/it/*/model.json"):
            file.unlink()

    result = train_stage("video", data=toy_data, sets=SETS, runs_dir=tmp_path, run="v", launch=launch)
    assert [numbers["sample/failed"] for numbers in sample_metrics(result).values()] == [1, 1]
    assert not list(Path(result["run_dir"], "ray", "it").iterdir())


def test_missing_feature_models_are_an_error_before_the_run(tmp_path, toy_data):
    with pytest.raises(ValueError, match="/nowhere does not exist. Give a folder of CLAP"):
        train_stage("video", data=toy_data, sets=(*SETS, "sample_weights=[clap=/nowhere]"), runs_dir=tmp_path, run="v")
    assert not (tmp_path / "v").exists()


LEADER = """if True:
    import os, pathlib, ray
    os.environ["RAY_ADDRESS"] = ""  # as in a submitted job; Ray takes it for "here"
    from workflows.config.run import EngineConfig
    from workflows.training.ray_launcher import run_with_gpu

    def given(run_dir):
        leads = os.getpid() == LEADER
        resources = {} if leads else ray.get_runtime_context().get_assigned_resources()
        return [os.getpid(), str(run_dir), resources.get("GPU", 0.0), resources.get("trainer", 0.0)]

    LEADER, runs = os.getpid(), pathlib.Path("runs/v")
    assert run_with_gpu(given, runs, EngineConfig()) == [os.getpid(), "runs/v", 0.0, 0.0], "a run on CPUs asks for none"
    ray.init(num_cpus=1, num_gpus=1, resources={"trainer": 1}, include_dashboard=False, logging_level="ERROR")
    for resource, amount in (None, 0.0), ("trainer", 1.0):
        pid, *rest = run_with_gpu(given, runs, EngineConfig(use_gpu=True, resource=resource))
        assert pid != os.getpid() and rest == ["runs/v", 1.0, amount], rest
    ray.shutdown()
    del os.environ["RAY_ADDRESS"]
    assert run_with_gpu(given, runs, EngineConfig(use_gpu=True))[0] == os.getpid(), "no cluster: as well as it can"
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the leading process has a GPU here")
@pytest.mark.slow
def test_the_last_samples_are_generated_on_a_machine_with_a_gpu(tmp_path):
    """The driver of a training on a cluster is on the head, without a GPU."""
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": root, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", LEADER],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_train_validates_during_training(tmp_path, toy_data, monkeypatch):
    """One worker leaves a free CPU. MLflow has the metrics at the step of the weights."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two CPU cores")
    client = pytest.importorskip("mlflow").MlflowClient
    monkeypatch.delenv("MFCTL_TRACKER")
    sets = (*SETS, "steps=200", "sample_every=200", "eval_every=100", "checkpoint.every=400")
    result = train_stage("video", data=toy_data, sets=sets, runs_dir=tmp_path, run="v")
    entries = read_json_lines(tmp_path / "v" / "metrics.jsonl")
    assert sorted(sample_metrics(result)) == [50, 100, 150, 200]
    order = [(e["step"], LATE_KEY in e) for e in entries]
    assert order.index((50, True)) > order.index((51, False)), "it did not wait"
    assert [e[STEP_KEY] for e in entries if STEP_KEY in e and e["step"] > 0] == [4.0 * step for step in range(1, 201)]
    history = client(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(result["mlflow_run"], "sample/valid/multi")
    assert sorted(point.step for point in history) == [50, 100, 150, 200]
    assert not list(tmp_path.glob("v/ray/*/look-*"))
