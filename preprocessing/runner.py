"""Process work units into files and markers, through Ray Data or in this process.

A worker processes the sources of a unit, writes the files of the unit and its marker last. Only small summaries pass
through Ray; frames stay in the worker.
"""

import hashlib
import json
import logging
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from math import floor
from pathlib import Path
from typing import Any

import torch

from mfcore.errors import UserInputError
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.repair import try_marker
from preprocessing.dataset.schema import REJECTS, RowWriter, to_row
from preprocessing.dataset.units import WorkUnit
from preprocessing.io.errors import InfrastructureError, translate_storage_errors
from preprocessing.io.hashing import canonical_json, content_hash
from preprocessing.io.lease import upload_fenced, verify_lease, write_fenced
from preprocessing.io.local_ray import start_ray
from preprocessing.io.processes import delete_stale_scratch, scratch_dir
from preprocessing.io.ray_resources import max_resources, report_while_waiting, resources_available
from preprocessing.io.storage import Store
from preprocessing.pipeline import StepTimer, build_encoders, process_sources
from preprocessing.records import Clip, Rejected, Source
from preprocessing.sources.discovery import display_name
from preprocessing.steps.encode import Encoders, RunningMoments, latent_times
from preprocessing.steps.transcribe import load_whisper

_SHOWN = 5  # warnings about sources
OnUnitDone = Callable[[dict[str, Any], Mapping[str, float]], None]
"""Called with the marker of a finished unit and the seconds of each step."""


def clip_id_of(clip: Clip) -> str:
    """Return the id of a clip, a function of the URI of its source and its span."""
    return content_hash([clip.source.uri, *(f"{second:.6f}" for second in clip.span)])


def shape_bucket(clip: Clip) -> str:
    """Return the shape that the clips of a file share: height x width, or "audio"."""
    return "audio" if clip.frames is None else f"{clip.frames.shape[1]}x{clip.frames.shape[2]}"


def process_unit(
    unit: WorkUnit,
    store: Store,
    token: str,
    config: PreprocessConfig,
    *,
    encoders: Encoders,
    timer: StepTimer | None = None,
) -> dict[str, Any]:
    """Process a unit, publish its files and its marker; return the marker.

    Raise LeaseLostError if another driver has the lease, InfrastructureError if storage fails.
    """
    timer = timer or StepTimer()
    with scratch_dir() as folder:
        with (
            translate_storage_errors(tempfile.gettempdir(), hint=" (or set TMPDIR to another disk)"),
            _UnitFiles(folder, config, encoders, timer) as files,
        ):
            for source, clip in process_sources(unit.sources, config, encoders, timer):
                files.add(source, clip)
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
    """Local files of a unit: accepted clips by shape bucket, and rejects."""

    def __init__(self, folder: Path, config: PreprocessConfig, encoders: Encoders, timer: StepTimer) -> None:
        self._folder, self._config = folder, config
        self._encoders, self._timer = encoders, timer
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

    def add(self, source: Source, clip: Clip | Rejected) -> None:
        """Write the row of a clip or reject."""
        with self._timer.measure("write"):
            if isinstance(clip, Rejected):
                self._rejects.add(_reject_row(source, clip))
                self._reasons[clip.reason] += 1
                self._rejected_sources += clip.span is None
                return
            name = shape_bucket(clip)
            if name not in self._clips:
                self._clips[name] = self._open.enter_context(RowWriter(self._folder / f"{name}.parquet"))
            self._clips[name].add(_row(clip, self._config, self._encoders))
            self._seconds += clip.span[1] - clip.span[0]
            for modality, latents in (clip.latents or {}).items():
                self._sums[modality].add(latents, self._encoders.timeline.clocks[modality].head)

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


def _row(clip: Clip, config: PreprocessConfig, encoders: Encoders) -> dict[str, Any]:
    assert clip.latents is not None
    return to_row(
        clip,
        id=clip_id_of(clip),
        file_name=display_name(clip.source.uri),
        fps=float(config.fps),
        sample_rate=config.sample_rate,
        times=latent_times(clip.latents, encoders.timeline),
        dtype=config.latent_dtype,
    )


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


def _publish(store: Store, token: str, file: RowWriter, *, kind: str, name: str) -> dict[str, Any] | None:
    """Upload a file and return its entry in the marker; None without rows."""
    if file.rows == 0:
        return None
    data = file.path.read_bytes()
    upload_fenced(store, token, file.path, name)
    sha256 = hashlib.sha256(data).hexdigest()
    return {"kind": kind, "name": name, "rows": file.rows, "bytes": len(data), "sha256": sha256}


# ----------------------------------------------------------------------------------------------------------- all units


