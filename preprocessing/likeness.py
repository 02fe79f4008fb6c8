"""Near-duplicates: clips that look, move and sound the same, however they were encoded, scaled or packed.

Every clip is given a fingerprint when it is made: its mean picture on a grid of 8 x 8, how those 64 brightnesses change
over 16 instants, and the levels of 8 bands of its sound at 64 instants, each without its mean, as signed bytes. A
separate pass over finished units compares fingerprints and writes ``_duplicates.parquet``: it depends on the clips
alone, not on their order or their units. Pairs are looked for among clips that agree in 20 signs of random projections
in one of 24 bands: a pair as alike as it must be is found with a probability above 0.99, and no clip is compared with
all others.
"""

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from preprocessing.record import Clip
from preprocessing.storage import Store

DUPLICATES = "_duplicates.parquet"
SCHEMA = pa.schema([pa.field("id", pa.string()), pa.field("kept", pa.string()), pa.field("likeness", pa.float64())])

_GRID, _INSTANTS, _MOMENTS = 8, 16, 64
_BANDS = np.geomspace(100, 6000, 9)  # Hz
_PARTS = {"look": _GRID**2, "motion": _GRID**2 * _INSTANTS, "sound": 8 * _MOMENTS}
_LEAST = {"look": 0.95, "motion": 0.8, "sound": 0.8}  # cosines of a duplicate
_TABLES, _BITS = 24, 20
_FULL = 3.0  # standard deviations at the end of a signed byte's range


def fingerprint(clip: Clip, sample_rate: int) -> Clip:
    """The clip with its fingerprint: parts that it has no stream for are zeros."""
    look = motion = np.zeros(0)
    if clip.frames is not None:
        look, motion = _seen(clip.frames)
    sound = np.zeros(0) if clip.waveform is None else _heard(clip.waveform, sample_rate)
    parts = dict(zip(_PARTS, (look, motion, sound), strict=True))
    return replace(clip, fingerprint=b"".join(_bytes(parts[name], size) for name, size in _PARTS.items()))


