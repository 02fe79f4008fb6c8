"""Reading datasets: fixed order, selected columns, and a split that is stable under growth."""

import json
from dataclasses import replace
from fractions import Fraction

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from preprocessing.config import PreprocessConfig
from preprocessing.dataset import reader
from preprocessing.dataset.reader import open_dataset
from preprocessing.pipeline import build_encoders
from preprocessing.sources.discovery import edge_fingerprint, find_sources
from tests.helpers.latent_dataset import write_dataset
from tests.helpers.media_folder import make_folder, write_clip
from tests.helpers.source_processing import process_source
from workflows.data.build import build_dataset

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=2)


def quiet(*_) -> None: ...


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    make_folder(folder / "media")
    build_dataset([str(folder / "media")], str(folder / "out"), CONFIG, progress=quiet)
    return folder


def test_clips_equal_the_output_of_the_steps(place):
    data = open_dataset(str(place / "out"))
    made = {
        clip.span: clip
        for source in find_sources([str(place / "media" / "long.mp4")])
        for clip in process_source(source, CONFIG, build_encoders(CONFIG))
    }
    read = [clip for clip in data if clip.source_uri.endswith("long.mp4")]
    assert len(data) == 3
    assert data.ids == sorted(data.ids)
    assert sorted(clip.chunks for clip in read) == [2, 4]
    for clip in read:
        (span,) = [span for span in made if span[0] == clip.span_start_sec]
        assert torch.equal(clip.video, made[span].latents["video"])
        assert torch.equal(clip.audio, made[span].latents["audio"])
        assert clip.caption == "a texture"
        assert clip.caption_embedding.shape == (2, CONFIG.text_width)
        assert clip.transcript == made[span].transcript
    assert data.lengths == [clip.chunks for clip in data]


def test_latents_and_clocks_agree_on_time(place):
    data = open_dataset(str(place / "out"))
    timeline = data.meta.timeline()
    (name,) = {p for p in (place / "out" / "clips").iterdir() if "000000" in p.name}
    for row in pq.read_table(name).to_pylist():
        chunks = data.clip(data.index(row["id"])).chunks
        assert row["video_latent_times"] == [0.0, *timeline.times("video", chunks).tolist()]
        assert row["audio_latent_times"] == timeline.times("audio", chunks).tolist()


def test_statistics_whiten_the_dataset(place):
    data = open_dataset(str(place / "out"))
    audio = torch.cat([data.meta.stats["audio"].whiten(clip.audio) for clip in data]).double()
    assert audio.mean(0).abs().max() < 1e-4
    assert (audio.std(0, correction=0) - 1).abs().max() < 1e-3
    heads = torch.cat([data.meta.stats["video"].whiten(c.video[:1], head=True, space=2) for c in data]).double()
    assert heads.mean((0, 2, 3)).abs().max() < 1e-3


def test_unimodal_reading_touches_only_its_own_columns(place, monkeypatch):
    asked: list[str] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, columns, **how: asked.extend(columns) or real(self, i, columns=columns, **how),
    )
    clip = open_dataset(str(place / "out"), ("audio",)).clip(0)
    assert clip.video is None
    assert clip.audio is not None
    assert not [name for name in asked if "vae" in name or "png" in name]


def test_cache_never_changes_what_is_read(place, monkeypatch):
    monkeypatch.setattr(reader, "CACHE_BYTES", 1)
    small = open_dataset(str(place / "out"))
    walk = [0, 2, 1, 0, 2]
    assert [small.clip(i).id for i in walk] == [small.ids[i] for i in walk]


def test_loading_reads_each_row_group_once_and_no_picture(tmp_path, monkeypatch):
    data = open_dataset(write_dataset(tmp_path / "set", clips=24))
    asked: list[tuple[int, list[str]]] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, columns, **how: asked.append((i, columns)) or real(self, i, columns=columns, **how),
    )
    numbers = [20, 3, 17, 0, 3]
    clips = [make() for make in data.load_clips(numbers)]
    assert sorted(group for group, _ in asked) == [0, 1]
    assert not any("first_frame_png" in columns for _, columns in asked)
    assert [clip.id for clip in clips] == [data.ids[i] for i in numbers]
    assert all(torch.equal(clip.video, data.clip(i).video) for clip, i in zip(clips, numbers, strict=True))
    assert clips[0].first_frame_png is None
    assert data.groups == [0] * 16 + [1] * 8, "known without reading a row"
    assert data.shapes == [(4, 4)] * 24


