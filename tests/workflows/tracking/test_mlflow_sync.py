"""An unreachable MLflow server does not stop or delay training, and no number is lost or duplicated."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.helpers.latent_dataset import write_dataset
from tests.helpers.small_training import SMALL
from workflows.tracking import mlflow_sync
from workflows.tracking.mlflow_sync import (
    DurableTracker,
    drop_repeated_steps,
    has_backlog,
    load_sync_state,
    open_durable_tracker,
)
from workflows.tracking.mlflow_tracker import MlflowTracker
from workflows.tracking.tracker import LATE_KEY, STEP_KEY, JsonLinesTracker, read_json_lines
from workflows.training import worker
from workflows.training.train import train_stage

pytest.importorskip("mlflow", reason="mlflow is not installed")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(mlflow_sync, "RETRY_BACKOFF_S", (0.2, 1.0))
    monkeypatch.setattr(mlflow_sync, "START_SECONDS", 30.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def opened(folder: Path, uri: str) -> DurableTracker:
    tracker = open_durable_tracker(folder, uri=uri, experiment="train", tags={"stage": "video"})
    assert isinstance(tracker, DurableTracker)
    return tracker


def log_steps(tracker: DurableTracker, steps: range) -> float:
    """Log the steps; return the longest time of one log call in seconds."""
    longest = 0.0
    for step in steps:
        began = time.perf_counter()
        tracker.log(step, {STEP_KEY: 4.0 * step, "loss/video": 1 / (step + 1), "nan": float("nan")})
        longest = max(longest, time.perf_counter() - began)
        time.sleep(0.01)
    return longest


def steps_in(uri: str, run: str | None, key: str = "loss/video") -> list[int]:
    from mlflow import MlflowClient

    assert run is not None
    return [metric.step for metric in MlflowClient(tracking_uri=uri).get_metric_history(run, key)]


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """Return one store for all tests, because creating its tables takes seconds."""
    return sqlite(tmp_path_factory.mktemp("store"))


@contextmanager
def mute_server() -> Iterator[str]:
    """Accept connections and never respond."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hanging_server_causes_no_delay_and_the_next_one_gets_everything(tmp_path, store, monkeypatch, caplog):
    run = tmp_path / "run"
    (tmp_path / "sample.mp4").write_bytes(b"mp4")
    with mute_server() as uri, monkeypatch.context() as patch:
        patch.setattr(mlflow_sync, "START_SECONDS", 0.2)
        patch.setattr(mlflow_sync, "FLUSH_SECONDS", 0.5)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # longer than any pause of a machine
        tracker = opened(run, uri)
        tracker.params({"steps": 30})
        assert log_steps(tracker, range(30)) < 4
        tracker.artifact(tmp_path / "sample.mp4", "samples")
        began = time.perf_counter()
        tracker.finish()
        assert time.perf_counter() - began < 8
        assert has_backlog(run, uri)
    assert tracker.run_id is None
    assert "30 log entries, 1 files and the parameters are stored in" in caplog.messages[-1], caplog.messages
    later = opened(run, store)
    later.finish()
    assert steps_in(store, later.run_id) == list(range(30))
    facts = later._sync._connect()._client.get_run(later.run_id)
    assert (facts.data.params, facts.data.tags["stage"]) == ({"steps": "30"}, "video")
    assert [f.path for f in later._sync._connect()._client.list_artifacts(later.run_id, "samples")]
    later._sync._connect().finish()
    assert not has_backlog(run, store)


def test_entries_with_a_lost_response_count_once(tmp_path, store, monkeypatch, caplog):
    lost = {"_create_run": 1, "send": 2, "params": 1, "artifact": 1, "finish": 1}
    for name in lost:
        whole = getattr(MlflowTracker, name)

        def half(self, *args, name=name, whole=whole, **kwargs):
            answer = whole(self, *args, **kwargs)
            if lost[name]:
                lost[name] -= 1
                raise ConnectionResetError("the answer was lost")
            return answer

        monkeypatch.setattr(MlflowTracker, name, half)
    tracker = opened(tmp_path / "once", store)
    tracker.params({"a": 1})
    log_steps(tracker, range(20))
    (tmp_path / "x.txt").write_text("x")
    tracker.artifact(tmp_path / "x.txt")
    tracker.finish()
    assert not any(lost.values())
    assert steps_in(store, tracker.run_id) == list(range(20))
    assert steps_in(store, tracker.run_id, "nan") == list(range(20))
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    runs = client.search_runs([client.get_run(tracker.run_id).info.experiment_id], "attributes.run_name = 'once'")
    assert [(r.info.run_id, r.info.status) for r in runs] == [(tracker.run_id, "FINISHED")]
    assert not any("did not take" in line for line in caplog.messages), caplog.messages


def test_the_next_process_sends_the_log_of_a_killed_one(tmp_path, store):
    """The killed process logged up to step 9, sent nothing and left half a line; the run resumes from step 6."""
    lines = JsonLinesTracker(tmp_path / "killed")
    for step in range(10):
        lines.log(step, {STEP_KEY: step, "loss/video": 0.5})
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "ti')
    tracker = opened(tmp_path / "killed", store)
    log_steps(tracker, range(6, 15))
    tracker.finish()
    assert steps_in(store, tracker.run_id) == list(range(15))
    assert [entry["step"] for entry in read_json_lines(tmp_path / "killed" / "metrics.jsonl")] == list(range(15))


