"""Logs are complete and hold no step twice, in MLflow and as JSON lines."""

import pytest

from workflows.tracking import STEP, JsonLines, Mlflow, read_lines, tracking_uri


def log_twice(first, reopen):
    """A run logged to step 4, killed, resumed from step 2."""
    for step in (0, 2, 4):
        first.log(step, {STEP: step, "loss/video": 1.0 / (step + 1)})
    second = reopen()
    for step in (2, 4, 6):
        second.log(step, {STEP: step, "loss/video": 9.0})
    return second


def test_json_lines_go_on_where_they_ended(tmp_path):
    log_twice(JsonLines(tmp_path), lambda: JsonLines(tmp_path))
    entries = read_lines(tmp_path / "metrics.jsonl")
    assert [e["step"] for e in entries] == [0, 2, 4, 6]
    assert entries[2]["loss/video"] == 0.2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 4


def test_one_mlflow_run_holds_everything(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    uri = tracking_uri(tmp_path)
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    first = Mlflow(uri, "train", "v", None, {"stage": "video"})
    first.params({f"a.{i}": "x" * 900 for i in range(150)})
    resumed = log_twice(first, lambda: Mlflow(uri, "train", "v", first.run_id, {}))
    (tmp_path / "sample.mp4").write_bytes(b"mp4")
    resumed.artifact(tmp_path / "sample.mp4", "samples")
    resumed.finish()
    client = resumed._client
    run = client.get_run(first.run_id)
    assert (run.info.status, len(run.data.params), run.data.tags["stage"]) == ("FINISHED", 150, "video")
    assert [(m.step, m.value) for m in client.get_metric_history(first.run_id, "loss/video")] == [
        (0, 1.0),
        (2, pytest.approx(1 / 3)),
        (4, 0.2),
        (6, 9.0),
    ]
    assert (tmp_path / "mlartifacts").is_dir()
    assert not (tmp_path / "mlruns").exists()
    assert [f.path for f in client.list_artifacts(first.run_id, "samples")] == ["samples/sample.mp4"]
