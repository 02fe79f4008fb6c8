"""Recovery without Ray, in one or two processes: failed saves, stop requests, bad numbers, other world sizes.

With Ray: ``test_recovery_ray.py``.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoint_parts import PROGRESS, list_checkpoints, parts, writer
from tests.helpers.gloo_processes import run_on
from tests.helpers.latent_dataset import write_dataset
from tests.helpers.small_training import EVERY_PART_AT_ONCE, SMALL, killed_at, run
from workflows.checkpoints.load import find_export, load_weights
from workflows.checkpoints.store import COMPLETE_FILE, CheckpointStore
from workflows.tracking.tracker import JsonLinesTracker, read_json_lines
from workflows.training import heartbeat, preemption, train, worker
from workflows.training.checkpointing import load_training_state
from workflows.training.engines.state import StateShard
from workflows.training.loop import TrainingInterrupted
from workflows.training.samples import SampleReport
from workflows.training.train import train_stage
from workflows.utils.json_io import read_json, write_json

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch):
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def weights_of(engines) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engines["student"].weights()}


def test_training_continues_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    engines, ema = parts(0)
    before, gate, write = weights_of(engines), threading.Event(), StateShard.write
    monkeypatch.setattr(StateShard, "write", lambda *args: gate.wait(30) and write(*args))
    saver = writer(tmp_path, engines, ema)
    saver.save(PROGRESS)
    with torch.no_grad():
        for _, value in engines["student"].weights():
            value.add_(1.0)
    assert list_checkpoints(tmp_path) == [], "the save has returned before anything is written"
    gate.set()
    saver.wait()
    (folder,) = list_checkpoints(tmp_path)
    others, average = parts(1)
    load_training_state(CheckpointStore(tmp_path), folder.name, others, average)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(others).items())


def test_a_save_waits_for_the_previous_one(tmp_path, monkeypatch):
    engines, ema = parts(0)
    write = StateShard.write
    monkeypatch.setattr(StateShard, "write", lambda *args: time.sleep(0.05) or write(*args))
    saver = writer(tmp_path, engines, ema, keep=9)
    for n in range(3):
        saver.save(PROGRESS.__class__(step=n, samples_seen=n, first={}, last={}))
        assert len(list_checkpoints(tmp_path)) == n
    saver.close()
    assert len(list_checkpoints(tmp_path)) == 3, "after an error the save in progress is finished"


def test_a_failed_save_raises_at_the_next_step_and_the_previous_checkpoint_is_used(tmp_path, data, monkeypatch):
    whole = run("video", tmp_path / "whole", data, run="v", sets=("checkpoint.every=4",))
    write = StateShard.write

    def full_disk(self, folder, name):
        if folder.parent.name.startswith("000000000016"):
            raise OSError(28, "No space left on device")
        return write(self, folder, name)

    monkeypatch.setattr(StateShard, "write", full_disk)
    attempts = []

    def launch(job):
        attempts.append(worker.run_worker(job))  # returns: the launcher must not repeat it

    with pytest.raises(
        RuntimeError, match=r"000000000016-\w+ could not be written: rank 0: OSError.*No space left.*resumes from .*12-"
    ):
        train_stage("video", data=data, sets=(*SMALL, "checkpoint.every=4"), runs_dir=tmp_path, run="v", launch=launch)
    assert attempts == [None]
    steps = [entry["step"] for entry in read_json_lines(tmp_path / "v" / "metrics.jsonl")]
    assert max(steps) <= 6, "it was raised at the next step"
    monkeypatch.undo()
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    root = tmp_path / "v" / "checkpoints"
    assert [p.name.split("-")[0] for p in list_checkpoints(root)] == ["000000000008", "000000000012"]
    again = run("video", tmp_path, data, run="v", sets=("checkpoint.every=4",))
    assert "resumes at step 3" in (tmp_path / "v" / "log.txt").read_text()
    assert all((p / COMPLETE_FILE).exists() for p in root.iterdir()), "the torn one is cleaned away"
    a, b = load_weights(whole["run_dir"]), load_weights(again["run_dir"])
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_metrics_that_cannot_be_written_end_the_run_once_and_the_same_command_resumes(tmp_path, data, monkeypatch):
    log, attempts = JsonLinesTracker.log, []

    def full_disk(self, step, metrics, **more):
        if step == 6:
            raise OSError(28, "No space left on device")
        log(self, step, metrics, **more)

    def launch(job):
        attempts.append(worker.run_worker(job))  # returns: the launcher must not repeat it

    monkeypatch.setattr(JsonLinesTracker, "log", full_disk)
    with pytest.raises(
        RuntimeError, match=r"metrics or samples could not be written until step 6 .*No space left.*to resume"
    ):
        train_stage("video", data=data, sets=SMALL, runs_dir=tmp_path, run="v", launch=launch)
    assert attempts == [None]
    monkeypatch.undo()
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    run("video", tmp_path, data, run="v")
    assert "resumes at step 4" in (tmp_path / "v" / "log.txt").read_text()
    assert [entry["step"] for entry in read_json_lines(tmp_path / "v" / "metrics.jsonl")] == [0, 2, 4, 6, 8]


def test_samples_that_cannot_be_written_end_the_run_once_and_the_same_command_resumes(tmp_path, data, monkeypatch):
    def full_disk(self, run_dir):
        raise OSError(28, "No space left on device")

    sampled, attempts = ("sample_every=8", "sample_clips=1"), []
    monkeypatch.setattr(SampleReport, "write", full_disk)
    with pytest.raises(RuntimeError, match=r"metrics or samples could not be written until step 2 .*No space left"):
        train_stage(
            "video",
            data=data,
            sets=(*SMALL, *sampled),
            runs_dir=tmp_path,
            run="v",
            launch=lambda job: attempts.append(worker.run_worker(job)),  # returns: the launcher must not repeat it
        )
    assert attempts == [None]
    monkeypatch.undo()
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    assert run("video", tmp_path, data, run="v", sets=sampled)["samples_seen"] == 32


def test_a_full_disk_without_room_for_the_outcome_is_named(tmp_path, data, monkeypatch):
    def full_disk(path, value):
        if path.name == "outcome.json":
            raise OSError(28, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr(worker, "write_json", full_disk)
    monkeypatch.setattr(train, "SMALL_FILES", 1 << 60)  # bytes; more than any disk has free
    with pytest.raises(RuntimeError, match=r"the disk of .*v is full.*Free space, then run the same command"):
        run("video", tmp_path, data, run="v")
    monkeypatch.undo()
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    assert run("video", tmp_path, data, run="v")["samples_seen"] == 32


KILLED = """
import os, signal, sys
from pathlib import Path
from workflows.training.engines.state import StateShard
from workflows.training import worker
from workflows.training.train import train_stage
write = StateShard.write
def dying(self, folder, name):
    path = write(self, folder, name)
    if folder.parent.name.startswith("000000000024") and name == "ema":
        os.kill(os.getpid(), signal.SIGKILL)
    return path