def test_a_worker_that_outlives_its_driver_repeats_no_step():
    entries = [{"step": s, STEP_KEY: 4 * s} for s in (0, 2, 4, 6, 4, 6, 8)]
    assert [e["step"] for e in drop_repeated_steps(entries, -1)] == [0, 2, 4, 6, 8]
    assert [e["step"] for e in drop_repeated_steps(entries, 4)] == [6, 8]
    assert drop_repeated_steps([{"step": 8, "alarm/on": 1.0}], 8), "an addition to the last step"
    assert drop_repeated_steps([{"step": 3, LATE_KEY: True, "alarm/on": 1.0}], 8), "a late entry may belong to any step"


def test_a_run_of_an_older_version_continues_its_mlflow_run(tmp_path, store):
    """Older versions stored only the run id in ``mlflow.json``, and metrics only in MLflow."""
    old = MlflowTracker(store, experiment="train", name="old", tags={})
    for step in range(3):
        old.log(step, {STEP_KEY: 4.0 * step, "loss/video": 1.0})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mlflow.json").write_text(json.dumps({"uri": store, "run": old.run_id}))
    tracker = opened(tmp_path / "old", store)
    log_steps(tracker, range(1, 6))
    tracker.finish()
    assert tracker.run_id == old.run_id
    assert steps_in(store, old.run_id) == [0, 1, 2, 3, 4, 5]
    assert load_sync_state(tmp_path / "old", store).run == old.run_id


def test_the_same_command_sends_the_log_of_a_finished_training(tmp_path, store, monkeypatch):
    """Training ran without a server; no step is repeated, and MLflow gets one complete run."""
    command = {"data": write_dataset(tmp_path / "set"), "sets": SMALL, "runs_dir": tmp_path, "run": "v"}
    with mute_server() as uri, monkeypatch.context() as patch:
        patch.setattr(mlflow_sync, "START_SECONDS", 0.1)
        patch.setattr(mlflow_sync, "FLUSH_SECONDS", 0.1)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        away = train_stage("video", launch=worker.run_worker, **command)
    assert (away["mlflow_run"], away["samples_seen"]) == (None, 32)
    assert "the same command sends them" in (tmp_path / "v" / "log.txt").read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    sent = train_stage("video", launch=None, **command)
    assert steps_in(store, sent["mlflow_run"], STEP_KEY) == [0, 2, 4, 6, 8]
    assert train_stage("video", launch=None, **command) == sent
    assert steps_in(store, sent["mlflow_run"], STEP_KEY) == [0, 2, 4, 6, 8]


class Server:
    """A real MLflow server with a SQLite store, which can be killed, suspended and restarted."""

    def __init__(self, folder: Path) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self.start()

    def start(self) -> None:
        store, files = f"sqlite:///{self._folder}/server.db", self._folder / "files"
        words = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        words += ["--backend-store-uri", store, "--artifacts-destination", str(files)]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words], stdout=log, stderr=log, env=env, start_new_session=True
            )
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(f"no server: see {self._folder}/server.log")

    def signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_server_that_is_killed_suspended_and_absent_at_the_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    (tmp_path / "sample.mp4").write_bytes(b"mp4")
    server = Server(tmp_path)
    try:
        tracker = opened(tmp_path / "run", server.uri)
        run = tracker.run_id
        waited = [log_steps(tracker, range(50))]
        server.signal(signal.SIGKILL)
        waited += [log_steps(tracker, range(50, 300))]
        server.start()
        waited += [log_steps(tracker, range(300, 400))]
        server.signal(signal.SIGSTOP)  # requests arrive, and are carried out when their sender has given them up
        waited += [log_steps(tracker, range(400, 900))]
        server.signal(signal.SIGCONT)
        tracker.artifact(tmp_path / "sample.mp4", "samples")
        waited += [log_steps(tracker, range(900, 1000))]
        server.signal(signal.SIGKILL)
        monkeypatch.setattr(mlflow_sync, "FLUSH_SECONDS", 3.0)
        waited += [log_steps(tracker, range(1000, 1010))]
        tracker.finish()
        assert "did not take the whole log" in caplog.messages[-1]
        server.start()
        monkeypatch.setattr(mlflow_sync, "FLUSH_SECONDS", 60.0)
        opened(tmp_path / "run", server.uri).finish()
        assert steps_in(server.uri, run) == list(range(1010))
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=server.uri)
        assert [f.path for f in client.list_artifacts(run, "samples")] == ["samples/sample.mp4"]
        assert client.get_run(run).info.status == "FINISHED"
        print("longest wait of a step, seconds:", [f"{w:.4f}" for w in waited])
        assert max(waited) < 0.5
    finally:
        server.signal(signal.SIGKILL)


def test_a_password_reaches_neither_the_files_of_the_run_nor_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("workflows.tracking.mlflow_sync.FLUSH_SECONDS", 0.1)
    uri = "http://ann:hunter2@127.0.0.1:1"
    tracker = open_durable_tracker(tmp_path, uri=uri, experiment="e", tags={})
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    files = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "hunter2" not in files + caplog.text
    assert "http://ann:***@127.0.0.1:1" in files
    assert load_sync_state(tmp_path, uri).key in files, "the same server continues"
