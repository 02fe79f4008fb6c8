"""Read a finished dataset as tensors, without Ray, in a fixed order of clips."""

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
from mfcore.errors import UserInputError
from mfcore.timeline import LatentClock, Timeline
from mfcore.types import VIDEO
from preprocessing.dataset.schema import SCHEMA_VERSION, ClipTensors, columns_for, from_row, latent_counts
from preprocessing.io.parquet import read_table
from preprocessing.io.storage import Store

CACHE_BYTES = 256 << 20  # of cached row groups
PARALLEL_OPENS = 16  # files with footers is read concurrently


@dataclass(frozen=True, kw_only=True)
class DatasetMetadata:
    """Content of ``_dataset.json``."""

    config: Mapping[str, Any]  # resolved preprocessing configuration
    fingerprint: str  # of that configuration
    codecs: Mapping[str, str]  # modality -> codec id
    text_codec: str  # id of the encoder of captions and transcripts
    clocks: Mapping[str, LatentClock]
    stats: Mapping[str, LatentStats]
    chunk_seconds: Fraction
    counts: Mapping[str, Any]
    folders: Mapping[str, str] = field(default_factory=dict)  # modality or "text" -> folder of pretrained weights

    @property
    def modalities(self) -> tuple[str, ...]:
        """Return the modalities of the dataset."""
        return tuple(self.clocks)

    def codec(self, modality: str) -> Codec:
        """Return the codec of the latents of a modality."""
        return codec_from_id(self.codecs[modality], self.clocks[modality], self.folders.get(modality, ""))

    def timeline(self, modalities: Sequence[str] | None = None) -> Timeline:
        """Return the timeline of these modalities (default: all) with the chunks of the dataset."""
        names = self.modalities if modalities is None else modalities
        return Timeline(clocks={m: self.clocks[m] for m in names}, chunk_seconds=self.chunk_seconds)


def parse_metadata(facts: Mapping[str, Any]) -> DatasetMetadata:
    """Parse the JSON of ``_dataset.json``."""
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
    """Return the JSON of ``_dataset.json``. Raise ValueError for another schema or no dataset."""
    facts: dict[str, Any]
    try:
        facts = json.loads(store.read("_dataset.json"))
    except ValueError:
        raise UserInputError(
            f"{store.uri}/_dataset.json is damaged. Run the same `mfctl preprocess` command again to repair it"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserInputError(f"{store.uri} is not a dataset. Build one with `mfctl preprocess MEDIA DATASET`") from None
    if facts["schema_version"] != SCHEMA_VERSION:
        raise UserInputError(
            f"{store.uri} has schema version {facts['schema_version']}, this mfctl reads {SCHEMA_VERSION}. "
            "Preprocess the sources again"
        )
    return facts


@dataclass(frozen=True, slots=True)
class _ClipEntry:
    """Index entry of a clip: its location and properties that need no latents."""

    id: str
    source_uri: str
    content: str  # hash of the content of the source; decides the split
    file: str
    group: int  # row group of the file
    row: int  # within the row group
    chunks: int
    shape: tuple[int, ...]  # latent height and width; () without video


class ClipDataset:
    """Clips sorted by id; only the columns of the chosen modalities are read.

    `clip` caches row groups, so sequential access reads each once. `load_clips` caches nothing. Views of `split` share
    the cache.
    """

    def __init__(
        self, store: Store, meta: DatasetMetadata, entries: Sequence[_ClipEntry], modalities: tuple[str, ...]
    ) -> None:
        self.meta, self.modalities = meta, modalities
        self._store, self._entries = store, list(entries)
        self._cache: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[ClipTensors]:
        return (self.clip(i) for i in range(len(self)))

    @property
    def ids(self) -> list[str]:
        """Return the ids of the clips in order."""
        return [entry.id for entry in self._entries]

    @property
    def digest(self) -> str:
        """Return 16 hexadecimal digits of the ids and source contents of the clips.

        Equal for equal clips in any files, row groups and order of units. Known without reading latents.
        """
        lines = sorted(f"{entry.id} {entry.content}\n" for entry in self._entries)
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]

    @property
    def sources(self) -> set[str]:
        """Return the URIs of the sources of the clips."""
        return {entry.source_uri for entry in self._entries}

    @property
    def lengths(self) -> list[int]:
        """Return the whole chunks of every clip."""
        return [entry.chunks for entry in self._entries]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Return the latent height and width of every clip; () without video."""
        return [entry.shape for entry in self._entries]

    @property
    def groups(self) -> list[int]:
        """Return the number of the row group of every clip, from 0 in the order of files."""
        keys = sorted({(p.file, p.group) for p in self._entries})
        number = {key: i for i, key in enumerate(keys)}
        return [number[p.file, p.group] for p in self._entries]

    def index(self, clip_id: str) -> int:
        """Return the position of a clip. Raise ValueError if it does not exist."""
        ids = self.ids
        if clip_id not in ids:
            raise UserInputError(f"no clip {clip_id!r} in {self._store.uri}. Existing ids: {', '.join(ids[:3])}, ...")
        return ids.index(clip_id)

    def clip(self, i: int) -> ClipTensors:
        """Read clip i with raw latents (float32, time first)."""
        return from_row(self.row(i), self._entries[i].chunks)

    def row(self, i: int) -> dict[str, Any]:
        """Read the Parquet row of clip i with the columns of the chosen modalities."""
        entry = self._entries[i]
        return self._cached_group(entry.file, entry.group).slice(entry.row, 1).to_pylist()[0]

    def load_clips(self, numbers: Sequence[int]) -> list[Callable[[], ClipTensors]]:
        """Read clips without the first-frame image, each row group once.

        Reading happens on the calling thread. The returned functions hold the stored rows and decode them.
        """
        loaders: dict[int, Callable[[], ClipTensors]] = {}
        where = [(self._entries[i].file, self._entries[i].group, i) for i in numbers]
        for (file, group), members in groupby(sorted(where), key=lambda w: w[:2]):
            clips = [i for _, _, i in members]
            table = self._read_group(file, group, without=("first_frame_png",))
            rows = table.take([self._entries[i].row for i in clips]).to_pylist()
            for i, row in zip(clips, rows, strict=True):
                loaders[i] = partial(from_row, row, self._entries[i].chunks)
        return [loaders[i] for i in numbers]

    def _cached_group(self, file: str, group: int) -> pa.Table:
        key = (file, group)
        if key not in self._cache:
            self._cache[key] = self._read_group(file, group)
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _read_group(self, file: str, group: int, without: Sequence[str] = ()) -> pa.Table:
        names = [name for name in columns_for(self.modalities) if name not in without]
        with self._store.open(file) as handle:  # not kept open: a dataset may have more files than the process limit
            return pq.ParquetFile(handle).read_row_group(group, columns=names, use_threads=False)

    def split(self, fraction: float) -> tuple["ClipDataset", "ClipDataset"]:
        """Return (training clips, held-out clips), split by a hash of the content of the source.

        Clips of one source stay together and growth of the dataset moves none. If one side would be empty, the source
        with the smallest or largest hash is assigned to it.
        """
        order = sorted({entry.content for entry in self._entries}, key=_share)
        if not 0 < fraction < 1 or len(order) < 2:
            raise UserInputError(
                f"cannot hold out {fraction} of {len(order)} sources: use a share in (0, 1) and at least two"
            )
        held_out = {content for content in order[:-1] if _share(content) < fraction} or {order[0]}
        return self._view(lambda p: p.content not in held_out), self._view(lambda p: p.content in held_out)

    def _view(self, keep: Any) -> "ClipDataset":
        view = ClipDataset(self._store, self.meta, [p for p in self._entries if keep(p)], self.modalities)
        view._cache = self._cache
        return view


def _share(content: str) -> float:
    """Return a number in [0, 1) that depends on the content only."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64


