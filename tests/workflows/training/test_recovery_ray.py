"""Recovery with Ray Train on two workers: after a death at any moment, results equal those of an undisturbed run."""

import random
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers import training_driver
from tests.helpers.latent_dataset import write_dataset
from tests.helpers.small_training import SMALL
from workflows.checkpoints.load import load_weights
from workflows.checkpoints.store import CheckpointStore, samples_of
from workflows.config.serialization import from_dict
from workflows.tracking.tracker import read_json_lines
from workflows.training import worker
from workflows.training.progress import Progress
from workflows.training.train import train_stage
from workflows.utils.json_io import read_json

STEPS = 60
TWO = ("engine.kind=deepspeed", "engine.workers=2", "data.batch=8", f"steps={STEPS}", "log_every=1", "eval_every=20")
EVERY = 5  # steps between checkpoints
STAGES = {
    "audio": (*SMALL, *TWO, f"checkpoint.every={EVERY * 8}"),
    "mutual": (
        *SMALL,
        *TWO,
        f"checkpoint.every={EVERY * 8}",
        "objective.real_until=4",
        "objective.free_from=8",
        "objective.fake_from=12",
        "objective.dmd_from=16",
        "objective.rollout_steps=[2]",
    ),
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a dataset, and the parent runs of stage mutual."""
    folder = tmp_path_factory.mktemp("survival")
    data = write_dataset(folder / "set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFCTL_TRACKER", "json")
        for stage in ("video", "audio", "joint"):
            train_stage(stage, data=data, sets=SMALL, runs_dir=folder / "parents", run=stage, launch=worker.run_worker)
    return folder, data


def begin(stage: str, world, runs_dir: Path):
    folder, data = world
    parents = {"init_from": [str(folder / "parents" / "joint")]} if stage == "mutual" else {}
    return training_driver.start(stage, data=data, runs_dir=runs_dir, sets=STAGES[stage], **parents)


@pytest.fixture(scope="module", params=list(STAGES))
def whole(request, world, tmp_path_factory):
    """Return an undisturbed run of a stage."""
    runs_dir = tmp_path_factory.mktemp(f"whole-{request.param}")
    process = begin(request.param, world, runs_dir)
    assert process.wait() == 0, training_driver.text(runs_dir)
    return request.param, runs_dir


def losses(runs_dir: Path) -> list[dict[str, float]]:
    """Return all logged numbers except speeds."""
    timed = ("time", "data_wait", "samples_per_s", "tokens_per_s", "checkpoint", "memory", "_s")
    lines = read_json_lines(runs_dir / "a" / "metrics.jsonl")
    return [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in lines]


def check_equal(runs_dir: Path, whole: Path) -> None:
    mine, theirs = losses(runs_dir), losses(whole)
    assert [entry["step"] for entry in mine] == list(range(STEPS + 1)), "every step is logged once"
    assert len(mine[-1]) > 6
    assert mine == theirs
    for weights in ("ema", "raw"):
        a, b = load_weights(runs_dir / "a", weights), load_weights(whole / "a", weights)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def resumed_from(runs_dir: Path) -> list[int]:
    """Return the steps at which the run resumed."""
    return [int(t.split()[0]) for t in (runs_dir / "a" / "log.txt").read_text().split("resumes at step ")[1:]]


def test_a_killed_worker_costs_at_most_one_checkpoint_interval(whole, world, tmp_path):
    stage, undisturbed = whole
    victim, at = random.randrange(2), random.randrange(EVERY + 1, STEPS - EVERY)
    print(f"rank {victim} of {stage} is killed after step {at}")
    process = begin(stage, world, tmp_path)
    training_driver.wait_for(tmp_path, f"{stage} {at}/{STEPS} ", process)
    training_driver.workers(process)[victim].send_signal(signal.SIGKILL)
    assert process.wait() == 0, training_driver.text(tmp_path)
    (step,) = resumed_from(tmp_path)
    assert at - step <= 2 * EVERY, "one interval, and that of the checkpoint being written"
    check_equal(tmp_path, undisturbed)


def test_a_killed_driver_resumes_with_the_same_command(whole, world, tmp_path):
    stage, undisturbed = whole
    at = random.randrange(EVERY + 1, STEPS // 2)  # workers outlive their driver by a second or two, some dozen steps
    print(f"the driver of {stage} is killed after step {at}")
    process = begin(stage, world, tmp_path)
    training_driver.wait_for(tmp_path, f"{stage} {at}/{STEPS} ", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = begin(stage, world, tmp_path)
    assert process.wait() == 0, training_driver.text(tmp_path)
    by_a_driver = f"{stage} {STEPS}/{STEPS} " in training_driver.text(
        tmp_path
    )  # else workers that outlived theirs were done
    assert len(resumed_from(tmp_path)) == (1 if by_a_driver else 0)
    check_equal(tmp_path, undisturbed)


@pytest.mark.parametrize("who", ["worker", "driver"])
def test_sigterm_saves_at_once_and_ends_the_run(whole, world, tmp_path, who):
    stage, undisturbed = whole
    if stage != "audio":
        pytest.skip("the same for every stage")
    process = begin(stage, world, tmp_path)
    training_driver.wait_for(tmp_path, f"{stage} 7/{STEPS} ", process)
    target = training_driver.workers(process)[1] if who == "worker" else process
    target.send_signal(signal.SIGTERM)
    assert process.wait() == 1, training_driver.text(tmp_path)
    assert "Run the same command to resume" in training_driver.text(tmp_path)
    shelf = CheckpointStore(tmp_path / "a" / "checkpoints")
    saved = from_dict(Progress, read_json(Path(shelf.uri_of(shelf.list_complete()[-1]), "run.json"))["progress"])
    assert f"stopped after step {saved.step} of {STEPS}" in training_driver.text(tmp_path)
    assert 7 <= saved.step < STEPS
    process = begin(stage, world, tmp_path)
    assert process.wait() == 0, training_driver.text(tmp_path)
    assert resumed_from(tmp_path) == [saved.step]
    check_equal(tmp_path, undisturbed)


def test_a_stopped_rank_is_reported_within_a_minute(world, tmp_path):
    process = begin("audio", world, tmp_path)
    training_driver.wait_for(tmp_path, f"audio 7/{STEPS} ", process)
    victim = training_driver.workers(process)[1]
    victim.send_signal(signal.SIGSTOP)
    try:
        took = training_driver.wait_for(tmp_path, "no heartbeat", process)
    finally:
        victim.send_signal(signal.SIGCONT)
    assert took < 60
    line = next(line for line in training_driver.text(tmp_path).splitlines() if "no heartbeat" in line)
    assert line.startswith("no heartbeat of rank ") and f"(process {victim.pid} on " in line and "(last: step " in line
    assert process.wait() == 0, training_driver.text(tmp_path)
    assert "sends heartbeats again, at step" in training_driver.text(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """Yield a folder with a file system of 8 MB as the run folder ``a``."""
    disk = tmp_path / "a"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk has no free block."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_full_disk_ends_the_run_once_and_the_same_command_resumes(world, small_disk):
    steps = 300
    sets = (*SMALL, "engine.workers=2", "data.batch=8", f"steps={steps}", "log_every=1", "eval_every=100")
    start = partial(training_driver.start, "audio", data=world[1], runs_dir=small_disk, sets=sets)
    process = start()
    shelf = CheckpointStore(small_disk / "a" / "checkpoints")
    while not shelf.list_complete():
        assert process.poll() is None, training_driver.text(small_disk)
        time.sleep(0.01)
    fill(small_disk / "a" / "ballast")
    assert process.wait() == 1, training_driver.text(small_disk)
    text = training_driver.text(small_disk)
    (message,) = [line for line in text.splitlines() if "No space left" in line or "is full" in line]
    assert message.startswith("failed: ") and "run the same command" in message
    assert "Traceback" not in text and "resumes at step" not in text
    saved = shelf.list_complete()[-1]
    assert shelf.find_corruption(saved) is None
    (small_disk / "a" / "ballast").unlink()
    process = start()
    assert process.wait() == 0, training_driver.text(small_disk)
    assert resumed_from(small_disk) == [samples_of(saved) // 8]
    assert [entry["step"] for entry in losses(small_disk)] == list(range(steps + 1))
