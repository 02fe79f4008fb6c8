"""Checkpoints in a store: which names count, damaged files, and copies of remote checkpoints."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from mfcore.errors import UserInputError
from preprocessing.io.storage import Store
from workflows.checkpoints.load import load_weights
from workflows.checkpoints.store import COMPLETE_FILE, CheckpointStore, cache_dir

OLD, NEW = "000000000008-0123abcd", "000000000016-89abcdef"
WEIGHTS = {"w": torch.arange(6.0)}


def put(root: str, name: str, files: dict[str, bytes] | None = None) -> None:
    """Write a complete checkpoint of a few bytes."""
    files = files or {"state/ema-00000-of-00001.safetensors": b"state", "run.json": b"{}"}
    store = Store(root)
    for file, content in files.items():
        store.write(f"{name}/{file}", content)
    listed = {f: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for f, c in files.items()}
    store.write(f"{name}/{COMPLETE_FILE}", json.dumps({"files": listed}).encode())


def test_cleaning_removes_only_what_a_dead_attempt_left(tmp_path):
    put(str(tmp_path), OLD)
    put(str(tmp_path), "best-keep-this")
    (tmp_path / NEW / "state").mkdir(parents=True)
    for name in ("copy", "000000000016-mine", "000000000016-89abcdef-backup", "16-89abcdef"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("the good ones")
    store = CheckpointStore(tmp_path)
    store.delete_incomplete()
    assert {p.name for p in tmp_path.iterdir()} == {
        *(OLD, "best-keep-this", "copy", "notes.txt"),
        *("000000000016-mine", "000000000016-89abcdef-backup", "16-89abcdef"),
    }
    assert store.list_complete() == [OLD], "a copy under another name is not a checkpoint of the run"


@pytest.mark.parametrize(
    "content", [b"", b'{"files": {"run.js', b"[]", b"\x00" * 40], ids=["empty", "cut", "list", "zeros"]
)
def test_a_checkpoint_with_a_damaged_marker_counts_as_incomplete_and_is_named(tmp_path, caplog, content):
    put(str(tmp_path), OLD)
    put(str(tmp_path), NEW)
    (tmp_path / NEW / COMPLETE_FILE).write_bytes(content)
    assert CheckpointStore(tmp_path).list_complete() == [OLD]
    assert f"{NEW}/{COMPLETE_FILE} is damaged" in caplog.text


def test_a_damaged_checkpoint_is_not_listed_again(tmp_path):
    put(str(tmp_path), OLD)
    put(str(tmp_path), NEW)
    (tmp_path / NEW / "run.json").write_bytes(b"")
    store = CheckpointStore(tmp_path)
    assert "run.json is damaged or missing" in (store.find_corruption(NEW) or "")
    assert store.find_corruption(OLD) is None
    assert store.list_complete() == [OLD]


@pytest.fixture
def remote(tmp_path, monkeypatch) -> str:
    """Return a checkpoint in object storage with its copies below ``tmp_path``."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = f"memory://cache-{tmp_path.name}/checkpoints"
    export = {"export/ema.safetensors": save(WEIGHTS), "export/raw.safetensors": save(WEIGHTS), "run.json": b"{}"}
    put(root, OLD, {**export, "state/ema-00000-of-00001.safetensors": b"state"})
    return f"{root}/{OLD}"


@pytest.mark.parametrize(
    "content", [save({"w": torch.zeros(6)}), save(WEIGHTS)[:-4], b""], ids=["other", "cut", "empty"]
)
def test_a_copy_of_other_content_is_fetched_again(remote, content):
    copy = cache_dir(remote) / "export" / "ema.safetensors"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(content)
    assert torch.equal(load_weights(remote)["w"], WEIGHTS["w"])


def test_a_file_that_is_damaged_in_the_store_is_one_message(remote):
    Store(remote).write("export/ema.safetensors", save({"w": torch.zeros(6)}))
    with pytest.raises(UserInputError, match=rf"{OLD}/export/ema\.safetensors is damaged.*Use another checkpoint"):
        load_weights(remote)


def test_the_folder_of_copies_of_another_user_is_refused(remote, tmp_path, monkeypatch):
    (tmp_path / f"mfctl-{os.getuid()}").mkdir()
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)
    (tmp_path / f"mfctl-{real + 1}").mkdir()
    with pytest.raises(UserInputError, match=r"mfctl-\d+ belongs to another user.*TMPDIR"):
        load_weights(remote)


def test_the_folder_of_copies_is_private(remote, tmp_path):
    folder = tmp_path / f"mfctl-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    load_weights(remote)
    assert folder.stat().st_mode & 0o077 == 0
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserInputError, match="is a link or no folder"):
        load_weights(remote)


@pytest.mark.parametrize("file", ["../../planted", "/planted"])
def test_a_marker_that_names_files_elsewhere_is_damaged(remote, tmp_path, file):
    root, _, name = remote.rpartition("/")
    Store(remote).write(COMPLETE_FILE, json.dumps({"files": {file: {"size": 1, "sha256": ""}}}).encode())
    assert CheckpointStore(root).list_complete() == []
    with pytest.raises(UserInputError, match="is not complete"):
        CheckpointStore(root).download(name, "")
    assert not list(tmp_path.rglob("planted"))


def test_a_damage_check_fetches_no_export(remote):
    root, _, name = remote.rpartition("/")
    store = CheckpointStore(root)
    assert store.find_corruption(name) is None
    copies = {p.name for p in cache_dir(remote).rglob("*") if p.is_file()}
    assert copies == {"run.json", "ema-00000-of-00001.safetensors"}
    store.store.write(f"{name}/export/raw.safetensors", b"cut")
    assert "export/raw.safetensors is damaged or missing" in (store.find_corruption(name) or "")


def test_a_damage_check_leaves_no_copy_of_a_damaged_checkpoint(remote):
    root, _, name = remote.rpartition("/")
    store = CheckpointStore(root)
    store.store.write(f"{name}/state/ema-00000-of-00001.safetensors", b"stats")
    assert "state/ema-00000-of-00001.safetensors is damaged or missing" in (store.find_corruption(name) or "")
    assert not Path(cache_dir(remote), "state").exists()