def open_dataset(uri: str, modalities: Sequence[str] | None = None) -> ClipDataset:
    """Open a dataset. `modalities`: latents to read (default: all).

    Raise ValueError if it is unfinished, lacks a modality or is not a dataset.
    """
    store = Store(uri)
    facts = read_metadata_json(store)
    meta = parse_metadata(facts)
    wanted = meta.modalities if modalities is None else tuple(modalities)
    if missing := [m for m in wanted if m not in meta.clocks]:
        raise UserInputError(f"{uri} has no {missing[0]}: it was built with --modality {facts['config']['modality']}")
    if not facts["complete"]:
        raise UserInputError(f"{uri} is unfinished. Run the same `mfctl preprocess` command again")
    dropped = excluded_ids(store)
    with ThreadPoolExecutor(PARALLEL_OPENS) as pool:
        markers = pool.map(partial(read_marker, store), store.list_files("_done"))
        names = [file["name"] for marker in markers for file in marker["files"] if file["kind"] == "clips"]
        files = list(pool.map(partial(_read_entries, store, timeline=meta.timeline(wanted)), names))
    entries = [entry for file in files for entry in file if entry.id not in dropped]
    return ClipDataset(store, meta, sorted(entries, key=lambda p: p.id), wanted)


def read_marker(store: Store, name: str) -> dict[str, Any]:
    """Return the marker in a file. Raise UserInputError if it is damaged."""
    try:
        return json.loads(store.read(name))
    except ValueError:
        raise damaged_file_error(store, name) from None


def damaged_file_error(store: Store, name: str) -> UserInputError:
    """Return the error for a file of a dataset that cannot be read."""
    return UserInputError(
        f"{store.uri}/{name} is damaged. Run the same `mfctl preprocess` command again to make it again"
    )


def _read_entries(store: Store, name: str, timeline: Timeline) -> list[_ClipEntry]:
    """Return the index entries of one file without reading latents. Raise UserInputError if it is damaged."""
    try:
        with store.open(name) as handle:
            file = pq.ParquetFile(handle)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            names = ["id", "source_uri", "source_content", "vae_latent_shape", "audio_latent_shape"]
            table = file.read(names, use_threads=False)
    except (pa.ArrowInvalid, FileNotFoundError):
        raise damaged_file_error(store, name) from None
    where = ((group, row) for group, size in enumerate(sizes) for row in range(size))
    return [
        _ClipEntry(
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
    """Return the ids of clips that the duplicate pass excluded."""
    if not store.exists("_duplicates.parquet"):
        return set()
    with store.open("_duplicates.parquet") as file:
        return set(read_table(file, ["id"])["id"].to_pylist())