def _seen(frames: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean picture ``(64,)`` and its changes ``(16 * 64,)``."""
    centres = (np.arange(_INSTANTS) + 0.5) / _INSTANTS * len(frames)
    around = np.clip(centres[:, None].astype(int) + np.arange(-1, 2), 0, len(frames) - 1)  # three frames each
    chosen = frames[around.ravel()]
    rows, columns = (np.arange(_GRID + 1) * size // _GRID for size in chosen.shape[1:3])
    grey = chosen.astype(np.float64).mean(-1)
    sums = np.add.reduceat(np.add.reduceat(grey, rows[:-1], axis=1), columns[:-1], axis=2)
    levels = sums / np.outer(np.maximum(np.diff(rows), 1), np.maximum(np.diff(columns), 1))
    instants = levels.reshape(_INSTANTS, 3, _GRID**2).mean(1)
    mean = instants.mean(0)
    return mean - mean.mean(), (instants - mean).ravel()


def _heard(sound: NDArray[np.float32], sample_rate: int) -> NDArray[np.float64]:
    """Logarithms of band powers ``(8 * 64,)`` less the mean of each band: the same at any loudness."""
    edges = np.linspace(0, len(sound), _MOMENTS + 1).astype(int)
    powers = np.zeros((_MOMENTS, 8))
    for i, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        spectrum = np.abs(np.fft.rfft(sound[start:end])) ** 2 / max(1, end - start)
        at = np.searchsorted(np.fft.rfftfreq(max(1, end - start), 1 / sample_rate), _BANDS)
        powers[i] = [spectrum[a:b].sum() for a, b in zip(at, at[1:], strict=False)]
    floor = max(powers.max() * 1e-5, 1e-12)
    levels = np.log(powers + floor)
    return (levels - levels.mean(0)).ravel()


def _bytes(values: NDArray[np.float64], size: int) -> bytes:
    spread = float(values.std()) if len(values) else 0.0
    if spread < 1e-9:
        return bytes(size)
    return np.clip(np.round(values / spread * 127 / _FULL), -127, 127).astype(np.int8).tobytes()


# ---------------------------------------------------------------------------------------------------------------- pass


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two clips that are alike; the cosine of the part in which they are least so."""

    one: int
    other: int
    likeness: float


def find_duplicates(store: Store) -> dict[str, tuple[str, float]]:
    """Clip -> (the clip of its group that is kept, likeness) in a finished dataset, and the file that says so.

    Of a group the longest clip is kept, of equals the one with the smallest id.
    """
    rows = [row for name in store.names("clips") for row in _rows(store, name)]
    rows.sort(key=lambda row: row[0])
    ids, seconds, prints = [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]
    pairs = list(alike(prints, seconds))
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
    """Id, duration and fingerprint of the clips of a file. ValueError for a dataset made before there were any."""
    with store.open(name) as handle:
        file = pq.ParquetFile(handle)
        if "fingerprint" not in file.schema_arrow.names:
            raise ValueError(f"{store.uri} was made before clips had fingerprints: preprocess its sources again")
        table = file.read(["id", "duration_sec", "fingerprint"], use_threads=False)
    for row in table.to_pylist():
        yield row["id"], row["duration_sec"], row["fingerprint"]


def alike(prints: Sequence[bytes], seconds: Sequence[float]) -> Iterator[Pair]:
    """All pairs that look, move and sound the same and are of about one length, each once."""
    whole = np.frombuffer(b"".join(prints), np.int8).reshape(len(prints), -1)
    ends = np.cumsum([0, *_PARTS.values()])
    parts = {name: _unit(whole[:, a:b]) for name, a, b in zip(_PARTS, ends, ends[1:], strict=False)}
    for one, other in sorted(_candidates(np.concatenate(list(parts.values()), axis=1))):
        if abs(seconds[one] - seconds[other]) > 0.1 * max(seconds[one], seconds[other]):
            continue
        cosines = [_cosine(part[one], part[other], _LEAST[name]) for name, part in parts.items()]
        present = [found for found in cosines if found is not None]
        if present and all(cosine >= least for cosine, least in present):
            yield Pair(one=one, other=other, likeness=min(cosine for cosine, _ in present))


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32], least: float) -> tuple[float, float] | None:
    """Cosine and its threshold; None where both have nothing."""
    if not a.any() and not b.any():
        return None
    return float(a @ b), least


def _unit(values: NDArray[np.int8]) -> NDArray[np.float32]:
    wide = values.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-6)


def _candidates(vectors: NDArray[np.float32]) -> set[tuple[int, int]]:
    """Pairs that agree in all signs of one of the tables."""
    pairs: set[tuple[int, int]] = set()
    for table in range(_TABLES):
        draw = np.random.default_rng([table, 20261120])
        planes = draw.standard_normal((vectors.shape[1], _BITS)).astype(np.float32)
        keys = (vectors @ planes > 0) @ (1 << np.arange(_BITS))
        buckets: dict[int, list[int]] = defaultdict(list)
        for i, key in enumerate(keys.tolist()):
            buckets[key].append(i)
        for members in buckets.values():
            pairs.update((a, b) for n, a in enumerate(members) for b in members[n + 1 :])
    return pairs


def _grouped(ids: Sequence[str], seconds: Sequence[float], pairs: Sequence[Pair]) -> dict[str, tuple[str, float]]:
    """Everything that hangs together is one group; clip -> (kept, likeness) for those that go, sorted by id."""
    above = list(range(len(ids)))

    def top(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]
            i = above[i]
        return i

    likeness: dict[int, float] = {}
    for pair in pairs:
        above[top(pair.one)] = top(pair.other)
        for i in (pair.one, pair.other):
            likeness[i] = max(likeness.get(i, 0.0), pair.likeness)
    groups: Mapping[int, list[int]] = defaultdict(list)
    for i in likeness:
        groups[top(i)].append(i)
    kept = {i: min(group, key=partial(_rank, ids, seconds)) for group in groups.values() for i in group}
    gone = sorted((ids[i], ids[k], round(likeness[i], 4)) for i, k in kept.items() if i != k)
    return {clip: (keeper, how) for clip, keeper, how in gone}


def _rank(ids: Sequence[str], seconds: Sequence[float], i: int) -> tuple[float, str]:
    return -seconds[i], ids[i]
