"""A checkpoint exists if COMPLETE does, and rebuilds the network without other files."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoint_parts import CARD, PROGRESS, list_checkpoints, parts, writer
from tests.helpers.tiny_model import batch
from workflows.checkpoints.load import find_export, load_export
from workflows.checkpoints.store import COMPLETE_FILE, CheckpointStore
from workflows.training.checkpointing import CheckpointSaveError, latest_intact_checkpoint, load_training_state
from workflows.training.engines.state import StateShard
from workflows.training.progress import Progress


def saved(root: Path | str, engines, ema, progress: Progress = PROGRESS) -> Path:
    """Write a checkpoint and return its folder."""
    saver = writer(root, engines, ema)
    place = saver.save(progress)
    saver.wait()
    return Path(place)


def test_a_loaded_checkpoint_equals_the_saved_state(tmp_path):
    engines, ema = parts(0)
    folder = saved(tmp_path / "checkpoints", engines, ema)
    others, average = parts(1)
    assert load_training_state(CheckpointStore(folder.parent), folder.name, others, average) == PROGRESS
    for (name, a), (_, b) in zip(engines["student"].weights(), others["student"].weights(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, average.state_dict()[name]) for name, a in ema.state_dict().items())
    listed = json.loads((folder / COMPLETE_FILE).read_text())["files"].keys()
    assert listed == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {COMPLETE_FILE}


@pytest.mark.parametrize("place", [".", "checkpoints/{name}", "checkpoints/{name}/export"])
def test_an_export_is_found_in_a_run_a_checkpoint_or_itself(tmp_path, place):
    engines, ema = parts(0)
    folder = saved(tmp_path / "checkpoints", engines, ema)
    model, card = load_export(tmp_path / place.format(name=folder.name))
    assert card == CARD
    clips = batch(1, 2, "audio")
    level = {"audio": torch.full((1, 2), 0.5)}
    with torch.no_grad():
        expected = ema.module(clips.streams, level, level, clips.cond)[0]["audio"]
        assert torch.equal(model(clips.streams, level, level, clips.cond)[0]["audio"], expected)
        raw, _ = load_export(folder, "raw")
    assert torch.equal(dict(raw.named_parameters())[name := next(iter(ema.state_dict()))],
                       dict(engines["student"].weights())[name])  # fmt: skip


def test_partial_checkpoints_are_ignored_and_old_ones_deleted(tmp_path):
    engines, ema = parts(0)
    root = tmp_path / "checkpoints"
    (root / "000000000099-deaddead" / "export").mkdir(parents=True)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find_export(tmp_path)
    for n in (1, 2, 3):
        saved(root, engines, ema, Progress(step=n, samples_seen=4 * n, first={}, last={}))
    assert [p.name.split("-")[0] for p in sorted(root.iterdir())] == ["000000000008", "000000000012"]
    assert list_checkpoints(root) == sorted(root.iterdir())


def test_a_driver_that_lost_the_run_completes_no_checkpoint(tmp_path):
    engines, ema = parts(0)
    saver = writer(tmp_path, engines, ema, ours=False)
    saver.save(PROGRESS)
    with pytest.raises(CheckpointSaveError, match="belongs to another driver"):
        saver.wait()
    assert list_checkpoints(tmp_path) == []


def test_a_damaged_checkpoint_is_skipped(tmp_path, caplog):
    engines, ema = parts(0)
    before = saved(tmp_path, engines, ema)
    folder = saved(tmp_path, engines, ema, replace(PROGRESS, step=4, samples_seen=16))
    victim = folder / "export" / "raw.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert latest_intact_checkpoint(CheckpointStore(tmp_path)) == before.name
    assert "raw.safetensors is damaged" in caplog.messages[0]


def test_damaged_checkpoints_do_not_count_for_keep(tmp_path):
    """Otherwise each new checkpoint, older by samples, would be removed at once."""
    engines, ema = parts(0)
    newest = saved(tmp_path, engines, ema, replace(PROGRESS, step=8, samples_seen=32))
    (newest / "run.json").write_bytes(b"")
    store = CheckpointStore(tmp_path)
    assert latest_intact_checkpoint(store) is None
    saver = writer(store, engines, ema, keep=1)
    for step in (2, 4):
        place = Path(saver.save(replace(PROGRESS, step=step, samples_seen=4 * step)))
        saver.wait()
        assert (place / COMPLETE_FILE).exists()
    assert latest_intact_checkpoint(CheckpointStore(tmp_path)) == place.name
    last = Path(saver.save(replace(PROGRESS, step=8, samples_seen=32)))
    saver.wait()
    assert list_checkpoints(tmp_path) == [last], "of two attempts at one step, the damaged one is removed"
    assert not newest.exists()


def test_a_checkpoint_is_on_disk_before_its_marker(tmp_path, monkeypatch):
    """Power loss after the rename of COMPLETE must not leave empty files."""
    flushed: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino) or real(fd))
    engines, ema = parts(0)
    folder = saved(tmp_path / "run" / "checkpoints", engines, ema)
    marker = flushed.index((folder / COMPLETE_FILE).stat().st_ino)
    paths = [p for p in folder.rglob("*") if p.name != COMPLETE_FILE]
    assert len(paths) == 8
    for path in [*paths, folder, folder.parent, folder.parent.parent]:
        assert flushed.index(path.stat().st_ino) < marker, path
    assert folder.stat().st_ino in flushed[marker:], "the name of COMPLETE"


def test_a_killed_upload_leaves_no_temporary_files_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = f"memory://killed-{tmp_path.name}"
    script = (
        "import os, signal; from preprocessing.io.storage import Store\n"
        "from tests.helpers.checkpoint_parts import PROGRESS, parts, writer\n"
        "Store.upload = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"saver = writer({root!r}, *parts(0)); saver.save(PROGRESS); saver.wait()"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("mfctl-*/state/*.safetensors"))
    writer(root, *parts(0))
    assert not list(tmp_path.glob("mfctl-*"))


def test_a_full_disk_is_freed_for_the_outcome_of_the_run(tmp_path, monkeypatch):
    def full_disk(self, folder, name):
        path = write(self, folder, name)
        if name == "student":
            raise OSError(28, "No space left on device")
        return path

    engines, ema = parts(0)
    write = StateShard.write
    monkeypatch.setattr(StateShard, "write", full_disk)
    saver = writer(tmp_path, engines, ema)
    saver.save(PROGRESS)
    with pytest.raises(CheckpointSaveError, match="It starts from the beginning: no checkpoint is complete"):
        saver.wait()
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("make", "message"), [(False, "does not exist"), (True, "neither a run, a checkpoint nor")])
def test_a_folder_without_a_checkpoint_is_an_error(tmp_path, make, message):
    place = tmp_path / "x"
    if make:
        place.mkdir()
    with pytest.raises(ValueError, match=message):
        load_export(place)
