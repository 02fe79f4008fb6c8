"""Near-duplicates: clips that look, move and sound the same, however they were encoded, scaled or packed.

Every clip is given a fingerprint when it is made: its mean picture on a grid of 8 x 8, how those 64 brightnesses change
over 16 instants, and the levels of 8 bands of its sound at 64 instants, each without its mean, as signed bytes. A
separate pass over finished units compares fingerprints and writes ``_duplicates.parquet``: it depends on the clips
alone, not on their order or their units. Pairs are looked for among clips that agree in 20 signs of random projections
in one of 24 bands: a pair as alike as it must be is found with a probability above 0.99. There a clip is compared with
one clip of each group that was found before, so thousands of copies of one clip cost as many comparisons, not pairs.
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
_LEAST = {"look": 0.95, "motion": 0.8, "sound": 0.8}  # cosines of a duplicate
_TABLES, _BITS = 24, 20
_GROUPS = 32  # with which a clip is compared in one band: so many unlike clips with the same signs are no chance
_ROWS = 4096  # fingerprints made numbers at a time


# ---------------------------------------------------------------------------------------------------------------- pass


@dataclass(frozen=True, kw_only=True)
class DuplicatePair:
    """Two clips that are alike; the cosine of the part in which they are least so."""

    one: int
    other: int
    likeness: float


def find_duplicates(store: Store) -> dict[str, tuple[str, float]]:
    """Clip -> (the clip of its group that is kept, likeness) in a finished dataset, and the file that says so.

    Of a group the longest clip is kept, of equals the one with the smallest id.
    """
    rows = [row for name in store.list_files("clips") for row in _rows(store, name)]
    rows.sort(key=lambda row: row[0])
    ids, seconds, prints = [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]
    pairs = list(find_pairs(prints, seconds))
    found = _grouped(ids, seconds, pairs)
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
    """Pairs that look, move and sound the same and are of about one length: those that connect every group."""
    whole = np.frombuffer(b"".join(prints), np.int8).reshape(len(prints), -1)
    groups = _Groups(len(prints))
    for members in _together(whole):
        leaders: list[int] = []  # the first clip of each group among the members
        for i in members:
            for leader in leaders:
                if groups.apart(leader, i) and (likeness := similarity(whole, seconds, leader, i)) is not None:
                    groups.join(leader, i)
                    yield DuplicatePair(one=leader, other=i, likeness=likeness)
            if len(leaders) < _GROUPS and all(groups.apart(leader, i) for leader in leaders):
                leaders.append(i)


def similarity(whole: NDArray[np.int8], seconds: Sequence[float], one: int, other: int) -> float | None:
    """How alike two clips are in the part in which they are least so; None: not enough, or of another length."""
    if abs(seconds[one] - seconds[other]) > 0.1 * max(seconds[one], seconds[other]):
        return None
    cosines: list[float] = []
    for name, a, b in zip(FINGERPRINT_PARTS, _parts(whole[one][None]), _parts(whole[other][None]), strict=True):
        if a.any() or b.any():
            cosines.append(float(a[0] @ b[0]))
            if cosines[-1] < _LEAST[name]:
                return None
    return min(cosines, default=None)


def _parts(rows: NDArray[np.int8]) -> list[NDArray[np.float32]]:
    """Each part of some fingerprints, of length 1 (or 0 where there is nothing)."""
    wide = np.split(rows.astype(np.float32), np.cumsum(list(FINGERPRINT_PARTS.values()))[:-1], axis=1)
    return [part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-6) for part in wide]


def _together(whole: NDArray[np.int8]) -> Iterator[list[int]]:
    """Clips that agree in all signs of one of the tables, in ascending order; those that have nothing are left out."""
    something = np.flatnonzero(np.asarray(whole.any(axis=1)))
    draws = (np.random.default_rng([table, 20261120]) for table in range(_TABLES))
    planes = np.concatenate([draw.standard_normal((whole.shape[1], _BITS)) for draw in draws], axis=1)
    planes = planes.astype(np.float32)
    keys = [_keys(whole[something[first : first + _ROWS]], planes) for first in range(0, len(something), _ROWS)]
    for table in range(_TABLES):
        buckets: dict[int, list[int]] = defaultdict(list)
        for i, key in zip(something.tolist(), (key for part in keys for key in part[:, table].tolist()), strict=True):
            buckets[key].append(i)
        yield from (members for members in buckets.values() if len(members) > 1)


def _keys(rows: NDArray[np.int8], planes: NDArray[np.float32]) -> NDArray[np.int64]:
    """The signs of every table as one number: ``(clips, tables)``."""
    signs = np.concatenate(_parts(rows), axis=1) @ planes > 0
    return signs.reshape(len(rows), _TABLES, _BITS) @ (1 << np.arange(_BITS))


class _Groups:
    """Everything that hangs together is one group."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def top(self, i: int) -> int:
        while self._above[i] != i:
            self._above[i] = self._above[self._above[i]]
            i = self._above[i]
        return i

    def apart(self, one: int, other: int) -> bool:
        return self.top(one) != self.top(other)

    def join(self, one: int, other: int) -> None:
        self._above[self.top(one)] = self.top(other)


def _grouped(
    ids: Sequence[str], seconds: Sequence[float], pairs: Sequence[DuplicatePair]
) -> dict[str, tuple[str, float]]:
    """Clip -> (kept, likeness) for those that go, sorted by id."""
    together, likeness = _Groups(len(ids)), dict[int, float]()
    for pair in pairs:
        together.join(pair.one, pair.other)
        for i in (pair.one, pair.other):
            likeness[i] = max(likeness.get(i, 0.0), pair.likeness)
    groups: Mapping[int, list[int]] = defaultdict(list)
    for i in likeness:
        groups[together.top(i)].append(i)
    kept = {i: min(group, key=partial(_rank, ids, seconds)) for group in groups.values() for i in group}
    gone = sorted((ids[i], ids[k], round(likeness[i], 4)) for i, k in kept.items() if i != k)
    return {clip: (keeper, how) for clip, keeper, how in gone}


def _rank(ids: Sequence[str], seconds: Sequence[float], i: int) -> tuple[float, str]:
    return -seconds[i], ids[i]
