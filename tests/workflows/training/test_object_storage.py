"""The commands with S3: a real server process, accessed through fsspec."""

from dataclasses import replace
from fractions import Fraction

import fsspec
import pytest
import torch

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import open_dataset
from preprocessing.io import storage
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.storage import Store
from preprocessing.sources.discovery import find_sources
from preprocessing.toyworld.world import write_toyworld
from tests.helpers.media_folder import make_folder, write_clip
from tests.helpers.object_store import BUCKET, FaultProxy, s3_at, s3_server
from tests.helpers.small_training import SMALL, killed_at
from workflows.checkpoints.load import load_weights
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset
from workflows.training import worker
from workflows.training.train import train_stage

SHORT = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=2)


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """Start an S3 server with one empty bucket."""
    with s3_server(tmp_path_factory.mktemp("s3") / "log"):
        yield f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def dataset(s3, tmp_path_factory) -> str:
    """Preprocess clips of a bucket into the bucket."""
    clips = tmp_path_factory.mktemp("clips")
    write_toyworld(clips, clips=4, seconds=2.6, jobs=1)
    (clips / "no media.mp4").write_text("a pointer")
    fsspec.filesystem("s3").put(f"{clips}/", f"{s3}/clips/", recursive=True)
    config = PreprocessConfig(workers=0, window_seconds=Fraction(5, 2))
    facts = build_dataset([f"{s3}/clips/"], f"{s3}/data", config, progress=lambda *_: None)
    assert (facts["accepted"], facts["rejected"]) == (4, 1)
    return f"{s3}/data"


def test_a_dataset_in_a_bucket_equals_the_one_on_disk(s3, dataset, tmp_path):
    inspect_dataset(dataset, verify=True)
    fsspec.filesystem("s3").get(f"{s3}/clips/", f"{tmp_path}/clips/", recursive=True)
    config = PreprocessConfig(workers=0, window_seconds=Fraction(5, 2))
    build_dataset([f"{tmp_path}/clips"], f"{tmp_path}/data", config, progress=lambda *_: None)
    here, there = open_dataset(f"{tmp_path}/data"), open_dataset(dataset)
    mine, theirs = (sorted((d.clip(i) for i in range(len(d))), key=lambda c: c.source_uri[-12:]) for d in (here, there))
    assert len(mine) == len(theirs) == 4
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.video, b.video)
        assert torch.equal(a.audio, b.audio)
        assert b.source_uri.startswith("s3://")


def test_a_repeated_command_changes_nothing(s3, dataset):
    before = fsspec.filesystem("s3").find(dataset)
    config = PreprocessConfig(workers=0, window_seconds=Fraction(5, 2))
    build_dataset([f"{s3}/clips/"], dataset, config, progress=lambda *_: None)
    assert fsspec.filesystem("s3").find(dataset) == before


