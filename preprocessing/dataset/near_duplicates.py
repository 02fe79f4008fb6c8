"""Find near-duplicates: clips with equal look, motion and audio at any encoding and scale.

The fingerprint of a clip has the mean frame on a grid of 8 x 8, the changes of these 64 levels over 16 instants, and
the levels of 8 audio bands at 64 instants, each without its mean, as signed bytes. A separate pass over finished units
compares fingerprints and writes ``_duplicates.parquet``. The result does not depend on the order of clips or units.

Candidates are clips with equal signs of 20 random projections in one of 24 tables (locality-sensitive hashing). A pair
at the threshold is found with probability above 0.99. A clip is compared with one clip of each group found before, so n
copies of a clip take n comparisons.
"""

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from preprocessing.io.storage import Store
from preprocessing.steps.fingerprint import FINGERPRINT_PARTS

DUPLICATES = "_duplicates.parquet"
SCHEMA = pa.schema([pa.field("id", pa.string()), pa.field("kept", pa.string()), pa.field("likeness", pa.float64())])
_MIN_COSINE = {"look": 0.95, "motion": 0.8, "sound": 0.8}  # of a duplicate
_TABLES, _BITS = 24, 20
_MAX_GROUPS = 32  # with which a clip is compared in one table
_ROWS = 4096  # fingerprints per block of projections


# ---------------------------------------------------------------------------------------------------------------- pass


@dataclass(frozen=True, kw_only=True)
class DuplicatePair:
    """Two near-duplicates and the smallest cosine of their parts."""

    one: int
    other: int
    likeness: float


def find_duplicates(store: Store) -> dict[str, tuple[str, float]]:
    """Find the duplicates of a dataset, write their file, return clip -> (kept clip, likeness).

    The longest clip of a group is kept; among equals, the one with the smallest id.
    """
    rows = [row for name in store.list_files("clips") for row in _rows(store, name)]
    rows.sort(key=lambda row: row[0])
    ids = [row[0] for row in rows]
    seconds = [row[1] for row in rows]
    prints = [row[2] for row in rows]
    pairs = list(find_pairs(prints, seconds))
    found = _excluded(ids, seconds, pairs)
    table = pa.table(
        {
            "id": list(found),
            "kept": [kept for kept, _ in found.values()],
            "likeness": [likeness for _, likeness in found.values()],
        },
        schema=SCHEMA,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.write(DUPLICATES, buffer.getvalue())
    return found


def _rows(store: Store, name: str) -> Iterator[tuple[str, float, bytes]]:
    """Yield the id, duration and fingerprint of the clips of a file."""
    with store.open(name) as handle:
        file = pq.ParquetFile(handle)
        table = file.read(["id", "duration_sec", "fingerprint"], use_threads=False)
    for row in table.to_pylist():
        yield row["id"], row["duration_sec"], row["fingerprint"]


def find_pairs(prints: Sequence[bytes], seconds: Sequence[float]) -> Iterator[DuplicatePair]:
    """Yield the pairs of near-duplicates that connect each group."""
    fingerprints = np.frombuffer(b"".join(prints), np.int8).reshape(len(prints), -1)
    groups = _DisjointSets(len(prints))
    for members in _candidates(fingerprints):
        leaders: list[int] = []  # the first clip of each group among the members
        for i in members:
            for leader in leaders:
                if groups.apart(leader, i) and (likeness := similarity(fingerprints, seconds, leader, i)) is not None:
                    groups.join(leader, i)
                    yield DuplicatePair(one=leader, other=i, likeness=likeness)
            if len(leaders) < _MAX_GROUPS and all(groups.apart(leader, i) for leader in leaders):
                leaders.append(i)


def similarity(fingerprints: NDArray[np.int8], seconds: Sequence[float], one: int, other: int) -> float | None:
    """Return the smallest cosine of the parts of two clips; None if they are no duplicates."""
    if abs(seconds[one] - seconds[other]) > 0.1 * max(seconds[one], seconds[other]):
        return None
    cosines: list[float] = []
    for name, a, b in zip(
        FINGERPRINT_PARTS, _parts(fingerprints[one][None]), _parts(fingerprints[other][None]), strict=True
    ):
        if a.any() or b.any():
            cosines.append(float(a[0] @ b[0]))
            if cosines[-1] < _MIN_COSINE[name]:
                return None
    return min(cosines, default=None)


def _parts(rows: NDArray[np.int8]) -> list[NDArray[np.float32]]:
    """Return each part of the fingerprints, normalized to length 1; 0 for empty parts."""
    wide = np.split(rows.astype(np.float32), np.cumsum(list(FINGERPRINT_PARTS.values()))[:-1], axis=1)
    return [part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-6) for part in wide]


def _candidates(fingerprints: NDArray[np.int8]) -> Iterator[list[int]]:
    """Yield ascending groups of clips with equal signs in a table; skip empty fingerprints."""
    nonempty = np.flatnonzero(np.asarray(fingerprints.any(axis=1)))
    draws = (np.random.default_rng([table, 20261120]) for table in range(_TABLES))
    planes = np.concatenate([draw.standard_normal((fingerprints.shape[1], _BITS)) for draw in draws], axis=1)
    planes = planes.astype(np.float32)
    keys = [_keys(fingerprints[nonempty[first : first + _ROWS]], planes) for first in range(0, len(nonempty), _ROWS)]
    for table in range(_TABLES):
        buckets: dict[int, list[int]] = defaultdict(list)
        column = (key for part in keys for key in part[:, table].tolist())
        for i, key in zip(nonempty.tolist(), column, strict=True):
            buckets[key].append(i)
        yield from (members for members in buckets.values() if len(members) > 1)


def _keys(rows: NDArray[np.int8], planes: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the signs of each table as one number: ``(clips, tables)``."""
    signs = np.concatenate(_parts(rows), axis=1) @ planes > 0
    return signs.reshape(len(rows), _TABLES, _BITS) @ (1 << np.arange(_BITS))


class _DisjointSets:
    """Union-find over clips."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def find(self, i: int) -> int:
        """Return the representative of the group of `i`."""
        while self._parents[i] != i:
            self._parents[i] = self._parents[self._parents[i]]
            i = self._parents[i]
        return i

    def apart(self, one: int, other: int) -> bool:
        """Return True if the clips are in different groups."""
        return self.find(one) != self.find(other)

    def join(self, one: int, other: int) -> None:
        """Merge the groups of two clips."""
        self._parents[self.find(one)] = self.find(other)


def _excluded(
    ids: Sequence[str], seconds: Sequence[float], pairs: Sequence[DuplicatePair]
) -> dict[str, tuple[str, float]]:
    """Return excluded clip -> (kept clip, likeness), sorted by id."""
    sets = _DisjointSets(len(ids))
    likeness = dict[int, float]()
    for pair in pairs:
        sets.join(pair.one, pair.other)
        for i in (pair.one, pair.other):
            likeness[i] = max(likeness.get(i, 0.0), pair.likeness)
    groups: Mapping[int, list[int]] = defaultdict(list)
    for i in likeness:
        groups[sets.find(i)].append(i)
    kept = {i: min(group, key=partial(_rank, ids, seconds)) for group in groups.values() for i in group}
    excluded = sorted((ids[i], ids[k], round(likeness[i], 4)) for i, k in kept.items() if i != k)
    return {clip: (keeper, score) for clip, keeper, score in excluded}


def _rank(ids: Sequence[str], seconds: Sequence[float], i: int) -> tuple[float, str]:
    return -seconds[i], ids[i]