StateShard.write = dying
train_stage("video", data=sys.argv[1], sets=sys.argv[3:], runs_dir=Path(sys.argv[2]), run="v", launch=worker.run_worker)
"""


def test_a_run_killed_while_saving_resumes_from_the_previous_checkpoint(tmp_path, data):
    sets = (*SMALL, "checkpoint.every=8")
    whole = train_stage("video", data=data, sets=sets, runs_dir=tmp_path / "whole", run="v", launch=worker.run_worker)
    command = [sys.executable, "-c", KILLED, data, str(tmp_path), *sets]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MFCTL_TRACKER": "json"}
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=100, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    root = tmp_path / "v" / "checkpoints"
    (torn,) = [p for p in root.iterdir() if not (p / COMPLETE_FILE).exists()]
    assert list(torn.rglob("*.safetensors")), "it died in the middle"
    again = train_stage("video", data=data, sets=sets, runs_dir=tmp_path, run="v", launch=worker.run_worker)
    assert not torn.exists()
    assert again["losses"] == whole["losses"]
    for weights in ("ema", "raw"):
        a, b = load_weights(whole["run_dir"], weights), load_weights(again["run_dir"], weights)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("place", ["path", "memory"])
def test_checkpoints_in_another_folder(tmp_path, data, place):
    to = str(tmp_path / "elsewhere") if place == "path" else f"memory://bucket-{tmp_path.name}/prefix"
    sets = (f"checkpoint.to={to}", "checkpoint.every=8")
    whole = run("audio", tmp_path / "whole", data, run="a")
    result = run("audio", tmp_path, data, run="a", sets=sets)
    assert result["checkpoint"].startswith(f"{to}/a/checkpoints/")
    assert not (tmp_path / "a" / "checkpoints").exists()
    assert len(CheckpointStore(f"{to}/a/checkpoints").list_complete()) == 2, "the last two are kept"
    a = load_weights(whole["run_dir"])
    for name in (result["run_dir"], result["checkpoint"], f"{to}/a", f"{result['checkpoint']}/export"):
        b = load_weights(name)
        assert all(torch.equal(a[key], b[key]) for key in a), name
    Path(result["run_dir"], "outcome.json").unlink()

    def launch(job):
        with pytest.raises(ValueError, match="is being written by"):
            run("audio", tmp_path / "another machine", data, run="a", sets=sets)
        worker.run_worker(job)

    train_stage("audio", data=data, sets=(*SMALL, *sets), runs_dir=tmp_path, run="a", launch=launch)
    assert "resumes at step 8" in Path(result["run_dir"], "log.txt").read_text()
    with pytest.raises(ValueError, match="memory://bucket/nowhere"):
        find_export("memory://bucket/nowhere")


def test_a_checkpoint_of_another_dataset_is_refused_with_both_fingerprints(tmp_path, data):
    run("audio", tmp_path, data, run="a", sets=(f"checkpoint.to={tmp_path / 'to'}",))
    other = write_dataset(tmp_path / "other", fingerprint="f2")
    with pytest.raises(ValueError, match=r"the checkpoint .* dataset.fingerprint: .f1. -> .f2."):
        run("audio", tmp_path / "elsewhere", other, run="a", sets=(f"checkpoint.to={tmp_path / 'to'}",))


def test_the_record_of_a_checkpoint_is_complete(tmp_path, data):
    for stage in ("video", "audio", "joint"):
        run(stage, tmp_path, data)
    result = run("mutual", tmp_path, data, sets=EVERY_PART_AT_ONCE)
    folder = Path(result["checkpoint"])
    facts = read_json(folder / "run.json")
    assert facts["progress"].keys() == {"step", "samples_seen", "first", "last", "skipped"}
    assert facts["schedule"]["lr"].keys() == {"student", "fake"}
    assert facts["schedule"].keys() >= {"stage_step", "ema_decay", "history", "strengths", "dmd_weight"}
    assert facts["dataset"]["fingerprint"] == "f1"
    assert facts["config"]["objective"]["fake_from"] == 2
    assert {"mlflow_run", "versions", "stage", "workers"} <= facts.keys()
    assert {p.name.split("-")[0] for p in (folder / "state").iterdir()} == {"student", "fake", "ema"}
    assert {p.name for p in (folder / "export").iterdir()} == {"raw.safetensors", "ema.safetensors", "model.json"}


def test_sigterm_saves_at_once_and_the_same_command_resumes(tmp_path, data, monkeypatch):
    whole = run("video", tmp_path / "whole", data, run="v")
    step = worker.TrainingBatchLoader.micro_batches

    def send_sigterm(self, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(worker.TrainingBatchLoader, "micro_batches", send_sigterm)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match=r"stopped after step \d of 8 .*received SIGTERM.*the same command"):
        run("video", tmp_path, data, run="v")
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    stopped = list_checkpoints(tmp_path / "v" / "checkpoints")[-1]
    assert read_json(stopped / "run.json")["progress"]["step"] in range(1, 6), "batches are made two steps ahead"
    again = run("video", tmp_path, data, run="v")
    assert again["losses"] == whole["losses"]
    a, b = load_weights(whole["run_dir"]), load_weights(again["run_dir"])
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_silent_or_slow_rank_is_reported(tmp_path, caplog):
    """Uses a simulated clock."""
    caplog.set_level(logging.INFO)
    watch = heartbeat.HeartbeatMonitor(tmp_path, silent=20, slow=30)

    def beat(rank: int, count: int, step: int, doing: str) -> None:
        facts = {"rank": rank, "host": "node", "pid": 70 + rank, "beat": count, "step": step, "doing": doing}
        (tmp_path / f"{rank:05d}.json").write_text(json.dumps(facts))

    for now in range(60):
        beat(0, now, 3, heartbeat.WAITING_LABEL)
        beat(1, min(now, 5), 3, "computing")
        beat(2, now, 3, "computing" if now < 50 else heartbeat.WAITING_LABEL)
        watch.check(now)
    assert caplog.messages[0].startswith(
        "no heartbeat of rank 1 (process 71 on node) for 20 s (last: step 3, computing)"
    )
    assert caplog.messages[1].startswith(
        "rank 2 (process 72 on node) has kept other ranks waiting for 30 s: still computing step 3"
    )
    beat(1, 99, 4, "computing")
    watch.check(60)
    assert caplog.messages[2:] == ["rank 1 (process 71 on node) sends heartbeats again, at step 4"]
    for path in tmp_path.iterdir():
        path.unlink()
    watch.check(100)
    assert len(caplog.messages) == 3, "a rank that is done is not silent"


def _hangs(folder: Path) -> None:
    """Hold rank 1 before the sum that rank 0 waits in, until it is reported; both compute step 5."""
    beat = heartbeat.Heartbeat(folder, torch.distributed.get_rank(), interval=0.1)
    beat(5, "computing")
    deadline = time.monotonic() + 60
    while torch.distributed.get_rank() == 1 and not (folder / "named").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    torch.distributed.all_reduce(torch.zeros(1))
    beat.close()


def test_a_rank_that_hangs_before_a_collective_is_reported(tmp_path, caplog):
    watch = heartbeat.HeartbeatMonitor(tmp_path, silent=20, slow=1.5)
    processes = threading.Thread(target=run_on, args=(2, _hangs, tmp_path))
    processes.start()
    while processes.is_alive():
        watch.check(time.monotonic())
        if caplog.messages:
            (tmp_path / "named").touch()
        time.sleep(0.1)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("rank 1 (process ")
    assert "still computing step 5 (at test_recovery.py:" in caplog.text and "_hangs)" in caplog.text


def test_ranks_in_different_collectives_are_all_reported(tmp_path, caplog):
    watch = heartbeat.HeartbeatMonitor(tmp_path, silent=100, slow=30)
    for rank, collective in enumerate(("all_reduce", "barrier")):
        facts = {"rank": rank, "host": "node", "pid": 70 + rank, "step": 3, "doing": "computing"}
        text = json.dumps({**facts, "beat": 1, "line": "c.py:1, f", "stack": 5, "collective": collective})
        (tmp_path / f"{rank:05d}.json").write_text(text)
    for now in range(60):
        watch.check(now)
    (line,) = caplog.messages
    assert "rank 0 (process 70 on node) in all_reduce, step 3; rank 1 (process 71 on node) in barrier" in line


NATIVE = """
import ctypes, os, signal, threading, time
from pathlib import Path
from workflows.training import preemption

