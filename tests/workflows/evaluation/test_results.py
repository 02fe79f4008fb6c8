"""Check the storage of sweep results: batches of unfinished settings are data, never code."""

import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfcore.errors import UserInputError
from mfcore.metrics.av_sync import BlockStatistics
from preprocessing.toyworld.choices import ChoiceReading
from workflows.evaluation.clip_features import (
    ChunkBoundaryEnergy,
    ClipFeatures,
    FeatureTrack,
    SpeechSegment,
    ToyAudioFeatures,
    ToyVideoFeatures,
)
from workflows.evaluation.results import ResultStore
from workflows.evaluation.rows import SettingResult
from workflows.evaluation.worker import TaskResult


def full_features(seed: int) -> ClipFeatures:
    """Return features with every part, empty and non-finite arrays among them."""
    draw = np.random.default_rng(seed)
    reading = ChoiceReading(**{f.name: draw.integers(0, 3, 4) for f in fields(ChoiceReading)})
    return ClipFeatures(
        finite=True,
        fps=float(np.nextafter(24, 25)),
        sample_rate=16000,
        motion=np.array([np.nan, np.inf, -0.0, 0.1]),
        sharpness=None,
        blocks=BlockStatistics(*(draw.random((4, 64)) for _ in BlockStatistics._fields)),
        sound=draw.random(8, dtype=np.float32)[::2],
        seams={
            "video": ChunkBoundaryEnergy(energy=draw.random(3), times=draw.random(3), border=np.array([1, 0, 1]) > 0)
        },
        features={"audio": np.zeros((0, 5))},
        picture=ToyVideoFeatures(
            opening=draw.random(4),
            head=draw.random((4, 2)),
            face=draw.random((2, 3)),
            first_face=draw.random(3),
            choices={"gesture": reading},
            spoken_opening=draw.random(4),
        ),
        speech=ToyAudioFeatures(detected=(("ba", 0.1),), expected=(), tone=reading),
        phonemes=np.array([True, False, True]),
        words=True,
        tracks={"face": FeatureTrack(values=draw.random((2, 3), dtype=np.float32), rate=25.0)},
        utterances=(SpeechSegment(at=1.5, expected=("a", "b"), detected={"whisper": ("a",)}),),
    )


RESULT = TaskResult(
    prompts=(3, 5),
    features=(full_features(0), full_features(1)),
    length=0.1 + 0.2,
    seconds=float("nan"),
    samples={3: b"\x00\xffmp4", 5: b""},
    setting_metrics={"first_chunk_s": 1e-300},
)


def check_equal(a: Any, b: Any) -> None:
    """Compare values bit by bit, with their types."""
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    elif isinstance(a, float):
        assert np.float64(a).tobytes() == np.float64(b).tobytes()
    elif is_dataclass(a):
        for field in fields(a):
            check_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            check_equal(a[key], b[key])
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            check_equal(one, other)
    else:
        assert a == b


def test_a_stored_batch_is_read_again_bit_by_bit(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, "scope")
    store.save_batch("key", 0, RESULT)
    loaded = store.load_batch("key", 0)
    check_equal(loaded, RESULT)
    assert store.load_batch("key", 1) is None
    assert [path.suffix for path in (tmp_path / "unfinished").iterdir()] == [".safetensors"]


class _Runs:
    """An object that runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("suffix", [".pickle", ".safetensors"])
def test_code_in_a_sweep_folder_does_not_run(tmp_path: Path, suffix: str) -> None:
    import pickle

    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / f"key-0{suffix}").write_bytes(pickle.dumps(_Runs(tmp_path / "proof")))
    store = ResultStore(tmp_path, "scope")
    assert store.load_batch("key", 0) is None
    assert not (tmp_path / "proof").exists()
    store.save_finished("key", SettingResult(digest="d", name="n", rows=[], samples=[]))
    assert not list((tmp_path / "unfinished").iterdir()), "batches of earlier versions are removed as well"


@pytest.mark.parametrize("keep", [0, 7, 40, -3])
def test_a_batch_that_is_cut_is_sampled_again(tmp_path: Path, keep: int) -> None:
    store = ResultStore(tmp_path, "scope")
    store.save_batch("key", 0, RESULT)
    (path,) = (tmp_path / "unfinished").iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    assert store.load_batch("key", 0) is None


def test_a_batch_with_unknown_parts_is_sampled_again(tmp_path: Path) -> None:
    """Written by another version, or by somebody else."""
    store = ResultStore(tmp_path, "scope")
    store.save_batch("key", 0, replace(RESULT, samples={}))
    (path,) = (tmp_path / "unfinished").iterdir()
    content = path.read_bytes()
    for old, new in (
        (b"ClipFeatures", b"ClipMeasures"),
        (b"utterances", b"otterances"),
        (b"TaskResult", b"TaskRecord"),
    ):
        path.write_bytes(content.replace(old, new))
        assert store.load_batch("key", 0) is None, new


@pytest.mark.parametrize("sample", ["../../private.mp4", "/etc/private.mp4"])
def test_a_row_that_names_a_sample_outside_of_the_sweep_is_refused(tmp_path: Path, sample: str) -> None:
    store = ResultStore(tmp_path, "scope")
    store.save_finished("key", SettingResult(digest="real", name="real", rows=[], samples=[sample]))
    with pytest.raises(UserInputError, match="private.mp4', outside of"):
        store.load_all([])
