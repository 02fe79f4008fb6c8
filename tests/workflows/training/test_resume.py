"""A run resumes from what is whole, on the data that it began with."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mfcore.errors import UserInputError
from tests.helpers.latent_dataset import write_dataset
from tests.helpers.small_training import SMALL, killed_at, run
from workflows.checkpoints.load import load_weights
from workflows.checkpoints.store import COMPLETE_FILE, CheckpointStore
from workflows.tracking.mlflow_sync import load_sync_state
from workflows.training import worker
from workflows.training.collapse_alarms import AlarmStore, active_alarms
from workflows.training.train import train_stage
from workflows.utils.json_io import read_json


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch):
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """Return a finished run "whole", and the same run killed after two checkpoints as "killed"."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFCTL_TRACKER", "json")
        sets = (*SMALL, "checkpoint.every=8")
        train_stage("video", data=data, sets=sets, runs_dir=folder, run="whole", launch=worker.run_worker)
        with pytest.raises(KeyboardInterrupt):
            train_stage("video", data=data, sets=sets, runs_dir=folder, run="killed", launch=killed_at(6))
    assert len(CheckpointStore(folder / "killed" / "checkpoints").list_complete()) == 2
    return folder


def again(runs_dir: Path, name: str, data: str | None, **kwargs):
    return run("video", runs_dir, data, run=name, sets=("checkpoint.every=8",), **kwargs)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", b""),
        ("outcome.json", b'{"progress": {"st'),
        ("alarms.json", b""),
        (f"checkpoints/NEWEST/{COMPLETE_FILE}", b""),
        ("checkpoints/NEWEST/run.json", b""),
    ],
)
def test_a_damaged_file_is_named_and_the_run_continues(runs, data, tmp_path, file, content, capfd):
    """Without --data, since a damaged record must not lose the dataset of the run."""
    shutil.copytree(runs / "killed", tmp_path / "a")
    newest = CheckpointStore(tmp_path / "a" / "checkpoints").list_complete()[-1]
    place = tmp_path / "a" / file.replace("NEWEST", newest)
    place.write_bytes(content)
    result = again(tmp_path, "a", None)
    assert place.name in capfd.readouterr().err + (tmp_path / "a" / "log.txt").read_text()
    assert "resumes at step" in (tmp_path / "a" / "log.txt").read_text()
    before, after = load_weights(runs / "whole"), load_weights(result["run_dir"])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(tmp_path / "a" / "run.json")["data"] == data


def test_a_finished_run_with_a_damaged_outcome_writes_it_again(runs, data, tmp_path):
    shutil.copytree(runs / "whole", tmp_path / "a")
    before = again(tmp_path, "a", data)
    (tmp_path / "a" / "outcome.json").write_bytes(b"")
    after = again(tmp_path, "a", data)
    assert after["losses"] == before["losses"]
    assert after["checkpoint"] == before["checkpoint"]


def test_damaged_alarms_count_as_none(tmp_path, caplog):
    (tmp_path / "alarms.json").write_bytes(b"\x00" * 8)
    assert active_alarms(tmp_path) == []
    assert "alarms.json is damaged" in caplog.text
    AlarmStore(tmp_path).update("samples", {"motion/few": "still"}, 1)
    assert active_alarms(tmp_path) == ["still"]


def grow(data: str, folder: Path, clips: int) -> None:
    """Replace the files of a dataset by those of one with more clips."""
    other = write_dataset(folder, clips=clips)
    for name in ("clips", "_done"):
        shutil.rmtree(Path(data) / name)
        shutil.copytree(Path(other) / name, Path(data) / name)


def test_a_damaged_position_of_mlflow_counts_as_absent(tmp_path, caplog):
    (tmp_path / "mlflow.json").write_bytes(b"")
    assert load_sync_state(tmp_path, "uri").metrics == 0
    assert "mlflow.json is damaged" in caplog.text


def renumber(data: str) -> None:
    """Give every clip of a dataset another source."""
    (file,) = (Path(data) / "clips").glob("*.parquet")
    table = pq.ParquetFile(file).read()
    at = table.schema.get_field_index("source_content")
    contents = [f"{text}-other" for text in table.column("source_content").to_pylist()]
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(contents, table.schema.field(at).type)), file)


