"""A finished dataset as tensors, without Ray: ``open_dataset(uri)`` gives clips in a fixed order."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mfcore.codecs.base import Codec
from mfcore.codecs.factory import codec_from_id
from mfcore.codecs.stats import LatentStats
from mfcore.timeline import LatentClock, Timeline
from mfcore.types import VIDEO
from preprocessing.dataset.schema import SCHEMA_VERSION, ClipTensors, columns_for, from_row, latent_counts
from preprocessing.io.storage import Store

CACHE_BYTES = 256 << 20  # of row groups kept in memory
PARALLEL_OPENS = 16  # files whose index is read side by side: each costs a few round trips to object storage


@dataclass(frozen=True, kw_only=True)
class DatasetMetadata:
    """What ``_dataset.json`` says."""

    config: Mapping[str, Any]  # resolved preprocessing configuration
    fingerprint: str  # of that configuration
    codecs: Mapping[str, str]  # modality -> codec id
    text_codec: str  # id of the encoder of captions and transcripts
    clocks: Mapping[str, LatentClock]
    stats: Mapping[str, LatentStats]
    chunk_seconds: Fraction
    counts: Mapping[str, Any]
    folders: Mapping[str, str] = field(default_factory=dict)  # modality or "text" -> where pretrained weights were

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.clocks)

    def codec(self, modality: str) -> Codec:
        """The codec that made the latents of a modality."""
        return codec_from_id(self.codecs[modality], self.clocks[modality], self.folders.get(modality, ""))

    def timeline(self, modalities: Sequence[str] | None = None) -> Timeline:
        """The clocks of these modalities (default: all), cut into the chunks the clips were cut for."""
        names = self.modalities if modalities is None else modalities
        return Timeline(clocks={m: self.clocks[m] for m in names}, chunk_seconds=self.chunk_seconds)


def parse_metadata(facts: Mapping[str, Any]) -> DatasetMetadata:
    """DatasetMeta from the JSON of ``_dataset.json``."""
    return DatasetMetadata(
        config=facts["config"],
        fingerprint=facts["fingerprint"],
        codecs=facts["codecs"],
        text_codec=facts["text_codec"],
        clocks={
            m: LatentClock(rate=Fraction(c["rate"]), offset=Fraction(c["offset"]), head=c["head"])
            for m, c in facts["clocks"].items()
        },
        stats={m: LatentStats(**{k: tuple(v) for k, v in s.items()}) for m, s in facts.get("stats", {}).items()},
        chunk_seconds=Fraction(facts["chunk_seconds"]),
        counts=facts.get("counts", {}),
        folders=facts.get("codec_folders", {}),
    )


def read_metadata_json(store: Store) -> dict[str, Any]:
    """The JSON of ``_dataset.json``; ValueError when the place is no dataset or of another schema version."""
    try:
        facts: dict[str, Any] = json.loads(store.read("_dataset.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{store.uri} is no dataset: `mfctl preprocess MEDIA DATASET` makes one") from None
    if facts["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{store.uri} has schema version {facts['schema_version']}, this mfctl reads {SCHEMA_VERSION}: "
            "preprocess the sources again"
        )
    return facts


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a clip lies, and what is known of it without reading it."""

    id: str
    source_uri: str
    content: str  # hash of the content of the source; decides the split
    file: str
    group: int  # row group of the file
    row: int  # within the row group
    chunks: int
    shape: tuple[int, ...]  # latent height and width; () without a picture


