"""Bookkeeping of a dataset: sources and work units, done markers, counts.

A work unit is a fixed group of sources. Its name has its number and a hash of all inputs, so a unit that is processed
twice has equal files under equal names.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mfcore.errors import UserInputError
from preprocessing.dataset.reader import PARALLEL_OPENS, damaged_file_error, read_marker
from preprocessing.dataset.schema import SOURCES
from preprocessing.io.hashing import canonical_json, content_hash
from preprocessing.io.lease import write_fenced
from preprocessing.io.parquet import read_table
from preprocessing.io.storage import Store
from preprocessing.records import Source, Word
from preprocessing.sources.discovery import has_same_content

SOURCES_FILE = "_sources.parquet"
UNKNOWN = ""  # fingerprint of a source that was recovered from clips and no longer exists
DATASET_FILE = "_dataset.json"
MARKERS_AHEAD = 1024  # read before the first one is used


@dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """A fixed group of sources, processed and published together."""

    name: str
    sources: tuple[Source, ...]

    @property
    def marker(self) -> str:
        """Return the name of the done marker."""
        return f"_done/{self.name}.json"

    def to_json(self) -> str:
        """Return JSON text, for `from_json` in a worker."""
        return canonical_json({"name": self.name, "sources": [asdict(source) for source in self.sources]})

    @classmethod
    def from_json(cls, text: str) -> "WorkUnit":
        """Return the unit that `to_json` wrote."""
        values = json.loads(text)
        return cls(name=values["name"], sources=tuple(_source(row) for row in values["sources"]))


def _source(row: Mapping[str, Any]) -> Source:
    words = row["transcript"]
    return Source(
        uri=row["uri"],
        size=row["size"],
        fingerprint=row["fingerprint"],
        caption=row["caption"],
        transcript=None if words is None else tuple(Word(**word) for word in words),
        duplicate_of=row["duplicate_of"],
    )


# ------------------------------------------------------------------------------------------------------ sources, units


def read_units(store: Store) -> list[WorkUnit]:
    """Return the planned units in order; none without a table of sources.

    Raise UserInputError if the table is damaged or has a unit with a path as its name.
    """
    if not store.exists(SOURCES_FILE):
        return []
    try:
        rows = read_table(io.BytesIO(store.read(SOURCES_FILE))).to_pylist()
        grouped: dict[str, list[Source]] = {}
        for row in rows:
            grouped.setdefault(row["unit"], []).append(_source(row))
    except (pa.ArrowInvalid, KeyError):
        raise damaged_file_error(store, SOURCES_FILE) from None
    if wrong := next((name for name in grouped if "/" in name or name in ("", ".", "..")), None):
        raise UserInputError(f"{store.uri}/{SOURCES_FILE}: {wrong!r} is not the name of a unit. Remove the dataset")
    return [WorkUnit(name=name, sources=tuple(sources)) for name, sources in grouped.items()]


def plan_units(
    known: Sequence[WorkUnit],
    sources: Iterable[Source],
    per_unit: int,
    fingerprint: str,
    *,
    keep_duplicates: bool = False,
) -> list[WorkUnit]:
    """Return the known units, followed by units of the new sources.

    A new source with the bytes of an earlier one is marked as a duplicate, independent of units. Raise ValueError if
    the content of a known source changed.
    """
    by_uri = {source.uri: source for unit in known for source in unit.sources}
    fresh: list[Source] = []
    for source in sources:
        if source.uri not in by_uri:
            fresh.append(source)
        elif by_uri[source.uri].fingerprint not in (source.fingerprint, UNKNOWN):
            raise UserInputError(
                f"{source.uri} changed since it entered the dataset. Restore the file, or write to a new dataset"
            )
    if not keep_duplicates:
        fresh = _mark_duplicates(list(by_uri.values()), fresh)
    units = list(known)
    for at in range(0, len(fresh), per_unit):
        group = tuple(fresh[at : at + per_unit])
        name = f"{len(units):06d}-{content_hash([fingerprint, [asdict(s) for s in group]], 8)}"
        units.append(WorkUnit(name=name, sources=group))
    return units


def _mark_duplicates(known: Sequence[Source], fresh: Sequence[Source]) -> list[Source]:
    """Return the fresh sources, with the URI of an equal earlier one in `duplicate_of`.

    Files are read only if size and fingerprint are equal.
    """
    kept: dict[tuple[int, str, str], list[Source]] = {}
    marked: list[Source] = []
    for number, source in enumerate([*known, *fresh]):
        group = kept.setdefault((source.size, source.fingerprint, source.uri.partition("#t=")[2]), [])
        same = next((other for other in group if number >= len(known) and has_same_content(other, source)), None)
        if number >= len(known):
            marked.append(source if same is None else replace(source, duplicate_of=same.uri))
        if same is None and source.duplicate_of is None:
            group.append(source)
    return marked


def write_units(store: Store, units: Sequence[WorkUnit], token: str) -> None:
    """Write ``_sources.parquet`` as the holder of the lease `token`."""
    rows = [asdict(source) | {"unit": unit.name} for unit in units for source in unit.sources]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SOURCES), buffer)
    write_fenced(store, token, SOURCES_FILE, buffer.getvalue())


def planned_names(store: Store) -> list[str]:
    """Return the names of the units in ``_sources.parquet`` in order."""
    column = read_table(io.BytesIO(store.read(SOURCES_FILE)), ["unit"])["unit"].to_pylist()
    return list(dict.fromkeys(column))


def finished_units(store: Store) -> set[str]:
    """Return the names of the units with a done marker."""
    return {name.removeprefix("_done/").removesuffix(".json") for name in store.list_files("_done")}


def read_markers(store: Store, units: Iterable[WorkUnit]) -> Iterator[dict[str, Any]]:
    """Yield the markers of finished units in order, read in parallel. Raise UserInputError for a damaged one."""
    names = [unit.marker for unit in units]
    with ThreadPoolExecutor(PARALLEL_OPENS) as pool:
        for at in range(0, len(names), MARKERS_AHEAD):
            yield from pool.map(partial(read_marker, store), names[at : at + MARKERS_AHEAD])


# --------------------------------------------------------------------------------------------------------- accounting


@dataclass
class DatasetCounts:
    """Sums over markers."""

    accepted: int = 0
    rejected_sources: int = 0
    seconds: float = 0.0
    sources: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])

    def add(self, marker: Mapping[str, Any]) -> None:
        """Add the counts of a marker."""
        self.accepted += marker["accepted"]
        self.rejected_sources += marker["rejected_sources"]
        self.seconds += marker["seconds"]
        self.sources += marker["sources"]
        self.reasons.update(marker["rejects_by_reason"])

    def counts(self) -> dict[str, Any]:
        """Return the counts that the command line prints, with ``spans = accepted + rejected``.

        A source without a span is one reject row and counts as one span; `rejected_sources` is their number.
        """
        rejected = sum(self.reasons.values())
        return {
            "sources": self.sources,
            "spans": self.accepted + rejected,
            "accepted": self.accepted,
            "rejected": rejected,
            "rejected_sources": self.rejected_sources,
            "rejects_by_reason": dict(sorted(self.reasons.items())),
            "hours": self.seconds / 3600,
        }


def sum_counts(markers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the counts of several markers."""
    totals = DatasetCounts()
    for marker in markers:
        totals.add(marker)
    return totals.counts()


