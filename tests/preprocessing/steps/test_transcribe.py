"""Transcripts from a manifest, a sidecar or Whisper, with their origin in the dataset."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from preprocessing.config import PreprocessConfig
from tests.helpers.media_folder import write_clip
from tests.helpers.tiny_pretrained import save_whisper
from workflows.data.build import build_dataset
from workflows.data.codec_options import apply_transcript_option
from workflows.data.inspect import inspect_dataset

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2))
WORDS = [{"word": "ba", "start": 0.2, "end": 0.4}]


@pytest.fixture
def manifest(tmp_path) -> Path:
    for name, seconds in (("bare", 1.2), ("sidecar", 1.3), ("listed", 1.4), ("wordless", 1.5)):
        write_clip(tmp_path / f"{name}.mp4", seconds)
    (tmp_path / "sidecar.json").write_text(json.dumps({"transcript": WORDS}))
    rows = [{"uri": "bare.mp4"}, {"uri": "sidecar.mp4"}, {"uri": "listed.mp4", "transcript": WORDS}]
    rows.append({"uri": "wordless.mp4", "transcript": []})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "list.jsonl"


def transcripts(dataset: Path) -> Mapping[str, tuple[str | None, list[str]]]:
    """Return the origin of the transcript and its words by file."""
    (file,) = (dataset / "clips").iterdir()
    columns = pq.read_table(file, columns=["file_name", "transcript_source", "transcript"]).to_pylist()
    return {r["file_name"]: (r["transcript_source"], [w["word"] for w in r["transcript"]]) for r in columns}


def test_missing_transcripts_are_transcribed_by_whisper_only_if_configured(manifest, tmp_path):
    build_dataset([str(manifest)], str(tmp_path / "plain"), CONFIG, progress=lambda *_: None)
    existing = {
        "sidecar.mp4": ("sidecar", ["ba"]),
        "listed.mp4": ("manifest", ["ba"]),
        "wordless.mp4": ("manifest", []),
    }
    assert transcripts(tmp_path / "plain") == {"bare.mp4": (None, []), **existing}
    assert inspect_dataset(str(tmp_path / "plain"))["transcripts"] == {"manifest": 2, "missing": 1, "sidecar": 1}
    config = apply_transcript_option(CONFIG, f"whisper:{save_whisper(tmp_path / 'whisper')}")
    assert config.whisper is not None
    build_dataset([str(manifest)], str(tmp_path / "heard"), config, progress=lambda *_: None)
    found = dict(transcripts(tmp_path / "heard"))
    source, words = found.pop("bare.mp4")
    assert found == existing
    assert source == config.whisper.id and words
    assert inspect_dataset(str(tmp_path / "heard"), verify=True)["transcripts"][config.whisper.id] == 1


def test_other_weights_change_the_dataset_and_missing_ones_raise(manifest, tmp_path, monkeypatch):
    one, other = (
        apply_transcript_option(CONFIG, f"whisper:{save_whisper(tmp_path / str(i), seed=i)}") for i in range(2)
    )
    assert len({CONFIG.fingerprint, one.fingerprint, other.fingerprint}) == 3
    shutil.move(tmp_path / "0", tmp_path / "moved")
    with pytest.raises(ValueError, match="MFCTL_CODECS"):
        build_dataset([str(manifest)], str(tmp_path / "out"), one, progress=lambda *_: None)
    monkeypatch.setenv("MFCTL_CODECS", str(tmp_path / "moved"))
    again = apply_transcript_option(CONFIG, f"whisper:{tmp_path / 'moved'}")
    assert again.fingerprint == one.fingerprint
    build_dataset([str(manifest)], str(tmp_path / "out"), replace(one, workers=0), progress=lambda *_: None)
    for wrong in ("whisper:", "parrot:x", f"whisper:{tmp_path}"):
        with pytest.raises(ValueError):
            apply_transcript_option(CONFIG, wrong)
