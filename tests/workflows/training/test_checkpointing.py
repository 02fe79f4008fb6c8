"""A checkpoint exists if COMPLETE does, and rebuilds the network without other files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoint_parts import CARD, PROGRESS, list_checkpoints, parts, writer
from tests.helpers.tiny_model import batch
from workflows.checkpoints.load import find_export, load_export
from workflows.checkpoints.store import COMPLETE_FILE, CheckpointStore
from workflows.training.checkpointing import CheckpointSaveError, latest_intact_checkpoint, load_training_state
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
    (root / "000000000099-dead" / "export").mkdir(parents=True)
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


@pytest.mark.parametrize(("make", "message"), [(False, "does not exist"), (True, "neither a run, a checkpoint nor")])
def test_a_folder_without_a_checkpoint_is_an_error(tmp_path, make, message):
    place = tmp_path / "x"
    if make:
        place.mkdir()
    with pytest.raises(ValueError, match=message):
        load_export(place)
