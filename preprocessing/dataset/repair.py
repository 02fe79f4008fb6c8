"""Find what a crash, a power loss or an earlier driver left of a dataset, so that `mfctl preprocess` continues from it.

A damaged marker and a marker with missing files, or files of another size, count as absent. Units that the table of
sources has lost are recovered from their clips and rejects.
"""

import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mfcore.errors import UserInputError
from preprocessing.dataset.reader import PARALLEL_OPENS
from preprocessing.dataset.units import MARKERS_AHEAD, UNKNOWN, WorkUnit, read_units
from preprocessing.io.lease import remove_fenced
from preprocessing.io.parquet import read_table
from preprocessing.io.storage import Store
from preprocessing.records import Source

_FOLDERS = ("clips", "rejects", "_done")
_FILE = re.compile(r"(?:clips|rejects)/(\d{6,}-[0-9a-f]{8})(?:-[^/]*)?\.parquet")
_MARKER = re.compile(r"_done/(\d{6,}-[0-9a-f]{8})\.json")


@dataclass(frozen=True, kw_only=True)
class UnitScan:
    """Names of the units that have files in a dataset."""

    whole: set[str]  # a marker, and all files of it
    present: set[str]  # any file


def scan_units(store: Store, expected: Mapping[str, int] | None) -> UnitScan:
    """Find whole units from one listing per folder; print a warning for each marker that does not count.

    Local markers are read and the sizes of their files compared. S3 needs a request per marker. There, a unit needs a
    file and no empty one, unless a complete dataset has other files than it had: then its markers are read as well.
    `check_markers` finds the rest in an unfinished dataset, when the counts are summed.

    Args:
        store: Store of the dataset.
        expected: `files` of the metadata of a complete dataset, {} if unknown; None for an unfinished dataset.
    """
    sizes = file_sizes(store)
    smallest: dict[str, int] = {}  # file of each unit, in bytes
    for name, size in sizes.items():
        if match := _FILE.fullmatch(name):
            smallest[match[1]] = min(size, smallest.get(match[1], size))
    markers = {match[1]: size for name, size in sizes.items() if (match := _MARKER.fullmatch(name))}
    if store.remote and (expected is None or expected == total_size(sizes)):
        broken = [unit for unit, size in markers.items() if not size or not smallest.get(unit)]
        for unit in broken:
            _warn(store, unit, f"_done/{unit}.json or a file of its unit is empty or missing")
        whole = markers.keys() - set(broken)
    else:
        whole = {unit for unit, marker in check_markers(store, markers, sizes) if marker}
    return UnitScan(whole=set(whole), present=smallest.keys() | markers.keys())


def file_sizes(store: Store) -> dict[str, int]:
    """Return the bytes of all clips, rejects and markers by name."""
    return {name: size for folder in _FOLDERS for name, size in store.list_sizes(folder).items()}


def total_size(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the `files` of the metadata: the number of files and their bytes."""
    return {"number": len(sizes), "bytes": sum(sizes.values())}


def check_markers(
    store: Store, units: Iterable[str], sizes: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield the names of units with their markers, read in parallel.

    The marker is None, with a printed warning, if it is damaged or a file of it does not have the size in `sizes`.
    """
    names = list(units)
    with ThreadPoolExecutor(PARALLEL_OPENS) as pool:
        for at in range(0, len(names), MARKERS_AHEAD):
            batch = names[at : at + MARKERS_AHEAD]
            read = pool.map(lambda unit: try_marker(store, f"_done/{unit}.json"), batch)
            for unit, marker in zip(batch, read, strict=True):
                error = f"_done/{unit}.json is damaged" if marker is None else _file_error(marker, sizes)
                if error:
                    _warn(store, unit, error)
                yield unit, None if error else marker


def _file_error(marker: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """Return why the files of a marker do not count, "" if they do."""
    for file in marker["files"]:
        if sizes.get(file["name"]) != file["bytes"]:
            return f"{file['name']} has {sizes.get(file['name'], 'no')} bytes instead of {file['bytes']}"
    return ""


def _warn(store: Store, unit: str, error: str) -> None:
    print(f"warning: {store.uri}/{error}: unit {unit} is processed again", file=sys.stderr, flush=True)


def try_marker(store: Store, name: str) -> dict[str, Any] | None:
    """Return the marker in a file; None if it is absent or damaged."""
    try:
        marker = json.loads(store.read(name))
        good = all({"name", "bytes", "kind"} <= file.keys() for file in marker["files"]) and "accepted" in marker
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return marker if good else None


def read_known_units(store: Store, whole: set[str], found: Sequence[Source]) -> tuple[list[WorkUnit], list[WorkUnit]]:
    """Return the units of the table of sources and those that it has lost but that are whole.

    A lost unit that shares a source with another unit is not returned.
    """
    try:
        known = read_units(store)
    except UserInputError as error:
        if "is damaged" not in str(error):
            raise
        print(f"warning: {error}", file=sys.stderr, flush=True)
        known = []
    taken = {source.uri for unit in known for source in unit.sources}
    by_uri = {source.uri: source for source in found}
    lost: list[WorkUnit] = []
    for name in sorted(whole - {unit.name for unit in known}):
        unit = _recover_unit(store, name, by_uri)
        uris = {source.uri for source in unit.sources} if unit else set[str]()
        if unit and not uris & taken:
            lost.append(unit)
            taken |= uris
    return known, lost


def _recover_unit(store: Store, name: str, found: Mapping[str, Source]) -> WorkUnit | None:
    """Return a unit with the sources of its clips and rejects; None if they cannot be read."""
    marker = try_marker(store, f"_done/{name}.json")
    uris: dict[str, None] = {}
    try:
        for file in marker["files"] if marker else ():
            column = "source_uri" if file["kind"] == "clips" else "uri"
            uris |= dict.fromkeys(read_table(io.BytesIO(store.read(file["name"])), [column])[column].to_pylist())
    except (pa.ArrowInvalid, FileNotFoundError):
        return None
    order = {uri: number for number, uri in enumerate(found)}
    sources = [
        found.get(uri) or Source(uri=uri, size=0, fingerprint=UNKNOWN)
        for uri in sorted(uris, key=lambda uri: (order.get(uri, len(order)), uri))
    ]
    return WorkUnit(name=name, sources=tuple(sources)) if sources else None


def discard_units(store: Store, token: str, names: set[str]) -> None:
    """Remove the markers of units, then their files, as the holder of the lease."""
    if not names:
        return
    for name in sorted(names):
        remove_fenced(store, token, f"_done/{name}.json")
    for name in file_sizes(store):
        if (match := _FILE.fullmatch(name)) and match[1] in names:
            remove_fenced(store, token, name)
