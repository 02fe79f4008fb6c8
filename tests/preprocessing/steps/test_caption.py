"""Captions from a vision-language model or from measured values; captions of the user are kept."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.records import Clip, FaceFacts, Source, SpeechFacts
from preprocessing.steps import caption
from preprocessing.steps.caption import CaptionConfig, add_captions, measured_caption
from preprocessing.steps.encode import EncoderConfig
from tests.helpers.media_folder import write_clip
from tests.helpers.tiny_pretrained import save_llava
from workflows.data.build import build_dataset
from workflows.data.codec_options import apply_caption_option

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(1), encoder=EncoderConfig(batch=2))
FACE = FaceFacts(
    share=1.0,
    pixels=100.0,
    frontal_share=1.0,
    sharpness=100.0,
    inside_share=1.0,
    height_share=0.4,
    boxes=np.zeros((1, 4), np.float32),
)


def _speech(seconds):
    return SpeechFacts(seconds=seconds, quality=None, voice_similarity=None)


def _clip(**facts):
    frames = np.zeros((5, 8, 8, 3), np.uint8)
    return Clip(source=Source(uri="x", size=0, fingerprint=""), span=(0.0, 4.0), frames=frames, waveform=None, **facts)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({}, ""),
        ({"face": FACE}, "One person seen from the front, head and shoulders."),
        (
            {"face": replace(FACE, frontal_share=0.6, height_share=0.7), "speech": _speech(1.5)},
            "One person who turns the head, in a close-up, speaks.",
        ),
        ({"speech": _speech(3.9)}, "One person, speaks without long pauses."),
    ],
)
def test_measured_caption(facts, sentence):
    assert measured_caption(_clip(**facts)) == sentence


def test_captions_of_the_user_are_kept():
    clips = [_clip(face=FACE), _clip(face=FACE, caption="a friend", caption_source="sidecar"), _clip()]
    done = add_captions(clips, CaptionConfig(), "cpu")
    assert [clip.caption_source for clip in done] == ["measured", "sidecar", ""]
    assert done[1].caption == "a friend"
    assert add_captions(clips, None, "cpu") == clips


def test_measured_captions_need_measurements(tmp_path):
    with pytest.raises(ValueError, match="Add --people"):
        apply_caption_option(CONFIG, "measured")
    with pytest.raises(ValueError, match="contains no vision-language model"):
        apply_caption_option(CONFIG, str(tmp_path))
    assert apply_caption_option(CONFIG, None).fingerprint == CONFIG.fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, seconds in (("a", 1.1), ("b", 1.2), ("c", 1.3)):
        write_clip(folder / f"{name}.mp4", seconds)
    (folder / "b.json").write_text(json.dumps({"caption": "a friend"}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    return [str(save_llava(tmp_path_factory.mktemp("models") / str(seed), seed)) for seed in range(2)]


def _captions(dataset: Path) -> dict[str, tuple[str | None, str]]:
    rows = [row for file in (dataset / "clips").iterdir() for row in pq.read_table(file).to_pylist()]
    return {row["file_name"]: (row["caption_source"], row["caption"]) for row in rows}


@pytest.mark.slow  # importing transformers takes seconds
def test_model_describes_clips_without_a_caption_in_batches(folder, models, tmp_path):
    config, other = (apply_caption_option(CONFIG, model) for model in models)
    assert config.caption is not None
    build_dataset([str(folder)], str(tmp_path / "out"), config, progress=lambda *_: None)
    found = _captions(tmp_path / "out")
    assert found["b.mp4"] == ("sidecar", "a friend")
    assert [found[name][0] for name in ("a.mp4", "c.mp4")] == [config.caption.id] * 2
    assert all(found[name][1] for name in ("a.mp4", "c.mp4"))
    single = replace(config, encoder=EncoderConfig(batch=1))
    build_dataset([str(folder)], str(tmp_path / "single"), single, progress=lambda *_: None)
    assert _captions(tmp_path / "single") == found
    assert len({CONFIG.fingerprint, config.fingerprint, other.fingerprint}) == 3


@pytest.mark.slow
def test_only_the_failing_clip_is_rejected(folder, models, tmp_path, monkeypatch):
    def describe(config, device):
        def texts(clips):
            if any("c.mp4" in clip.source.uri for clip in clips):
                raise ZeroDivisionError("a bad picture")
            return ["a clip"] * len(clips)

        return texts

    monkeypatch.setattr(caption, "load_captioner", describe)
    monkeypatch.setattr("preprocessing.runner.load_captioner", describe)
    config = apply_caption_option(replace(CONFIG, sources_per_unit=3), models[0])
    counts = build_dataset([str(folder)], str(tmp_path / "out"), config, progress=lambda *_: None)
    assert counts["rejects_by_reason"] == {"error": 1}
    assert {name: text for name, (_, text) in _captions(tmp_path / "out").items()} == {
        "a.mp4": "a clip",
        "b.mp4": "a friend",
    }


@pytest.mark.slow
def test_missing_model_stops_before_the_first_clip(folder, models, tmp_path):
    config = apply_caption_option(CONFIG, models[0])
    assert config.caption is not None
    gone = replace(config, caption=replace(config.caption, folder=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="MFCTL_CODECS"):
        build_dataset([str(folder)], str(tmp_path / "out"), gone, progress=lambda *_: None)
    assert not (tmp_path / "out" / "_done").exists()
