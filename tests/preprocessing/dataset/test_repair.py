"""Damaged, lost and foreign files of a dataset: the same command continues from what is whole."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from mfcore.errors import UserInputError
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import open_dataset
from preprocessing.io.lease import LeaseLostError
from preprocessing.io.storage import Store
from tests.helpers.finished_dataset import ONE_SOURCE_PER_UNIT, write_finished_dataset
from tests.helpers.media_folder import make_folder, write_clip
from workflows.data import build
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=2)


def quiet(*_) -> None: ...


def content(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    make_folder(folder / "media")
    build_dataset([str(folder / "media")], str(folder / "out"), CONFIG, progress=quiet)
    return folder


@pytest.fixture
def out(made, tmp_path) -> Path:
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("damage", ["empty", "cut", "gone"])
@pytest.mark.parametrize("folder", ["_done", "clips", "rejects"])
def test_a_damaged_unit_is_processed_again(made, out, folder, damage, capsys):
    path = min((out / folder).iterdir())
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    with pytest.raises(UserInputError, match="same `mfctl preprocess` command again"):
        inspect_dataset(str(out), verify=True)
    build_dataset([str(made / "media")], str(out), CONFIG, progress=quiet)
    assert content(out) == content(made / "out")
    if (folder, damage) != ("_done", "gone"):
        assert f"{path.parent.name}/{path.name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["_dataset.json", "_sources.parquet"])
@pytest.mark.parametrize("keep", [0, 60])
def test_a_damaged_table_is_made_again(made, out, name, keep, capsys):
    (out / name).write_bytes((out / name).read_bytes()[:keep])
    with pytest.raises(UserInputError, match=rf"{name} is damaged. Run the same `mfctl preprocess`"):
        inspect_dataset(str(out), verify=True)
    build_dataset([str(made / "media")], str(out), CONFIG, progress=quiet)
    assert content(out) == content(made / "out")
    assert f"{name} is damaged" in capsys.readouterr().err


def test_a_damaged_table_does_not_accept_another_configuration(made, out):
    (out / "_dataset.json").write_bytes(b"")
    before = content(out)
    with pytest.raises(UserInputError, match="another configuration"):
        build_dataset([str(made / "media")], str(out), replace(CONFIG, min_chunks=3), progress=quiet)
    assert content(out) == before


def test_an_empty_lock_is_replaced(made, out):
    (out / "_lock").write_bytes(b"")
    next((out / "_done").iterdir()).unlink()
    build_dataset([str(made / "media")], str(out), CONFIG, progress=quiet)
    assert content(out) == content(made / "out")


@pytest.fixture
def grown(tmp_path) -> tuple[Path, Path]:
    """Return media and a dataset that was extended once."""
    media, out = tmp_path / "media", tmp_path / "out"
    media.mkdir()
    for name, seconds in (("b", 1.2), ("d", 1.3), ("a", 1.4)):
        write_clip(media / f"{name}.mp4", seconds)
        if name != "d":
            build_dataset([str(media)], str(out), CONFIG, progress=quiet)
    return media, out


def test_a_lost_table_keeps_the_clips_of_an_extended_dataset_and_of_deleted_sources(grown):
    media, out = grown
    before, ids = content(out / "clips"), open_dataset(str(out)).ids
    (media / "b.mp4").unlink()
    (out / "_sources.parquet").write_bytes(b"")
    write_clip(media / "c.mp4", 1.5)
    counts = build_dataset([str(media)], str(out), CONFIG, progress=quiet)
    assert counts["sources"] == 4
    assert before.items() <= content(out / "clips").items()
    assert set(ids) < set(open_dataset(str(out)).ids)
    assert inspect_dataset(str(out), verify=True)["verified"]


def test_units_that_a_late_driver_removed_from_the_table_are_kept(grown):
    """The table has the first two sources only, as older versions left it; all clips stay."""
    media, out = grown
    expected = content(out)
    table = pq.read_table(out / "_sources.parquet")
    pq.write_table(table.slice(0, 1), out / "_sources.parquet")
    with pytest.raises(UserInputError, match="belongs to no unit"):
        inspect_dataset(str(out), verify=True)
    build_dataset([str(media)], str(out), CONFIG, progress=quiet)
    assert inspect_dataset(str(out), verify=True)["verified"]
    assert content(out / "clips") == {
        name.removeprefix("clips/"): digest for name, digest in expected.items() if name.startswith("clips/")
    }


# ------------------------------------------------------------------------------------------------------------- fencing


def steal(out: Path, media: Path) -> None:
    """Finish the dataset as another driver, as if the process with the lease were dead."""
    store = Store(str(out))
    held = json.loads(store.read("_lock")) | {"pid": 2**22 + 1}
    store.write("_lock", json.dumps(held).encode())
    build_dataset([str(media)], str(out), CONFIG, progress=quiet)


@pytest.mark.parametrize("function", ["_write_metadata", "write_units", "process_units", "_finish"])
def test_a_driver_that_lost_its_lease_changes_nothing(made, tmp_path, monkeypatch, function):
    """The first driver has one source and is paused before `function`; the second one has all."""
    out = tmp_path / "out"
    real = getattr(build, function)
    paused: list[dict[str, str]] = []

    def pause(*args, **kwargs):
        if not paused:
            paused.append({})
            steal(out, made / "media")
            paused.append(content(out))
        return real(*args, **kwargs)

    monkeypatch.setattr(build, function, pause)
    with pytest.raises(LeaseLostError):
        build_dataset([str(made / "media" / "good.mp4")], str(out), CONFIG, progress=quiet)
    assert content(out) == paused[1]
    assert inspect_dataset(str(out), verify=True)["sources"] == 5


# ----------------------------------------------------------------------------------------------------------- listings


def resume_listings(tmp_path: Path, units: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    media, out = tmp_path / f"media{units}", tmp_path / f"out{units}"
    monkeypatch.setattr("os.fsync", lambda _: None)
    write_finished_dataset(media, str(out), units)
    listed = Counter[str]()
    real = LocalFileSystem.ls
    with monkeypatch.context() as patch:
        patch.setattr(
            LocalFileSystem,
            "ls",
            lambda self, path, **how: listed.update([Path(path).name]) or real(self, path, **how),
        )
        counts = build_dataset([str(media)], str(out), ONE_SOURCE_PER_UNIT, progress=quiet)
    assert counts["rejected"] == units
    return listed


def test_listings_do_not_grow_with_the_number_of_units(tmp_path, monkeypatch):
    few, many = (resume_listings(tmp_path, units, monkeypatch) for units in (10, 200))
    assert few["_done"] == many["_done"] == 1
    assert sum(few.values()) == sum(many.values())


# ------------------------------------------------------------------------------------------------------------- names


def test_names_that_lead_out_of_the_dataset_are_refused(made, out, tmp_path):
    table = pq.read_table(out / "_sources.parquet")
    names = pa.array(["../../escape/planted"] * table.num_rows)
    pq.write_table(table.set_column(table.column_names.index("unit"), "unit", names), out / "_sources.parquet")
    before = content(tmp_path)
    with pytest.raises(UserInputError, match="'../../escape/planted' is not the name of a unit"):
        build_dataset([str(made / "media")], str(out), CONFIG, progress=quiet)
    assert content(tmp_path) == before


def test_marker_that_names_a_file_outside_is_refused(out, tmp_path):
    path = min((out / "_done").iterdir())
    marker = json.loads(path.read_bytes())
    clips = next(file for file in marker["files"] if file["kind"] == "clips")
    shutil.copy(out / clips["name"], tmp_path / "private.parquet")
    for name in ("../private.parquet", str(tmp_path / "private.parquet")):
        clips["name"] = name
        path.write_text(json.dumps(marker))
        with pytest.raises(UserInputError, match="is outside of it"):
            open_dataset(str(out))
