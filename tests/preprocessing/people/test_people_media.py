"""`mfctl preprocess --people` on real clips, if they and the extra ``people`` are there."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from preprocessing.config import PreprocessConfig
from tests.preprocessing.people.test_speech import needs_models
from workflows.data.build import build_dataset
from workflows.data.codec_options import apply_people_option
from workflows.data.inspect import inspect_dataset

MEDIA = Path(__file__).parents[4] / "shared" / "media"
ACCEPTED = {
    "grid_bbaf2n.mpg",
    "grid_id2_swwp2s.mpg",
    "grid_lrwp9a.mpg",
    "humo_astronaut.mp4",
    "humo_text_audio2.mp4",
    "linly_answer_short.mp4",
    "webav_aigen_vp9_opus.webm",
    "webav_prifrag1.mp4",
}
FACELESS = ("bbb_6ch_aac_25fps.mp4", "audio_shorter_430ms.mp4", "silent_black_10s.mp4", "slowmo_sef_12k.mp4")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    needs_models,
    pytest.mark.skipif(not MEDIA.is_dir(), reason="real clips are not here"),
]


def _config(**settings):
    return replace(apply_people_option(PreprocessConfig(workers=0, **settings), True), sizes=((64, 64),))


def _rows(dataset, kind):
    return [row for file in sorted(Path(dataset, kind).glob("*")) for row in pq.read_table(file).to_pylist()]


def test_talking_clips_are_cropped_to_the_face(tmp_path):
    out = str(tmp_path / "out")
    build_dataset([str(MEDIA / "talking")], out, _config(), progress=lambda *_: None)
    rows = _rows(out, "clips")
    assert {row["file_name"] for row in rows} == ACCEPTED
    assert all(row["face_share"] >= 0.98 and row["face_inside_share"] >= 0.98 for row in rows)
    assert all(len(row["face_boxes"]) == 4 * row["num_frames"] for row in rows)
    assert {row["reason"] for row in _rows(out, "rejects")} == {"several_faces", "turned_away"}
    names = inspect_dataset(out, verify=True)["histograms"]
    assert {"face_pixels", "speech_seconds", "speech_quality"} <= set(names)


def test_files_without_a_face_are_rejected_and_the_same_input_gives_the_same_bytes(tmp_path):
    sources = [str(MEDIA / "nasty" / name) for name in FACELESS] + [str(MEDIA / "talking" / "linly_answer_short.mp4")]
    for name in ("a", "b"):
        build_dataset(sources, str(tmp_path / name), _config(), progress=lambda *_: None)
    assert {row["reason"] for row in _rows(tmp_path / "a", "rejects")} == {"no_face"}
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a" / "clips").glob("*")}
    assert len(files) == 1
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_other_thresholds_need_another_dataset(tmp_path):
    sources, out = [str(MEDIA / "talking" / "linly_answer_short.mp4")], str(tmp_path / "out")
    config = _config()
    build_dataset(sources, out, config, progress=lambda *_: None)
    assert config.people is not None
    with pytest.raises(ValueError, match=r"another configuration:\n  people.margin"):
        build_dataset(sources, out, replace(config, people=replace(config.people, margin=1.0)))