class _Worker:
    """Worker that maps a unit to its marker or error. A Ray actor keeps its codecs loaded."""

    def __init__(self, store_uri: str, token: str, config: PreprocessConfig) -> None:
        torch.set_num_threads(1)  # one worker per CPU
        delete_stale_scratch()
        self._store, self._token, self._config = Store(store_uri), token, config
        self._encoders = _cached_encoders(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = WorkUnit.from_json(row["unit"])
        timer = StepTimer()
        try:
            # a block of several units is repeated if its worker dies: finished ones have a marker
            marker = try_marker(self._store, unit.marker) or process_unit(
                unit, self._store, self._token, self._config, encoders=self._encoders, timer=timer
            )
        except (InfrastructureError, OSError) as error:  # a message: Ray would add long tracebacks
            return {"marker": "null", "spent": "{}", "warnings": "[]", "outage": str(error) or repr(error)}
        return {
            "marker": canonical_json(marker),
            "spent": canonical_json(timer.seconds),
            "warnings": canonical_json(list(timer.warnings)),
            "outage": "",
        }


@lru_cache(maxsize=1)
def _cached_encoders(config: PreprocessConfig) -> Encoders:
    """Load the codecs once per process."""
    encoders = build_encoders(config)
    encoders.load()
    if config.whisper:
        load_whisper(config.whisper, config.device)
    return encoders


@lru_cache(maxsize=1)
def _cached_worker(store_uri: str, token: str, config: PreprocessConfig) -> _Worker:
    return _Worker(store_uri, token, config)


def _run_task(row: dict[str, Any], store_uri: str, token: str, config: PreprocessConfig) -> dict[str, Any]:
    """Process a unit as a Ray task, for codecs without weights."""
    return _cached_worker(store_uri, token, config)(row)


def process_units(
    units: Sequence[WorkUnit], store: Store, token: str, config: PreprocessConfig, *, on_done: OnUnitDone
) -> None:
    """Process all units through Ray Data, or in this process for ``workers=0``.

    Raise the errors of `process_unit`.
    """
    delete_stale_scratch()
    warnings = _SourceWarnings()
    if config.workers == 0:
        encoders = _cached_encoders(config)
        for unit in units:
            timer = StepTimer()
            marker = process_unit(unit, store, token, config, encoders=encoders, timer=timer)
            warnings.add(list(timer.warnings))
            on_done(marker, timer.seconds)
    elif units:
        for marker, spent, texts in _run_on_ray(units, store, token, config):
            warnings.add(texts)
            on_done(marker, spent)
        delete_stale_scratch()  # left by workers that were killed
        store.delete_temporary()
    warnings.report_rest()


class _SourceWarnings:
    """Prints the first warnings about sources and counts the others."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, messages: Sequence[str]) -> None:
        """Print the messages unless there were many."""
        for message in messages:
            self._count += 1
            if self._count <= _SHOWN:
                print(f"warning: {message}", file=sys.stderr, flush=True)

    def report_rest(self) -> None:
        """Print the number of the messages that were not printed."""
        if self._count > _SHOWN:
            print(f"warning: {self._count - _SHOWN} more files next to sources likewise", file=sys.stderr, flush=True)


def _run_on_ray(
    units: Sequence[WorkUnit], store: Store, token: str, config: PreprocessConfig
) -> Iterator[tuple[dict[str, Any], dict[str, float], list[str]]]:
    """Yield the marker, the seconds of each step and the warnings of each finished unit."""
    start_ray()
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is reported by on_done
    workers = worker_count(len(units), config, max_resources(ray.cluster_resources()))
    # One block per unit, up to a limit of Ray: a block is the unit of scheduling and retries.
    data = ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=min(len(units), 4096))
    arguments = (store.uri, token, config)
    # memory 0: Ray Data would otherwise request the size of a task's result. An autoscaler that lacks the memory of its
    # machine types, as on Google Cloud, never starts a machine for such a task.
    wanted = config.worker_resources
    options: dict[str, Any] = {"num_cpus": wanted["CPU"], "num_gpus": wanted.get("GPU"), "memory": 0}
    options["concurrency"] = workers
    actor: Any = _Worker  # one instance per worker
    if config.weight_folders or config.whisper:
        results = data.map(actor, fn_constructor_args=arguments, **options)
    else:
        task: Any = _run_task  # fn_args follow the row
        results = data.map(task, fn_args=arguments, **options)
    available = ray.cluster_resources
    seen = resources_available(wanted, available)
    with report_while_waiting(f"machines for {workers} workers", available, seen=seen):
        for row in results.iter_rows():
            if row["outage"]:
                raise InfrastructureError(row["outage"])
            yield json.loads(row["marker"]), json.loads(row["spent"]), json.loads(row["warnings"])


def worker_count(units: int, config: PreprocessConfig, limits: Mapping[str, float]) -> int:
    """Return the number of workers within the resource `limits` of the cluster.

    Raise ValueError if they do not fit a single worker.
    """
    cpus, gpus = limits.get("CPU", 0.0), config.encoder.gpus
    fit = units
    if gpus and (cpus or limits.get("GPU")):  # a head node without CPUs does not report limits
        fit = floor(min(float(units), limits.get("GPU", 0.0) / gpus + 1e-9))
    if not fit:
        raise UserInputError(f"encoder.gpus={gpus}: Ray sees no such share of a GPU. Set encoder.gpus=0 to use the CPU")
    if config.workers is None and cpus < 1:
        raise UserInputError("this cluster has no CPU yet, and its limit is unknown: set workers=N")
    return int(min(units, fit, config.workers or cpus))