class ClipDataset:
    """Clips sorted by id; reading one touches the columns of the chosen modalities only.

    ``clip`` keeps row groups in a small cache, so walking in order reads each once; ``load`` keeps nothing. Views
    (``held_out``) share the cache.
    """

    def __init__(
        self, store: Store, meta: DatasetMetadata, places: Sequence[_Place], modalities: tuple[str, ...]
    ) -> None:
        self.meta, self.modalities = meta, modalities
        self._store, self._places = store, list(places)
        self._cache: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[ClipTensors]:
        return (self.clip(i) for i in range(len(self)))

    @property
    def ids(self) -> list[str]:
        return [place.id for place in self._places]

    @property
    def sources(self) -> set[str]:
        """URIs of the sources that the clips were cut from."""
        return {place.source_uri for place in self._places}

    @property
    def lengths(self) -> list[int]:
        """Whole chunks of every clip, known without reading it."""
        return [place.chunks for place in self._places]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Latent height and width of every clip; () without a picture."""
        return [place.shape for place in self._places]

    @property
    def groups(self) -> list[int]:
        """A number for the row group of every clip: 0, 1 ... in the order of files."""
        number = {key: i for i, key in enumerate(sorted({(p.file, p.group) for p in self._places}))}
        return [number[p.file, p.group] for p in self._places]

    def index(self, clip_id: str) -> int:
        """Position of a clip; ValueError names some that exist."""
        if clip_id not in (ids := self.ids):
            raise ValueError(f"no clip {clip_id!r} in {self._store.uri}: it has for example {', '.join(ids[:3])}")
        return ids.index(clip_id)

    def clip(self, i: int) -> ClipTensors:
        """Clip i, its latents raw (float32, time first)."""
        return from_row(self.row(i), self._places[i].chunks)

    def row(self, i: int) -> dict[str, Any]:
        """The Parquet row of clip i, the columns of the chosen modalities."""
        place = self._places[i]
        return self._cached(place.file, place.group).slice(place.row, 1).to_pylist()[0]

    def load_clips(self, numbers: Sequence[int]) -> list[Callable[[], ClipTensors]]:
        """Clips for training, which never looks at the picture of the first frame: that one is left out.

        Each row group among them is read once, on the calling thread. What comes back for a clip holds its row as
        stored, and decodes it when called.
        """
        made: dict[int, Callable[[], ClipTensors]] = {}
        where = [(self._places[i].file, self._places[i].group, i) for i in numbers]
        for (file, group), same in groupby(sorted(where), key=lambda w: w[:2]):
            clips = [i for _, _, i in same]
            table = self._read_group(file, group, without=("first_frame_png",))
            rows = table.take([self._places[i].row for i in clips]).to_pylist()
            for i, row in zip(clips, rows, strict=True):
                made[i] = partial(from_row, row, self._places[i].chunks)
        return [made[i] for i in numbers]

    def _cached(self, file: str, group: int) -> pa.Table:
        key = (file, group)
        if key not in self._cache:
            self._cache[key] = self._read_group(file, group)
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _read_group(self, file: str, group: int, without: Sequence[str] = ()) -> pa.Table:
        names = [name for name in columns_for(self.modalities) if name not in without]
        with self._store.open(file) as handle:  # a large dataset has more files than a process may hold open
            return pq.ParquetFile(handle).read_row_group(group, columns=names, use_threads=False)

    def split(self, fraction: float) -> tuple["ClipDataset", "ClipDataset"]:
        """(training clips, held-out clips), split by a hash of the source's content.

        Clips of one source stay together, wherever the source lies, and growth of the dataset moves none across. (In a
        set so small that one side would be empty, the source with the smallest or the largest hash goes there.)
        """
        order = sorted({place.content for place in self._places}, key=_share)
        if not 0 < fraction < 1 or len(order) < 2:
            raise ValueError(
                f"cannot hold out {fraction} of {len(order)} sources: need a share in (0, 1) and two sources"
            )
        held = {content for content in order[:-1] if _share(content) < fraction} or {order[0]}
        return self._view(lambda p: p.content not in held), self._view(lambda p: p.content in held)

    def _view(self, keep: Any) -> "ClipDataset":
        view = ClipDataset(self._store, self.meta, [p for p in self._places if keep(p)], self.modalities)
        view._cache = self._cache
        return view


def _share(content: str) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64


def open_dataset(uri: str, modalities: Sequence[str] | None = None) -> ClipDataset:
    """The clips of a dataset. ``modalities``: which latents to read, by default all it has.

    ValueError when it is no dataset, unfinished, or lacks a modality.
    """
    store = Store(uri)
    facts = read_metadata_json(store)
    meta = parse_metadata(facts)
    wanted = meta.modalities if modalities is None else tuple(modalities)
    if missing := [m for m in wanted if m not in meta.clocks]:
        raise ValueError(f"{uri} has no {missing[0]}: it was made with --modality {facts['config']['modality']}")
    if not facts["complete"]:
        raise ValueError(f"{uri} is unfinished: run the same `mfctl preprocess` command again")
    dropped = excluded_ids(store)
    with ThreadPoolExecutor(PARALLEL_OPENS) as pool:
        files = list(pool.map(partial(_places, store, timeline=meta.timeline(wanted)), _clip_files(store)))
    places = [place for file in files for place in file if place.id not in dropped]
    return ClipDataset(store, meta, sorted(places, key=lambda p: p.id), wanted)


def _clip_files(store: Store) -> list[str]:
    markers = (json.loads(store.read(name)) for name in store.list_files("_done"))
    return [file["name"] for marker in markers for file in marker["files"] if file["kind"] == "clips"]


def _places(store: Store, name: str, timeline: Timeline) -> list[_Place]:
    """The clips of one file; latents are not read."""
    with store.open(name) as handle:
        file = pq.ParquetFile(handle)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        names = ["id", "source_uri", "source_content", "vae_latent_shape", "audio_latent_shape"]
        table = file.read(names, use_threads=False)
    where = ((group, row) for group, size in enumerate(sizes) for row in range(size))
    return [
        _Place(
            id=row["id"],
            source_uri=row["source_uri"],
            content=row["source_content"],
            file=name,
            group=group,
            row=number,
            chunks=timeline.whole_chunks(
                {m: latent_counts(row)[m] - clock.head for m, clock in timeline.clocks.items()}
            ),
            shape=tuple(row["vae_latent_shape"][2:]) if VIDEO in timeline.clocks else (),
        )
        for (group, number), row in zip(where, table.to_pylist(), strict=True)
    ]


def excluded_ids(store: Store) -> set[str]:
    """Ids that a duplicate pass marked for removal."""
    if not store.exists("_duplicates.parquet"):
        return set()
    with store.open("_duplicates.parquet") as file:
        return set(_table(file, ["id"])["id"].to_pylist())


def _table(file: Any, names: list[str]) -> pa.Table:
    """Some columns of a Parquet file, read on this thread: a thread of Arrow may let go of the Python file object while
    the interpreter is shutting down, which aborts the process after a short command."""
    return pq.read_table(file, columns=names, use_threads=False, pre_buffer=False)
