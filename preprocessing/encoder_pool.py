"""Two operators for pretrained codecs: CPU workers decode units into groups of clips, a pool of actors encodes them.

A row between the operators holds one group: the clips that are encoded together. The groups of a unit are those of
`process_unit`, so the files of a unit do not depend on the number of workers or on the operators.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa
import torch

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.repair import try_marker
from preprocessing.dataset.units import WorkUnit
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.hashing import canonical_json
from preprocessing.io.processes import delete_stale_scratch
from preprocessing.io.storage import Store
from preprocessing.pipeline import StepTimer, build_encoders, encode_group, group_clips, prepare_sources
from preprocessing.steps.encode import Encoders
from preprocessing.unit_files import UnitRow, unit_row, write_unit

LoadEncoders = Callable[[PreprocessConfig], Encoders]
UnitResult = dict[str, str]
"""JSON of the marker, of the seconds by step and of the warnings of a unit; ``outage``: message if storage failed."""
END = -1  # index of the row after the last group of a unit

GROUPS = pa.schema(
    [
        pa.field("unit", pa.string()),
        pa.field("index", pa.int64()),  # of the group within the unit, or END
        pa.field("groups", pa.int64()),  # number of groups of the unit, in its last row; else null
        pa.field("content", pa.large_binary()),  # pickled group, later pickled rows of the group
        pa.field("arrays", pa.list_(pa.large_binary())),  # frames and waveforms of the group
        pa.field("timer", pa.binary()),  # pickled StepTimer of the operator
        pa.field("outage", pa.string()),  # message if storage failed
    ]
)
"""Rows between the operators and to the driver. Binary columns with 32-bit offsets would overflow at 2 GB."""


def decode_units(batch: pa.Table, config: PreprocessConfig) -> Iterator[pa.Table]:
    """Decode the units of a batch on a CPU worker; yield a row per group, and a last row per unit."""
    torch.set_num_threads(1)  # one worker per CPU
    delete_stale_scratch()
    for text in batch["unit"].to_pylist():
        unit = WorkUnit.from_json(text)
        timer, groups = StepTimer(), 0
        try:
            prepared = prepare_sources(unit.sources, config, _unloaded_encoders(config), timer)
            for group in group_clips(prepared, config):
                buffers: list[pickle.PickleBuffer] = []
                content = pickle.dumps(group, protocol=5, buffer_callback=buffers.append)
                yield _table(unit.name, index=groups, content=content, arrays=[b.raw() for b in buffers])
                groups += 1
        except (InfrastructureError, OSError) as error:  # a message: Ray would add long tracebacks
            yield _table(unit.name, outage=str(error) or repr(error))
            return
        yield _table(unit.name, groups=groups, timer=pickle.dumps(timer))


@lru_cache(maxsize=1)
def _unloaded_encoders(config: PreprocessConfig) -> Encoders:
    return build_encoders(config)


class GroupEncoder:
    """Actor that encodes groups with codecs that it loads once."""

    def __init__(self, config: PreprocessConfig, load: LoadEncoders) -> None:
        torch.set_num_threads(1)
        self._config, self._encoders = config, load(config)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Replace the clips of a row by their encoded rows. The last row of a unit passes unchanged."""
        if batch["index"][0].as_py() == END:
            return batch
        timer = StepTimer()
        arrays = [value.as_buffer() for value in batch["arrays"][0].values]
        group = pickle.loads(batch["content"][0].as_buffer(), buffers=arrays)
        done = encode_group(group, self._config, self._encoders, timer)
        rows = [unit_row(source, found, self._config, self._encoders) for source, found in done]
        return _table(
            batch["unit"][0].as_py(),
            index=batch["index"][0].as_py(),
            content=pickle.dumps(rows),
            timer=pickle.dumps(timer),
        )


def _table(
    unit: str,
    *,
    index: int = END,
    groups: int | None = None,
    content: bytes = b"",
    arrays: Sequence[memoryview] = (),
    timer: bytes = b"",
    outage: str = "",
) -> pa.Table:
    row = {
        "unit": unit,
        "index": index,
        "groups": groups,
        "content": content,
        "arrays": list(arrays),
        "timer": timer,
        "outage": outage,
    }
    return pa.Table.from_pylist([row], schema=GROUPS)


@dataclass(frozen=True, kw_only=True)
class EncodedUnit:
    """Encoded groups of a whole unit."""

    unit: WorkUnit
    rows: Sequence[bytes]  # pickled rows of each group, in order
    timers: Sequence[bytes]  # pickled timers of all operators


@dataclass
class _PartialUnit:
    """Encoded groups of a unit that have arrived at the driver."""

    groups: int | None = None  # None: the last row has not arrived
    rows: dict[int, bytes] = field(default_factory=dict)  # index of the group -> pickled rows
    timers: list[bytes] = field(default_factory=list)


class UnitAssembler:
    """Collects encoded groups, in any order, into units."""

    def __init__(self, units: Sequence[WorkUnit]) -> None:
        self._units = {unit.name: unit for unit in units}
        self._partial: dict[str, _PartialUnit] = {}

    def add(self, row: Mapping[str, Any]) -> EncodedUnit | None:
        """Add a row; return its unit once all groups have arrived.

        Raise InfrastructureError for a row with an outage.
        """
        if row["outage"]:
            raise InfrastructureError(row["outage"])
        part = self._partial.setdefault(row["unit"], _PartialUnit())
        part.timers.append(row["timer"])
        if row["index"] == END:
            part.groups = row["groups"]
        else:
            part.rows[row["index"]] = row["content"]
        if part.groups != len(part.rows):
            return None
        del self._partial[row["unit"]]
        rows = [part.rows[i] for i in sorted(part.rows)]
        return EncodedUnit(unit=self._units[row["unit"]], rows=rows, timers=part.timers)


def write_encoded_unit(encoded: EncodedUnit, *, store_uri: str, token: str, config: PreprocessConfig) -> UnitResult:
    """Write a unit from its encoded groups; return its marker, seconds by step, warnings and outage as JSON."""
    store, timer = Store(store_uri), StepTimer()
    for part in map(pickle.loads, encoded.timers):
        timer.merge(part)
    rows = (row for group in encoded.rows for row in _load_rows(group))
    try:
        # a task that Ray repeats finds its marker
        marker = try_marker(store, encoded.unit.marker) or write_unit(
            encoded.unit,
            rows,
            store=store,
            token=token,
            config=config,
            encoders=_unloaded_encoders(config),
            timer=timer,
        )
    except (InfrastructureError, OSError) as error:  # a message: Ray would add long tracebacks
        return unit_result(outage=str(error) or repr(error))
    return unit_result(marker, timer)


def unit_result(
    marker: Mapping[str, Any] | None = None, timer: StepTimer | None = None, outage: str = ""
) -> UnitResult:
    """Return the result of a unit as strings, which pass through Ray Data unchanged."""
    return {
        "marker": canonical_json(marker),
        "spent": canonical_json(timer.seconds if timer else {}),
        "warnings": canonical_json(list(timer.warnings) if timer else []),
        "outage": outage,
    }


def _load_rows(group: bytes) -> list[UnitRow]:
    return pickle.loads(group)
