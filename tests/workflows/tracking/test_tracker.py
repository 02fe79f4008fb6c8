"""Logs are complete and contain no step twice, as JSON lines and in MLflow."""

import pytest

from workflows.tracking.mlflow_tracker import EXPERIMENT_TAGS, MlflowTracker, open_tracker
from workflows.tracking.tracker import STEP_KEY, JsonLinesTracker, read_json_lines
from workflows.utils.environment import tracking_uri


def test_json_lines_continue_after_a_kill(tmp_path):
    """The run logged up to step 4, was killed within the next line, and resumes from step 2."""
    first = JsonLinesTracker(tmp_path)
    for step in (0, 2, 4):
        first.log(step, {STEP_KEY: step, "loss/video": 1.0 / (step + 1)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 3
    second = JsonLinesTracker(tmp_path)
    for step in (2, 4, 6):
        second.log(step, {STEP_KEY: step, "loss/video": 9.0})
    for late in (2, 6, 6):
        second.log(late, {"loss/video": 7.0, "alarm/on": 1.0})
    entries = read_json_lines(tmp_path / "metrics.jsonl")
    assert [(e["step"], e.get("loss/video"), e.get("alarm/on")) for e in entries] == [
        (0, 1.0, None),
        (2, pytest.approx(1 / 3), None),
        (4, 0.2, None),
        (6, 9.0, None),
        (6, None, 1.0),
    ]


def test_one_mlflow_run_contains_the_whole_log(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    uri = tracking_uri(tmp_path)
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    first = MlflowTracker(uri, experiment="train", name="v", tags={"stage": "video"})
    first.params({f"a.{i}": "x" * 900 for i in range(150)})
    first.log(0, {STEP_KEY: 0, "loss/video": 1.0})
    resumed = MlflowTracker(uri, experiment="train", name="v", run_id=first.run_id, tags={})
    resumed.send([{"step": s, "time": 1e9 + s, **{f"m{i}": s + i / 7 for i in range(400)}} for s in (2, 4, 6)])
    (tmp_path / "sample.mp4").write_bytes(b"mp4")
    resumed.artifact(tmp_path / "sample.mp4", "samples")
    resumed.finish()
    client = resumed._client
    run = client.get_run(first.run_id)
    assert (run.info.status, len(run.data.params), run.data.tags["stage"]) == ("FINISHED", 150, "video")
    history = client.get_metric_history(first.run_id, "m399")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(s, s + 57, 1000 * (10**9 + s)) for s in (2, 4, 6)]
    assert client.get_experiment(run.info.experiment_id).tags.items() >= EXPERIMENT_TAGS.items()
    assert (tmp_path / "mlartifacts").is_dir()
    assert not (tmp_path / "mlruns").exists()
    assert [f.path for f in client.list_artifacts(first.run_id, "samples")] == ["samples/sample.mp4"]


def test_a_sweep_may_log_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    for step in (8, 4):
        open_tracker(uri="", folder=tmp_path, experiment="evaluate", name="x").log(step, {"sync": 0.5})
    assert [e["step"] for e in read_json_lines(tmp_path / "metrics.jsonl")] == [8, 4]