def send():
    os.kill(os.getpid(), signal.SIGTERM)
    heard = preemption.PreemptionMonitor(Path("nowhere"), "")
    while not heard():
        time.sleep(0.01)
    print(heard(), flush=True)
    os._exit(0)

preemption.install_sigterm_handler()
threading.Timer(0.2, send).start()
lock = ctypes.create_string_buffer(64)
for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(lock)  # the second one never returns
"""


def test_sigterm_is_reported_while_the_main_thread_is_in_native_code():
    done = subprocess.run([sys.executable, "-c", NATIVE], capture_output=True, text=True, timeout=60, check=True)
    assert "received SIGTERM" in done.stdout


def test_a_rank_sends_heartbeats_until_it_is_closed(tmp_path):
    beat = heartbeat.Heartbeat(tmp_path, 3, interval=0.01)
    beat(7, "computing")
    counts = set()
    for _ in range(200):
        facts = read_json(tmp_path / "00003.json") if (tmp_path / "00003.json").exists() else {"beat": 0, "step": 0}
        counts |= {facts["beat"]} if facts["step"] == 7 else set()
        if len(counts) > 2:
            break
        time.sleep(0.01)
    assert len(counts) > 2
    beat.close()
    assert not list(tmp_path.iterdir())


# --- on several plain processes -------------------------------------------------------------------------------------


def _work_with_a_bad_clip(job: worker.TrainingJob) -> None:
    """Train with NaN in a latent of sample 13 (step 1, second rank)."""
    assemble = worker.TrainingBatchLoader.micro_batches

    def step(self, number):
        batches = assemble(self, number)
        for batch in batches:
            batch.streams["audio"].latents[batch.samples == 13] = float("nan")
        return batches

    worker.TrainingBatchLoader.micro_batches = step
    worker.run_worker(job)


@pytest.mark.slow
def test_a_non_finite_loss_on_one_rank_is_reported_with_its_clips(tmp_path, data):
    """A complete run; ``test_world_size_invariance`` tests the loop alone."""
    sets = (*SMALL, "data.batch=8", "engine.workers=2", "steps=3", "log_every=1", "engine.kind=deepspeed")

    def launch(job):
        run_on(2, _work_with_a_bad_clip, job)

    with pytest.raises(
        RuntimeError, match=r"stage audio, step 1: not finite: rank 1: the loss flow_matching/audio on clips clip-\d+, "
    ) as stopped:
        train_stage("audio", data=data, sets=sets, runs_dir=tmp_path, run="a", launch=launch)
    assert "rank 0:" not in str(stopped.value)
    assert "samples 12..15" in str(stopped.value)
    done = train_stage("audio", data=data, sets=(*sets, "skip_nonfinite=1"), runs_dir=tmp_path, run="b", launch=launch)
    assert done["samples_seen"] == 24
    assert "Step skipped (1 of 1)" in (tmp_path / "b" / "log.txt").read_text()
    entries = read_json_lines(tmp_path / "b" / "metrics.jsonl")
    assert ["flow_matching/audio" in entry for entry in entries] == [False, True, False, True]
    assert all(torch.isfinite(value).all() for value in load_weights(done["run_dir"], "raw").values())


def test_preemption_saves_the_run_and_returns_it_to_the_launcher(tmp_path, data, monkeypatch):
    whole = run("audio", tmp_path / "whole", data, run="a")
    monkeypatch.setattr(preemption, "POLL_S", 0.0)
    asked = []

    def preemption_reason() -> str:
        asked.append(1)
        return "a machine of ranks [0] is about to go" if len(asked) >= 3 else ""

    def launch(job):
        with pytest.raises(TrainingInterrupted, match=r"stopped after step 3 of 8 \(rank 0: a machine of ranks \[0\]"):
            worker.run_worker(job, preemption_reason)
        worker.run_worker(job)  # as the launcher does, elsewhere

    again = train_stage("audio", data=data, sets=SMALL, runs_dir=tmp_path, run="a", launch=launch)
    assert "resumes at step 3" in (tmp_path / "a" / "log.txt").read_text()
    a, b = load_weights(whole["run_dir"]), load_weights(again["run_dir"])
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_settings_that_affect_no_number_may_change_on_resume(tmp_path, data):
    whole = run("video", tmp_path / "whole", data, run="v")
    with pytest.raises(KeyboardInterrupt):
        train_stage("video", data=data, sets=SMALL, runs_dir=tmp_path, run="v", launch=killed_at(6))
    changed = ("data.micro=1", "checkpoint.keep=5", "log_every=1", "engine.max_failures=7", "skip_nonfinite=2")
    again = run("video", tmp_path, data, run="v", sets=changed)
    assert read_json(tmp_path / "v" / "run.json")["config"]["engine"]["max_failures"] == 7
    assert again["losses"]["last"] == pytest.approx(whole["losses"]["last"], rel=1e-5)
    with pytest.raises(ValueError, match="engine.precision"):
        run("video", tmp_path, data, run="v", sets=("engine.precision=bf16",))
