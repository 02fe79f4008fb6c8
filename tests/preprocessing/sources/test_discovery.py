"""Sources: all kinds of arguments, any file name, parts of files, equal content."""

import json
import os
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import open_dataset
from preprocessing.dataset.units import plan_units
from preprocessing.io.storage import local_path
from preprocessing.records import Source
from preprocessing.sources.discovery import edge_fingerprint, find_sources, split_fragment
from tests.helpers.media_folder import write_clip
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=2)
NAMES = [b"-dash.mp4", b"a b.mp4", b'it\'s "quoted".mp4', b"two\nlines.mp4", b"caf\xe9.mp4", b"100%.mp4", b"#t=1,2.mp4"]


def quiet(*_) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a clip under every name; all but one are links to the same bytes."""
    place = tmp_path_factory.mktemp("names")
    write_clip(place / "first.mp4", 1.2)
    for name in NAMES:
        os.link(os.fsencode(place / "first.mp4"), os.fsencode(place) + b"/" + name)
    return place


def test_every_name_is_found_through_folder_glob_and_manifest(folder, tmp_path):
    found = find_sources([str(folder)])
    assert {os.path.basename(os.fsencode(local_path(s.uri))) for s in found} == {b"first.mp4", *NAMES}
    assert find_sources([f"{folder}/*.mp4"]) == found
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"uri": s.uri}) + "\n" for s in found))
    assert find_sources([str(tmp_path / "list.jsonl")]) == found
    rows = b"uri,caption\n" + b"".join(b'"%s/%s",x\n' % (os.fsencode(folder), n.replace(b'"', b'""')) for n in NAMES)
    (tmp_path / "list.csv").write_bytes(rows)
    assert len(find_sources([str(tmp_path / "list.csv")])) == len(NAMES)


def test_every_name_is_processed(folder, tmp_path):
    counts = build_dataset([str(folder)], str(tmp_path / "out"), replace(CONFIG, keep_duplicates=True), progress=quiet)
    assert (counts["accepted"], counts["rejected"]) == (1 + len(NAMES), 0)
    assert inspect_dataset(str(tmp_path / "out"), verify=True)["verified"]


def test_duplicates_are_rejected_with_the_name_of_the_kept_source(folder, tmp_path):
    counts = build_dataset([str(folder)], str(tmp_path / "out"), CONFIG, progress=quiet)
    assert (counts["accepted"], counts["rejects_by_reason"]) == (1, {"duplicate": len(NAMES)})
    kept = open_dataset(str(tmp_path / "out")).clip(0).source_uri
    examples = inspect_dataset(str(tmp_path / "out"), verify=True)["rejects"]["duplicates/duplicate"]["examples"]
    assert all(row["detail"] == f"same bytes as {kept}" for row in examples)


def test_equal_edges_and_parts_of_one_file_are_not_duplicates(tmp_path):
    for name, middle in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        (tmp_path / f"{name}.wav").write_bytes(bytes(1 << 17) + middle + bytes(1 << 17))
    sources = find_sources([str(tmp_path)])
    assert len({s.fingerprint for s in sources}) == 1
    (unit,) = plan_units([], sources, 5, "c")
    assert [s.duplicate_of for s in unit.sources] == [None, None, sources[0].uri]
    grown = plan_units([unit], [*sources, replace(sources[1], uri=sources[1].uri + "#t=0,1")], 5, "c")
    assert [s.duplicate_of for s in grown[1].sources] == [None]
    late = [Source(uri=sources[2].uri + "x", size=sources[0].size, fingerprint=sources[0].fingerprint)]
    assert plan_units([unit], late, 5, "c")[1].sources[0].duplicate_of is None, "it cannot be read"


def test_parts_have_exact_fragments_or_raise(tmp_path):
    write_clip(tmp_path / "a.mp4", 1.2)

    def named(**row: object) -> str:
        (tmp_path / "list.jsonl").write_text(json.dumps({"uri": "a.mp4", **row}) + "\n")
        return find_sources([str(tmp_path / "list.jsonl")])[0].uri.rpartition("/")[2]

    assert named(start=36001.234, end=36004.5) == "a.mp4#t=36001.234,36004.5"
    assert named(start=2) == "a.mp4#t=2,"
    assert named(end="1.5") == "a.mp4#t=0,1.5"
    assert split_fragment("a.mp4#t=2,") == ("a.mp4", (2.0, None))
    for wrong in ({"start": 3, "end": 2}, {"start": -1}, {"start": "soon"}):
        with pytest.raises(ValueError, match="row 1"):
            named(**wrong)


def test_equal_content_is_held_out_independent_of_its_location(tmp_path):
    for number in range(6):
        write_clip(tmp_path / "one" / f"{number}.mp4", 1.2 + number / 24) if number else None
        if number == 0:
            (tmp_path / "one").mkdir()
            write_clip(tmp_path / "one" / "0.mp4", 1.2)
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "deeper")
    for name in ("one", "two"):
        build_dataset([str(tmp_path / name)], str(tmp_path / f"set-{name}"), CONFIG, progress=quiet)
    split = [open_dataset(str(tmp_path / f"set-{name}")).split(0.4) for name in ("one", "two")]
    names = [[sorted(c.source_uri.rsplit("/", 1)[1] for c in part) for part in parts] for parts in split]
    assert names[0] == names[1]
    assert edge_fingerprint(str(tmp_path / "one" / "0.mp4")) == edge_fingerprint(
        str(tmp_path / "two" / "deeper" / "0.mp4")
    )