def test_a_run_with_checkpoints_in_a_bucket_equals_the_one_on_disk(s3, dataset, tmp_path, monkeypatch):
    """Killed and resumed without a local copy; two checkpoints are kept; the export loads by its URI."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sets = (*SMALL, "data.held_out=0.5", "checkpoint.keep=2")
    plain = train_stage(
        "video", data=dataset, sets=sets, run="v", runs_dir=tmp_path / "plain", launch=worker.run_worker
    )
    away = {"data": dataset, "sets": (*sets, f"checkpoint.to={s3}/runs"), "run": "v", "runs_dir": tmp_path / "away"}
    with pytest.raises(KeyboardInterrupt):
        train_stage("video", launch=killed_at(6), **away)
    result = train_stage("video", launch=worker.run_worker, **away)
    assert result["checkpoint"].startswith(f"{s3}/runs/v/checkpoints/")
    kept = fsspec.filesystem("s3").ls(f"{s3}/runs/v/checkpoints", refresh=True)
    assert len(kept) == 2
    assert not (tmp_path / "away" / "v" / "checkpoints").exists()
    before, after = load_weights(plain["run_dir"]), load_weights(result["checkpoint"])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result["losses"] == plain["losses"]


def test_a_missing_bucket_is_one_clear_message(s3):
    with pytest.raises(ValueError, match=r"s3://nowhere"):
        open_dataset("s3://nowhere/data")


@pytest.fixture(scope="module")
def media(s3, tmp_path_factory) -> str:
    """Upload five sources."""
    folder = make_folder(tmp_path_factory.mktemp("folder") / "media")
    fsspec.filesystem("s3").put(f"{folder}/", f"{s3}/media/", recursive=True)
    return f"{s3}/media"


def test_a_missing_bucket_of_media_is_one_clear_message(media):
    with pytest.raises(ValueError, match="no media files in s3://nowhere/media"):
        find_sources(["s3://nowhere/media"])
    with pytest.raises(InfrastructureError, match=r"s3://nowhere/set: no such bucket"):
        build_dataset([media], "s3://nowhere/set", SHORT, progress=lambda *_: None)


def test_prefixes_globs_objects_and_manifests(s3, media, tmp_path):
    names = ["good.mp4", "long.mp4", "mute.mp4", "short.mp4", "text.mp4"]

    def found(*arguments: str) -> list[str]:
        return [source.uri.removeprefix(f"{media}/") for source in find_sources(arguments)]

    assert found(media) == found(f"{media}/") == found(f"{media}/*.mp4") == found(f"{s3}/med*/*.mp4") == names
    assert found(f"{media}/[gl]o*.mp4") == found(f"{media}/long.mp4", f"{media}/good.mp4") == names[:2]
    fs = fsspec.filesystem("s3")
    fs.pipe_file(f"{BUCKET}/media/list.csv", b"uri,caption\nlong.mp4,first\n")
    fs.pipe_file(f"{BUCKET}/lists/all.jsonl", f'{{"uri": "{media}/good.mp4", "start": 0.5}}\n'.encode())
    (tmp_path / "local.csv").write_text(f"uri\n{media}/short.mp4\n")
    assert [(s.uri[-8:], s.caption) for s in find_sources([f"{media}/list.csv"])] == [("long.mp4", "first")]
    assert found(f"{s3}/lists/all.jsonl") == ["good.mp4#t=0.5,"]
    assert found(str(tmp_path / "local.csv")) == ["short.mp4"]
    for wrong in (f"{media}/nothing", f"{media}/*.avi", f"{media}/goo"):
        with pytest.raises(ValueError, match="no media files"):
            find_sources([wrong])
    fs.rm_file(f"{BUCKET}/media/list.csv")


@pytest.mark.slow
def test_any_object_name_works(s3, tmp_path):
    write_clip(tmp_path / "clip.mp4", 1.2)
    names = [
        "with space.mp4",
        "quo\"te's.mp4",
        "-dash.mp4",
        "100%25.mp4",
        "plus+and&.mp4",
        "\u00fcber.mp4",
        "a#t=1,2.mp4",
    ]
    fs = fsspec.filesystem("s3")
    for number, name in enumerate(names):
        data = (tmp_path / "clip.mp4").read_bytes() + bytes([number])
        fs.pipe_file(f"{BUCKET}/odd names/{name}", data)
    fs.pipe_file(f"{BUCKET}/odd names/with space.json", b'{"caption": "beside"}')
    place = f"{s3}/odd-set"
    counts = build_dataset([f"{s3}/odd names"], place, SHORT, progress=lambda *_: None)
    assert (counts["sources"], counts["accepted"]) == (len(names), len(names)), counts
    assert inspect_dataset(place, verify=True)["verified"]


def test_an_object_deleted_after_discovery_is_a_reject(s3, tmp_path):
    write_clip(tmp_path / "clip.mp4", 1.2)
    fs = fsspec.filesystem("s3")
    for name in ("a", "b"):
        fs.put_file(str(tmp_path / "clip.mp4"), f"{BUCKET}/going/{name}.mp4")
    config = replace(SHORT, sources_per_unit=1, keep_duplicates=True)
    gone = f"{BUCKET}/going/b.mp4"
    run = ([f"{s3}/going"], f"{s3}/going-set", config)
    counts = build_dataset(*run, progress=lambda *_: fs.rm_file(gone) if fs.exists(gone) else None)
    assert (counts["accepted"], counts["rejects_by_reason"]) == (1, {"unreadable": 1})


def test_a_truncated_upload_is_an_error(s3, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(1000))
    store = Store(f"{s3}/short")
    monkeypatch.setattr(store._fs, "put_file", lambda _, name: store._fs.pipe_file(name, bytes(999)))
    with pytest.raises(InfrastructureError, match="999 of 1000 bytes"):
        store.upload(tmp_path / "file", "file")


@pytest.mark.timeout(60)
def test_a_write_to_a_silent_store_ends(monkeypatch):
    """Also if the server is silent after `Expect: 100-continue`."""
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with (
        FaultProxy(9, lambda: "silent") as proxy,
        s3_at(proxy.port),
        pytest.raises(InfrastructureError, match=f"{BUCKET}/silent"),
    ):
        Store(f"s3://{BUCKET}/silent").write("a", b"some bytes")
    assert proxy.seen["silent"] > 0
