"""Manifests of known corpora, from small made-up folders in their layouts."""

import json
from pathlib import Path

import pytest

from preprocessing.sources.corpora import write_manifest
from preprocessing.sources.discovery import find_sources


def made(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def rows(layout: str, folder: Path, out: Path) -> list[dict]:
    count = write_manifest(layout, str(folder), str(out))
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == count
    sources = find_sources([str(out)])  # what preprocess makes of it
    assert len(sources) == count
    return [{**row, "uri": Path(row["uri"]).name} for row in found]


def test_emilia_rows(tmp_path):
    name = "EN/EN_B00000/EN_B00000_S00000/mp3/EN_B00000_S00000_W00000"
    folder = made(tmp_path / "emilia", {
        f"{name}0.mp3": "sound", f"{name}0.json": {"text": " so it is", "duration": 7.0, "dnsmos": 3.3},
        f"{name}1.mp3": "sound", f"{name}1.json": {"duration": 2.0}, f"{name}2.mp3": "no json",
    })  # fmt: skip
    spoken, silent = rows("emilia", folder, tmp_path / "m.jsonl")
    assert [w["word"] for w in spoken["transcript"]] == ["so", "it", "is"]
    assert (spoken["transcript"][0]["start"], spoken["transcript"][-1]["end"]) == (0, 7)
    assert silent.keys() == {"uri"}  # missing stays missing


def test_panda70m_rows(tmp_path):
    table = (
        "videoID,url,timestamp,caption,matching_score\n"
        "abc,https://x,\"[['0:00:05.100', '0:00:09.900'], ['0:01:00.000', '0:01:04.500']]\","
        '"[\'a dog\', ""it\'s a cat""]","[0.4, 0.5]"\n'
        "gone,https://y,\"[['0:00:00.000', '0:00:01.000']]\",\"['x']\",\"[0.1]\"\n"
    )
    table = table.replace('\\"', '""')
    folder = made(tmp_path / "panda", {"panda70m_training_2m.csv": table, "videos/abc.mp4": "video"})
    first, second = rows("panda70m", folder, tmp_path / "m.jsonl")
    assert (first["start"], first["end"], first["caption"]) == (5.1, 9.9, "a dog")
    assert (second["start"], second["end"], second["caption"]) == (60.0, 64.5, "it's a cat")


def test_speakervid_rows(tmp_path):
    folder = made(tmp_path / "sv", {
        "clips/a_001.mp4": "video", "clips/a_001.json": {"asr": "hello you", "duration": 4, "caption": "a woman talks"},
    })  # fmt: skip
    (row,) = rows("speakervid", folder, tmp_path / "m.jsonl")
    assert row["caption"] == "a woman talks"
    assert [w["word"] for w in row["transcript"]] == ["hello", "you"]


def test_seamless_rows(tmp_path):
    words = [{"word": "yeah", "start": 0.5, "end": 0.9, "score": 0.9}, {"word": "unaligned"}]
    folder = made(tmp_path / "si", {
        "improvised/dev/0000/0000/V00_S0001_I0001_P0001.mp4": "video",
        "improvised/dev/0000/0000/V00_S0001_I0001_P0001.json": {"metadata:transcript": [{"words": words}]},
        "improvised/dev/0000/0000/V00_S0001_I0001_P0001.wav": "sound",
    })  # fmt: skip
    (row,) = rows("seamless", folder, tmp_path / "m.jsonl")
    assert row["transcript"] == [{"word": "yeah", "start": 0.5, "end": 0.9}]


def test_invalid_corpora_raise(tmp_path):
    for layout, message in (("webvid", "unknown layout"), ("emilia", "layout emilia")):
        with pytest.raises(ValueError, match=message):
            write_manifest(layout, str(tmp_path), str(tmp_path / "m.jsonl"))
    made(tmp_path / "bad", {"a.mp3": "x", "a.json": "{"})
    with pytest.raises(ValueError, match=r"a\.json"):
        write_manifest("emilia", str(tmp_path / "bad"), str(tmp_path / "m.jsonl"))
    made(tmp_path / "short", {"a.mp3": "x", "a.json": {"text": "a"}})
    with pytest.raises(ValueError, match="duration"):
        write_manifest("emilia", str(tmp_path / "short"), str(tmp_path / "m.jsonl"))
    (tmp_path / "m.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="does not exist yet"):
        write_manifest("emilia", str(tmp_path / "bad"), str(tmp_path / "m.jsonl"))
