"""Files of a work unit: rows of clips and rejects, written locally, published with a marker last."""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.schema import REJECTS, RowWriter, to_row
from preprocessing.dataset.units import WorkUnit
from preprocessing.io.errors import translate_storage_errors
from preprocessing.io.hashing import canonical_json, content_hash
from preprocessing.io.lease import upload_fenced, verify_lease, write_fenced
from preprocessing.io.processes import scratch_dir
from preprocessing.io.storage import Store
from preprocessing.pipeline import StepTimer
from preprocessing.records import Clip, Rejected, Source
from preprocessing.sources.discovery import display_name
from preprocessing.steps.encode import Encoders, RunningMoments, latent_times


@dataclass(frozen=True, kw_only=True)
class UnitRow:
    """Row of an accepted clip or of a reject, and its part of the sums of the marker."""

    row: dict[str, Any]
    shape: str = ""  # of the clips of its file, see `shape_bucket`; empty for a reject
    seconds: float = 0.0
    sums: Mapping[str, RunningMoments] = field(default_factory=dict)


def clip_id_of(clip: Clip) -> str:
    """Return the id of a clip, a function of the URI of its source and its span."""
    return content_hash([clip.source.uri, *(f"{second:.6f}" for second in clip.span)])


def shape_bucket(clip: Clip) -> str:
    """Return the shape that the clips of a file share: height x width, or "audio"."""
    return "audio" if clip.frames is None else f"{clip.frames.shape[1]}x{clip.frames.shape[2]}"


def unit_row(source: Source, found: Clip | Rejected, config: PreprocessConfig, encoders: Encoders) -> UnitRow:
    """Return the row of an encoded clip or of a reject."""
    if isinstance(found, Rejected):
        return UnitRow(row=_reject_row(source, found))
    assert found.latents is not None
    row = to_row(
        found,
        id=clip_id_of(found),
        file_name=display_name(found.source.uri),
        fps=float(config.fps),
        sample_rate=config.sample_rate,
        times=latent_times(found.latents, encoders.timeline),
        dtype=config.latent_dtype,
    )
    sums = {m: RunningMoments.zeros(codec.channels) for m, codec in encoders.codecs.items()}
    for modality, latents in found.latents.items():
        sums[modality].add(latents, encoders.timeline.clocks[modality].head)
    return UnitRow(row=row, shape=shape_bucket(found), seconds=found.span[1] - found.span[0], sums=sums)


def _reject_row(source: Source, rejected: Rejected) -> dict[str, Any]:
    start, end = rejected.span or (None, None)
    # ffmpeg prints addresses, which differ between runs; the bytes of a unit must not
    detail = re.sub(r" @ 0x[0-9a-f]+", "", rejected.detail.encode("utf-8", "replace").decode())[:500]
    return {
        "uri": source.uri,
        "span_start_sec": start,
        "span_end_sec": end,
        "step": rejected.step,
        "reason": rejected.reason,
        "detail": detail,
    }


def write_unit(
    unit: WorkUnit,
    rows: Iterable[UnitRow],
    *,
    store: Store,
    token: str,
    config: PreprocessConfig,
    encoders: Encoders,
    timer: StepTimer,
) -> dict[str, Any]:
    """Write the rows of a unit, publish its files and its marker; return the marker.

    Raise LeaseLostError if another driver has the lease, InfrastructureError if storage fails.
    """
    with scratch_dir() as folder:
        with (
            translate_storage_errors(tempfile.gettempdir(), hint=" (or set TMPDIR to another disk)"),
            _UnitFiles(folder, encoders, timer) as files,
        ):
            for row in rows:
                files.add(row)
        verify_lease(store, token)
        published = [
            _publish(store, token, file, kind=kind, name=f"{kind}/{unit.name}{suffix}.parquet")
            for kind, suffix, file in files.written()
        ]
    marker = {
        "unit": unit.name,
        "fingerprint": config.fingerprint,
        "files": [file for file in published if file],
        "sources": len(unit.sources),
        **files.counts(),
    }
    write_fenced(store, token, unit.marker, canonical_json(marker).encode())
    return marker


class _UnitFiles:
    """Local files of a unit: accepted clips by shape, and rejects."""

    def __init__(self, folder: Path, encoders: Encoders, timer: StepTimer) -> None:
        self._folder, self._timer = folder, timer
        self._sums = {m: RunningMoments.zeros(codec.channels) for m, codec in encoders.codecs.items()}
        self._seconds, self._rejected_sources = 0.0, 0
        self._reasons = Counter[str]()
        self._clips: dict[str, RowWriter] = {}
        self._open = ExitStack()

    def __enter__(self) -> "_UnitFiles":
        self._rejects = self._open.enter_context(RowWriter(self._folder / "rejects.parquet", REJECTS))
        return self

    def __exit__(self, *error: Any) -> None:
        with self._timer.measure("write"):
            self._open.__exit__(*error)

    def add(self, item: UnitRow) -> None:
        """Write the row of a clip or reject."""
        with self._timer.measure("write"):
            if not item.shape:
                self._rejects.add(item.row)
                self._reasons[item.row["reason"]] += 1
                self._rejected_sources += item.row["span_start_sec"] is None
                return
            if item.shape not in self._clips:
                self._clips[item.shape] = self._open.enter_context(RowWriter(self._folder / f"{item.shape}.parquet"))
            self._clips[item.shape].add(item.row)
            self._seconds += item.seconds
            for modality, sums in item.sums.items():
                self._sums[modality] += sums

    def written(self) -> list[tuple[str, str, RowWriter]]:
        """Return (kind, suffix of the name, file) of each file."""
        clips = [("clips", f"-{name}", self._clips[name]) for name in sorted(self._clips)]
        return [*clips, ("rejects", "", self._rejects)]

    def counts(self) -> dict[str, Any]:
        """Return the counts and sums of the marker."""
        return {
            "accepted": sum(file.rows for file in self._clips.values()),
            "rejects_by_reason": dict(sorted(self._reasons.items())),
            "rejected_sources": self._rejected_sources,
            "seconds": round(self._seconds, 6),
            "sums": {m: s.to_json() for m, s in self._sums.items()},
        }


def _publish(store: Store, token: str, file: RowWriter, *, kind: str, name: str) -> dict[str, Any] | None:
    """Upload a file and return its entry in the marker; None without rows."""
    if file.rows == 0:
        return None
    data = file.path.read_bytes()
    upload_fenced(store, token, file.path, name)
    sha256 = hashlib.sha256(data).hexdigest()
    return {"kind": kind, "name": name, "rows": file.rows, "bytes": len(data), "sha256": sha256}
