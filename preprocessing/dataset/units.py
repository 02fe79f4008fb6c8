"""What a dataset folder says about itself: sources and work units, done markers, accounting.

A work unit is a fixed group of sources. Its name holds its number and a hash of everything its outputs depend on, so
the same unit made twice has the same files under the same names.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.dataset.schema import SOURCES
from preprocessing.io.hashing import canonical_json, content_hash
from preprocessing.io.storage import Store
from preprocessing.records import Source, Word
from preprocessing.sources.discovery import has_same_content

SOURCES_FILE = "_sources.parquet"
DATASET_FILE = "_dataset.json"


@dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """A fixed group of sources, processed and published together."""

    name: str
    sources: tuple[Source, ...]

    @property
    def marker(self) -> str:
        return f"_done/{self.name}.json"

    def to_json(self) -> str:
        """Text that ``from_json`` turns into an equal unit: how a unit travels to a worker."""
        return canonical_json({"name": self.name, "sources": [asdict(source) for source in self.sources]})

    @classmethod
    def from_json(cls, text: str) -> "WorkUnit":
        facts = json.loads(text)
        return cls(name=facts["name"], sources=tuple(_source(row) for row in facts["sources"]))


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
    """The units planned so far, in order."""
    if not store.exists(SOURCES_FILE):
        return []
    with store.open(SOURCES_FILE) as file:
        rows = pq.read_table(file).to_pylist()
    grouped: dict[str, list[Source]] = {}
    for row in rows:
        grouped.setdefault(row["unit"], []).append(_source(row))
    return [WorkUnit(name=name, sources=tuple(sources)) for name, sources in grouped.items()]


def plan_units(
    known: Sequence[WorkUnit],
    sources: Iterable[Source],
    per_unit: int,
    fingerprint: str,
    *,
    keep_duplicates: bool = False,
) -> list[WorkUnit]:
    """The known units and, for sources that none of them holds, new units behind them.

    A new source with the bytes of an earlier one is marked: which one is kept thus depends on all sources and not on
    the unit that processes them. ValueError when a known source has other content now: its clips would no longer be a
    function of it.
    """
    seen = {source.uri: source for unit in known for source in unit.sources}
    fresh: list[Source] = []
    for source in sources:
        if source.uri not in seen:
            fresh.append(source)
        elif seen[source.uri].fingerprint != source.fingerprint:
            raise ValueError(
                f"{source.uri} changed since this dataset was begun: write to a new dataset, or put the old file back"
            )
    if not keep_duplicates:
        fresh = _marked(list(seen.values()), fresh)
    units = list(known)
    for at in range(0, len(fresh), per_unit):
        group = tuple(fresh[at : at + per_unit])
        name = f"{len(units):06d}-{content_hash([fingerprint, [asdict(s) for s in group]], 8)}"
        units.append(WorkUnit(name=name, sources=group))
    return units


def _marked(known: Sequence[Source], fresh: Sequence[Source]) -> list[Source]:
    """The fresh sources; those with the bytes (and the part) of an earlier one name it. Files are read only where size
    and fingerprint are those of another."""
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


def write_units(store: Store, units: Sequence[WorkUnit]) -> None:
    """Put ``_sources.parquet``."""
    rows = [asdict(source) | {"unit": unit.name} for unit in units for source in unit.sources]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SOURCES), buffer)
    store.write(SOURCES_FILE, buffer.getvalue())


def finished_units(store: Store) -> set[str]:
    """Names of the units whose marker is there."""
    return {name.removeprefix("_done/").removesuffix(".json") for name in store.list_files("_done")}


def read_markers(store: Store, units: Iterable[WorkUnit]) -> Iterator[dict[str, Any]]:
    """The markers of these units, one at a time; they must be finished."""
    return (json.loads(store.read(unit.marker)) for unit in units)


# --------------------------------------------------------------------------------------------------------- accounting


@dataclass
class DatasetCounts:
    """What markers add up to."""

    accepted: int = 0
    rejected_sources: int = 0
    seconds: float = 0.0
    sources: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])

    def add(self, marker: Mapping[str, Any]) -> None:
        self.accepted += marker["accepted"]
        self.rejected_sources += marker["rejected_sources"]
        self.seconds += marker["seconds"]
        self.sources += marker["sources"]
        self.reasons.update(marker["rejects_by_reason"])

    def counts(self) -> dict[str, Any]:
        """The counts of the command line's contract. ``spans = accepted + rejected``: a source that gave no span at all
        is one reject row, counted as one span of unknown extent (``rejected_sources``: how many of those there are)."""
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
    """The counts of all these markers."""
    totals = DatasetCounts()
    for marker in markers:
        totals.add(marker)
    return totals.counts()


def verify_dataset(store: Store) -> list[str]:
    """Recompute checksums and the accounting from the files themselves; what is wrong, one line each."""
    units = read_units(store)
    done = finished_units(store)
    wrong = [
        f"unit {u.name} is not finished: run the same preprocess command again" for u in units if u.name not in done
    ]
    wrong += [f"_done/{name}.json belongs to no unit" for name in sorted(done - {u.name for u in units})]
    expected: set[str] = set()
    for unit in (u for u in units if u.name in done):
        marker = json.loads(store.read(unit.marker))
        expected |= {file["name"] for file in marker["files"]}
        wrong += _verify_unit(store, unit, marker)
    present = {name for folder in ("clips", "rejects") for name in store.list_files(folder)}
    return wrong + [f"{name} belongs to no finished unit" for name in sorted(present - expected)]


def _verify_unit(store: Store, unit: WorkUnit, marker: Mapping[str, Any]) -> list[str]:
    wrong: list[str] = []
    uris: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for file in marker["files"]:
        if not store.exists(file["name"]):
            wrong.append(f"{file['name']} is missing")
            continue
        data = store.read(file["name"])
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            wrong.append(f"{file['name']} has another checksum than its marker says")
            continue
        names = ["source_uri"] if file["kind"] == "clips" else ["uri", "reason"]
        table = pq.read_table(io.BytesIO(data), columns=names)
        rows[file["kind"]] += table.num_rows
        uris.update(table[names[0]].to_pylist())
        reasons.update(table["reason"].to_pylist() if file["kind"] == "rejects" else [])
    if wrong:
        return wrong
    if rows["clips"] != marker["accepted"] or dict(reasons) != marker["rejects_by_reason"]:
        wrong.append(f"unit {unit.name}: its files hold {dict(rows)}, its marker says otherwise")
    lost = {source.uri for source in unit.sources} ^ set(uris)
    return wrong + [f"unit {unit.name}: {uri} is in its sources or its files, not in both" for uri in sorted(lost)]