def test_another_dataset_of_equal_size_is_refused_with_the_remedy(runs, data, tmp_path):
    shutil.copytree(runs / "killed", tmp_path / "a")
    shutil.copytree(data, tmp_path / "data")
    record = read_json(tmp_path / "a" / "run.json")
    assert record["dataset"].keys() == {"fingerprint", "clips", "digest"}
    renumber(str(tmp_path / "data"))
    with pytest.raises(UserInputError, match=r"the run .*/a has other settings.*dataset\.digest.*Use these settings"):
        again(tmp_path, "a", str(tmp_path / "data"))
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "a" / "run.json").write_text(json.dumps({**record, "data": str(tmp_path / "data")}))
    renumber(str(tmp_path / "data"))
    with pytest.raises(UserInputError, match=r"the clips of .*/data changed.*Restore .*--run"):
        again(tmp_path, "a", None)
    assert "resumes" not in (tmp_path / "a" / "log.txt").read_text()


def test_a_checkpoint_of_other_clips_is_refused(runs, data, tmp_path):
    """Another machine with the same `checkpoint.to` and another copy of the dataset has no record of the run."""
    to = f"checkpoint.to={tmp_path / 'to'}"
    run("video", tmp_path / "one", data, run="a", sets=(to,))
    shutil.copytree(data, tmp_path / "data")
    renumber(str(tmp_path / "data"))
    with pytest.raises(UserInputError, match=r"the clips of .*/data changed.*since the checkpoint .* was written"):
        run("video", tmp_path / "two", str(tmp_path / "data"), run="a", sets=(to,))


def test_growth_between_the_death_and_the_restart_of_workers_ends_the_run(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    restarts = []

    def launch(job):
        with pytest.raises(KeyboardInterrupt):
            killed_at(6)(job)
        grow(str(tmp_path / "data"), tmp_path / "larger", 40)
        restarts.append(worker.run_worker(job))  # returns: the launcher must not repeat it

    with pytest.raises(RuntimeError, match=r"the clips of .*/data changed \(24 -> 40.*Restore .*--run"):
        train_stage("video", data=str(tmp_path / "data"), sets=SMALL, runs_dir=tmp_path, run="a", launch=launch)
    assert restarts == [None]
    assert "resumes at step" not in (tmp_path / "a" / "log.txt").read_text()


def test_an_unfinished_dataset_at_a_restart_ends_the_run_with_the_remedy(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")

    def launch(job):
        facts = read_json(tmp_path / "data" / "_dataset.json")
        (tmp_path / "data" / "_dataset.json").write_text(json.dumps({**facts, "complete": False}))
        worker.run_worker(job)

    with pytest.raises(RuntimeError, match=r"data is unfinished\. Run the same `mfctl preprocess` command again"):
        train_stage("video", data=str(tmp_path / "data"), sets=SMALL, runs_dir=tmp_path, run="a", launch=launch)


@pytest.mark.parametrize(
    "missing", [("dataset", "digest"), ("config", "model", "branches", "video", "learned_std")], ids=lambda m: m[-1]
)
def test_a_run_of_an_earlier_version_resumes(runs, data, tmp_path, missing):
    """Earlier versions record the number of clips only, and lack newer settings, which have their defaults."""
    shutil.copytree(runs / "killed", tmp_path / "a")
    for path in [tmp_path / "a" / "run.json", *(tmp_path / "a" / "checkpoints").glob("*/run.json")]:
        record = read_json(path)
        parent = record
        for key in missing[:-1]:
            parent = parent[key]
        del parent[missing[-1]]
        path.write_text(json.dumps(record))
        if (marker := path.parent / COMPLETE_FILE).exists():
            entries = read_json(marker)
            content = path.read_bytes()
            entries["files"]["run.json"] = {"size": len(content), "sha256": sha256(content).hexdigest()}
            marker.write_text(json.dumps(entries))
    result = again(tmp_path, "a", data)
    assert "resumes at step" in (tmp_path / "a" / "log.txt").read_text()
    assert read_json(Path(result["checkpoint"], "run.json"))["dataset"]["digest"]


def test_damaged_parent_weights_are_one_message_before_any_worker_starts(runs, data, tmp_path):
    for stage in ("video", "audio"):
        run(stage, tmp_path, data, run=stage)
    (weights,) = (tmp_path / "video").glob("checkpoints/000000000032-*/export/ema.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (checkpoint,) = (tmp_path / "video").glob("checkpoints/000000000032-*")
    with pytest.raises(UserInputError, match=r"ema\.safetensors is damaged.*Use another checkpoint"):
        run("joint", tmp_path, data, run="j", init_from=[str(checkpoint), str(tmp_path / "audio")])
    assert not (tmp_path / "j").exists()
