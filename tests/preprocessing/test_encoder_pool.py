"""Encoder pool: decoded groups pass between operators in any order, and the files equal those of one process."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from mfcore.types import AUDIO
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.units import WorkUnit, plan_units
from preprocessing.encoder_pool import (
    EncodedUnit,
    GroupEncoder,
    UnitAssembler,
    decode_units,
    write_encoded_unit,
)
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.lease import Lease
from preprocessing.io.storage import Store
from preprocessing.pipeline import build_encoders
from preprocessing.runner import process_unit, run_encoder_pool
from preprocessing.sources.discovery import find_sources
from preprocessing.steps.encode import Encoders
from preprocessing.toyworld.world import write_toyworld
from workflows.utils.ray_runtime import ray_session

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(1), sources_per_unit=2, sizes=((32, 32),))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_toyworld(folder, clips=3, seconds=2.0, size=32, jobs=1)
    (folder / "no media.mp4").write_text("a pointer")
    (folder / "no media.txt").write_bytes(b"caf\xe9")
    return folder


def _units(clips: Path, config: PreprocessConfig = CONFIG) -> list[WorkUnit]:
    return plan_units([], find_sources([str(clips)]), config.sources_per_unit, config.fingerprint)


@pytest.fixture(scope="module")
def encoded(clips) -> list[dict]:
    """Return the rows that reach the driver."""
    return _rows(_units(clips))


def _rows(units: list[WorkUnit]) -> list[dict]:
    batch = pa.table({"unit": [unit.to_json() for unit in units]})
    encode = GroupEncoder(CONFIG, build_encoders)
    return [row for table in decode_units(batch, CONFIG) for row in encode(table).to_pylist()]


def _assemble(rows: list[dict], units: list[WorkUnit]) -> Iterator[EncodedUnit]:
    assembler = UnitAssembler(units)
    return (unit for row in rows if (unit := assembler.add(row)))


def _files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("clips", "rejects", "_done")
        for path in sorted((root / folder).glob("*"))
    }


def test_assembled_units_equal_those_of_one_process(clips, encoded, tmp_path):
    units = _units(clips)
    here, there = Store(str(tmp_path / "here")), Store(str(tmp_path / "there"))
    with Lease(here) as lease:
        for unit in units:
            process_unit(unit, here, lease.token, CONFIG, encoders=build_encoders(CONFIG))
    rows = encoded
    assert len(rows) == 6 + 1 + len(units)  # spans, the reject, and an end per unit
    with Lease(there) as lease:
        done = [
            write_encoded_unit(unit, store_uri=there.uri, token=lease.token, config=CONFIG)
            for unit in _assemble(rows[::-1], units)
        ]
    files = _files(tmp_path / "here")
    assert len(files) == 5
    assert _files(tmp_path / "there") == files
    assert [json.loads(result["marker"])["sources"] for result in done] == [2, 2]
    assert {"decode", "encode", "write"} <= set(json.loads(done[0]["spent"]))
    warnings = [text for result in done for text in json.loads(result["warnings"])]
    assert warnings == [f"{clips}/no media.txt, row 1: characters that are not valid are replaced"]


def test_unit_is_complete_with_its_last_group_only(clips, encoded):
    units = _units(clips)
    rows = [row for row in encoded if row["unit"] == units[0].name]
    for missing in range(len(rows)):
        assert not list(_assemble(rows[:missing] + rows[missing + 1 :], units))
    assert [unit.unit for unit in _assemble(rows, units)] == [units[0]]


def test_frames_pass_as_buffers_outside_of_the_pickle(clips):
    tables = list(decode_units(pa.table({"unit": [_units(clips)[1].to_json()]}), CONFIG))
    (array, *_), content = tables[0]["arrays"][0].values, tables[0]["content"][0].as_buffer()
    assert len(array.as_buffer()) == 25 * 32 * 32 * 3
    assert content.size < 4096


def test_outage_while_decoding_reaches_the_driver(clips, monkeypatch):
    def fail(*arguments):
        raise InfrastructureError("the store is away")
        yield

    monkeypatch.setattr("preprocessing.encoder_pool.prepare_sources", fail)
    with pytest.raises(InfrastructureError, match="the store is away"):
        list(_assemble(_rows(_units(clips)), _units(clips)))


def test_outage_while_writing_is_a_result(clips, encoded, tmp_path):
    (unit, *_) = _assemble(encoded, _units(clips))
    store = Store(str(tmp_path / "out"))
    with Lease(store):
        result = write_encoded_unit(unit, store_uri=store.uri, token="token of a dead driver", config=CONFIG)
    assert result["marker"] == "null"
    assert "another driver" in result["outage"]
    assert not list((tmp_path / "out").glob("_done/*"))


def test_batches_follow_the_configuration(clips):
    from preprocessing.pipeline import StepTimer, group_clips, prepare_sources

    sources = [source for unit in _units(clips) for source in unit.sources]
    batched = replace(CONFIG, encoder=replace(CONFIG.encoder, batch=4))
    pretrained = _Pretrained(**vars(batched))
    prepared = list(prepare_sources(sources, CONFIG, build_encoders(CONFIG), StepTimer()))
    assert [len(group) for group in group_clips(iter(prepared), batched)] == [1] * 7
    assert [len(group) for group in group_clips(iter(prepared), pretrained)] == [1, 4, 2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pool_on_ray_survives_a_killed_encoder(clips, tmp_path):
    """An actor that dies is restarted; the files equal those of one process."""
    units = _units(clips)
    here, there = Store(str(tmp_path / "here")), Store(str(tmp_path / "there"))
    with Lease(here) as lease:
        for unit in units:
            process_unit(unit, here, lease.token, CONFIG, encoders=build_encoders(CONFIG))
    config = replace(CONFIG, workers=2, encoder=replace(CONFIG.encoder, gpus=1.0))
    load = partial(_encoders_that_die_once, flag=tmp_path / "died")
    with ray_session(2, gpus=1), Lease(there) as lease:
        results = list(run_encoder_pool(units, there, lease.token, config, load=load))
    assert (tmp_path / "died").exists()
    assert [result["outage"] for result in results] == ["", ""]
    mine, theirs = _files(tmp_path / "here"), _files(tmp_path / "there")
    names = [name for name in mine if not name.startswith("_done")]  # markers have the fingerprint
    assert [theirs[name] for name in names] == [mine[name] for name in names]
    assert sorted(theirs) == sorted(mine)


def _encoders_that_die_once(config: PreprocessConfig, flag: Path) -> Encoders:
    encoders = build_encoders(config)
    codec = encoders.codecs[AUDIO]
    real, calls = codec.encode, []

    def encode(signal: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 3 and not flag.exists():
            flag.touch()
            os._exit(1)
        return real(signal)

    codec.encode = encode
    return encoders


class _Pretrained(PreprocessConfig):
    """Configuration with weights."""

    @property
    def weight_folders(self) -> dict[str, str]:
        return {"video": "folder"}