def verify_dataset(store: Store) -> list[str]:
    """Recompute checksums and counts from the files. Return one message per error."""
    units = read_units(store)
    done = finished_units(store)
    errors = [f"unit {u.name} is unfinished" for u in units if u.name not in done]
    errors += [f"_done/{name}.json belongs to no unit" for name in sorted(done - {u.name for u in units})]
    expected: set[str] = set()
    for unit in (u for u in units if u.name in done):
        try:
            marker = read_marker(store, unit.marker)
        except UserInputError:
            errors.append(f"{unit.marker} is damaged")
            continue
        expected |= {file["name"] for file in marker["files"]}
        errors += _verify_unit(store, unit, marker)
    present = {name for folder in ("clips", "rejects") for name in store.list_files(folder)}
    return errors + [f"{name} belongs to no finished unit" for name in sorted(present - expected)]


def _verify_unit(store: Store, unit: WorkUnit, marker: Mapping[str, Any]) -> list[str]:
    errors: list[str] = []
    uris: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for file in marker["files"]:
        if not store.exists(file["name"]):
            errors.append(f"{file['name']} is missing")
            continue
        data = store.read(file["name"])
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            errors.append(f"{file['name']} does not have the checksum of its marker: remove it")
            continue
        names = ["source_uri"] if file["kind"] == "clips" else ["uri", "reason"]
        table = read_table(io.BytesIO(data), names)
        rows[file["kind"]] += table.num_rows
        uris.update(table[names[0]].to_pylist())
        reasons.update(table["reason"].to_pylist() if file["kind"] == "rejects" else [])
    if errors:
        return errors
    if rows["clips"] != marker["accepted"] or dict(reasons) != marker["rejects_by_reason"]:
        errors.append(f"unit {unit.name}: its files have {dict(rows)} rows, unlike its marker")
    unmatched = {source.uri for source in unit.sources} ^ set(uris)
    return errors + [
        f"unit {unit.name}: {uri} is in its sources or in its files, but not in both" for uri in sorted(unmatched)
    ]
