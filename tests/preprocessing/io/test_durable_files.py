"""Atomic writes: content is flushed before the rename, and the name after it."""

import os
from pathlib import Path

import pytest

from preprocessing.io.durable_files import atomic_path, make_folders
from workflows.utils.json_io import read_json, write_json, write_text_atomically


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Record flushes and renames in order."""
    seen: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append(f"flush {'folder ' + path.name if path.is_dir() else f'file of {path.stat().st_size}'}")
        real_fsync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        seen.append(f"rename {target.name}")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    return seen


def test_json_is_flushed_with_its_new_folders(tmp_path, events):
    write_json(tmp_path / "new" / "deep" / "a.json", {"a": 1})
    assert events == [
        f"flush folder {tmp_path.name}",
        "flush folder new",
        "flush file of 12",
        "rename a.json",
        "flush folder deep",
    ]
    assert read_json(tmp_path / "new" / "deep" / "a.json") == {"a": 1}


def test_only_durable_files_are_flushed(tmp_path, events):
    write_text_atomically(tmp_path / "heartbeat.json", "{}", durable=False)
    assert events == ["rename heartbeat.json"]


def test_a_failure_before_the_rename_keeps_the_old_content(tmp_path):
    write_json(tmp_path / "a.json", 1)

    def fail() -> None:
        raise RuntimeError("lease lost")

    with (
        pytest.raises(RuntimeError, match="lease lost"),
        atomic_path(tmp_path / "a.json", before_replace=fail) as temporary,
    ):
        temporary.write_text("2")
    assert read_json(tmp_path / "a.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_folders_that_cannot_be_flushed_are_accepted(tmp_path, monkeypatch):
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *more: _refuse(path, flags) or real(path, flags, *more))
    make_folders(tmp_path / "a" / "b")
    write_json(tmp_path / "a" / "b" / "c.json", 1)
    assert read_json(tmp_path / "a" / "b" / "c.json") == 1


def _refuse(path: str | Path, flags: int) -> None:
    if flags & os.O_DIRECTORY:
        raise OSError(22, "Invalid argument", str(path))
