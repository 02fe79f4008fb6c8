"""Two DeepSpeed processes equal one plain process through the whole loop; a killed Ray worker has no effect."""

import json
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.checkpoint_parts import list_checkpoints
from tests.helpers.gloo_processes import run_on
from tests.helpers.latent_dataset import write_dataset
from tests.helpers.small_training import EVERY_PART_AT_ONCE, SMALL
from workflows.training import worker
from workflows.training.train import train_stage

TWO = ("engine.kind=deepspeed", "engine.workers=2", "data.batch=8")
ONE = ("data.batch=8",)


def _work(job: worker.TrainingJob) -> None:
    worker.run_worker(job)


def two(job: worker.TrainingJob) -> None:
    run_on(2, _work, job)


def _history(result) -> list[dict[str, float]]:
    lines = Path(result["run_dir"], "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch):
    monkeypatch.setenv("MFCTL_TRACKER", "json")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_equal_one_for_every_stage(tmp_path):
    data = write_dataset(tmp_path / "set")
    for world, launch, sets in ((1, worker.run_worker, ONE), (2, two, TWO)):
        for stage in ("video", "audio", "joint", "mutual"):
            more = EVERY_PART_AT_ONCE if stage == "mutual" else ("steps=4",)
            train_stage(
                stage, data=data, sets=(*SMALL, *sets, *more), runs_dir=tmp_path / str(world), run=stage, launch=launch
            )
    for stage in ("video", "audio", "joint", "mutual"):
        one, other = (_history({"run_dir": tmp_path / world / stage}) for world in ("1", "2"))
        assert [e["step"] for e in one] == [e["step"] for e in other] == [0, 2, 4]
        for a, b in zip(one, other, strict=True):
            losses = [
                key for key in a if key.startswith(("held_out/", "grad_norm/")) or "/video" in key or "/audio" in key
            ]
            assert losses
            assert [b[key] for key in losses] == pytest.approx([a[key] for key in losses], rel=1e-4), stage


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", [("engine.kind=torch",), ("engine.kind=deepspeed", "engine.zero_stage=2")], ids=str)
def test_two_processes_that_share_the_tokens_of_the_same_clips_equal_one(tmp_path, engine):
    data = write_dataset(tmp_path / "set")
    shared = (*ONE, *engine, "engine.workers=2", "engine.sequence=2")
    for name, launch, sets in (("one", worker.run_worker, ONE), ("shared", two, shared)):
        for stage in ("video", "audio", "joint", "mutual"):
            more = EVERY_PART_AT_ONCE if stage == "mutual" else ("steps=4",)
            train_stage(
                stage, data=data, sets=(*SMALL, *sets, *more), runs_dir=tmp_path / name, run=stage, launch=launch
            )
    for stage in ("video", "audio", "joint", "mutual"):
        one, other = (_history({"run_dir": tmp_path / name / stage}) for name in ("one", "shared"))
        assert [e["step"] for e in one] == [e["step"] for e in other] == [0, 2, 4]
        for a, b in zip(one, other, strict=True):
            keys = [k for k in a if k.startswith(("held_out/", "grad_norm/")) or "/video" in k or "/audio" in k]
            assert keys and [b[k] for k in keys] == pytest.approx([a[k] for k in keys], rel=1e-4), stage
            assert a.keys() == b.keys()


def _kill_a_worker_after(checkpoints: Path) -> None:
    """SIGKILL one Ray Train worker after the first checkpoint."""
    while not list_checkpoints(checkpoints):
        time.sleep(0.02)
    children = psutil.Process().children(recursive=True)
    next(p for p in children if "RayTrainWorker" in " ".join(p.cmdline())).kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_ray_worker_does_not_change_the_result(tmp_path):
    data = write_dataset(tmp_path / "set")
    sets = (*SMALL, *ONE, "steps=24", "log_every=4", "checkpoint.every=16")
    whole = train_stage("audio", data=data, sets=sets, runs_dir=tmp_path / "whole", run="a", launch=worker.run_worker)
    killer = threading.Thread(target=_kill_a_worker_after, args=(tmp_path / "ray" / "a" / "checkpoints",), daemon=True)
    killer.start()
    killed = train_stage("audio", data=data, sets=(*sets, *TWO), runs_dir=tmp_path / "ray", run="a")
    assert not killer.is_alive(), "the run ended before a worker was killed"
    assert "resumes at step" in Path(killed["run_dir"], "log.txt").read_text()
    one, other = _history(whole), _history(killed)
    assert [e["step"] for e in one] == [e["step"] for e in other]
    for a, b in zip(one, other, strict=True):
        keys = [key for key in a if "/audio" in key]
        assert [b[key] for key in keys] == pytest.approx([a[key] for key in keys], rel=1e-4)