def test_a_view_numbers_its_row_groups_from_zero(tmp_path):
    data = open_dataset(write_dataset(tmp_path / "set", clips=24))
    for view in data.split(0.3):
        assert set(view.groups) <= {0, 1}
        assert [view.load_clips([i])[0]().id for i in range(len(view))] == view.ids


def test_split_is_by_source_and_survives_growth(tmp_path, monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(reader, "_share", lambda content: order.index(content) / 5)
    for name in ("a", "b", "c", "d"):
        write_clip(tmp_path / f"{name}.mp4", 1.2 + 0.1 * ord(name) % 1)
    order += [edge_fingerprint(str(tmp_path / f"{name}.mp4")) for name in "abcd"]
    out = str(tmp_path / "out")
    build_dataset([str(tmp_path)], out, CONFIG, progress=quiet)
    train, held = open_dataset(out).split(0.5)
    assert len(train) + len(held) == 4
    assert not set(train.ids) & set(held.ids)
    write_clip(tmp_path / "e.mp4", 1.9)
    order.append(edge_fingerprint(str(tmp_path / "e.mp4")))
    build_dataset([str(tmp_path)], out, CONFIG, progress=quiet)
    grown_train, grown_held = open_dataset(out).split(0.5)
    assert set(train.ids) <= set(grown_train.ids)
    assert set(held.ids) <= set(grown_held.ids)


def test_marked_duplicates_are_left_out(tmp_path):
    for name, seconds in (("a", 1.2), ("b", 1.3)):
        write_clip(tmp_path / f"{name}.mp4", seconds)
    build_dataset([str(tmp_path)], str(tmp_path / "out"), CONFIG, progress=quiet)
    first = open_dataset(str(tmp_path / "out")).ids[0]
    pq.write_table(pa.table({"id": [first]}), tmp_path / "out" / "_duplicates.parquet")
    assert len(open_dataset(str(tmp_path / "out"))) == 1


def test_unreadable_datasets_raise(place, tmp_path):
    with pytest.raises(ValueError, match="is not a dataset"):
        open_dataset(str(tmp_path))
    with pytest.raises(ValueError, match="nonsense"):
        open_dataset(str(place / "out")).index("nonsense")
    video = replace(CONFIG, modality="video")
    build_dataset([str(place / "media" / "good.mp4")], str(tmp_path / "video"), video, progress=quiet)
    with pytest.raises(ValueError, match="--modality video"):
        open_dataset(str(tmp_path / "video"), ("audio",))


def test_the_digest_depends_on_clips_and_not_on_files(tmp_path):
    """Growth, other content and exclusions change it; the files that hold the clips do not."""
    out = tmp_path / "one"
    first = open_dataset(write_dataset(out)).digest
    assert open_dataset(str(out), ("audio",)).digest == first
    assert open_dataset(write_dataset(tmp_path / "grown", clips=25)).digest != first
    table = pq.read_table(out / "clips" / "u0.parquet")
    pq.write_table(pa.table({"id": ["clip-003"]}), out / "_duplicates.parquet")
    assert open_dataset(str(out)).digest != first
    (out / "_duplicates.parquet").unlink()
    for name, part in (("u0", table.slice(10)), ("u1", table.slice(0, 10))):
        pq.write_table(part, out / "clips" / f"{name}.parquet")
        marker = {"unit": name, "files": [{"kind": "clips", "name": f"clips/{name}.parquet"}]}
        (out / "_done" / f"{name}.json").write_text(json.dumps(marker))
    assert open_dataset(str(out)).digest == first
    others = pa.array(["other", *table["source_content"].to_pylist()[1:10]])
    changed = table.slice(0, 10).set_column(table.column_names.index("source_content"), "source_content", others)
    pq.write_table(changed, out / "clips" / "u1.parquet")
    assert open_dataset(str(out)).digest != first
