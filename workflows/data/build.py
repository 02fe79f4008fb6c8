"""Build, resume or extend a dataset (``mfctl preprocess``)."""

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from mfcore.errors import UserInputError
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import read_metadata_json
from preprocessing.dataset.repair import (
    check_markers,
    discard_units,
    file_sizes,
    read_known_units,
    scan_units,
    total_size,
    try_marker,
)
from preprocessing.dataset.schema import SCHEMA_VERSION
from preprocessing.dataset.units import (
    DATASET_FILE,
    DatasetCounts,
    WorkUnit,
    plan_units,
    planned_names,
    write_units,
)
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.lease import LOCK, Lease, LeaseLostError, write_fenced
from preprocessing.io.storage import TEMPORARY, Store, is_remote, local_path
from preprocessing.media.probe import MediaError, probe
from preprocessing.pipeline import build_encoders
from preprocessing.runner import process_units
from preprocessing.sources.discovery import MANIFESTS, find_sources
from preprocessing.steps.encode import RunningMoments, merge_sums
from workflows.config.serialization import diff

ProgressCallback = Callable[[int, int, dict[str, Any]], None]
"""Called as ``progress(finished units, total units, counts so far)``."""


def build_dataset(
    sources: Sequence[str],
    out: str,
    config: PreprocessConfig,
    *,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
    spent: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Build, resume or extend the dataset ``out``; return its counts and fingerprint.

    ``spent`` receives the seconds of each step, summed over all workers. Raises ValueError before anything is written
    if an argument is not readable media, if ``out`` is not a dataset or has another configuration, or if another
    driver holds its lease.
    """
    found = list(find_sources(sources))
    _check_named_files(sources)
    store = Store(out)
    metadata = _read_existing_metadata(store, config)
    plan = partial(
        plan_units,
        sources=found,
        per_unit=config.sources_per_unit,
        fingerprint=config.fingerprint,
        keep_duplicates=config.keep_duplicates,
    )
    if dry_run:
        units = plan(read_known_units(store, set(), found)[0])
        return {
            "sources": len(found),
            "units": len(units),
            "config": config.resolved(),
            "fingerprint": config.fingerprint,
        }
    with Lease(store) as lease:
        store.delete_temporary()
        # read again: another driver may have finished units before this one got the lease
        metadata = _read_existing_metadata(store, config)
        scan = scan_units(store, metadata.get("files", {}) if metadata.get("complete") else None)
        known, lost = read_known_units(store, scan.whole, found)
        _report_missing_sources([*known, *lost])
        units = plan(known)
        if {unit.name for unit in lost} - {unit.name for unit in units}:
            units = plan([*known, *lost])
        missing = [unit for unit in units if unit.name not in scan.whole]
        stale = scan.present - {unit.name for unit in units if unit.name in scan.whole}
        if missing or stale or len(units) > len(known) or not metadata.get("complete"):
            _write_metadata(store, config, {"complete": False, "lease": lease.token}, token=lease.token)
            discard_units(store, lease.token, stale)
            if len(units) > len(known):
                write_units(store, units, lease.token)
            process = partial(_process, units=units, store=store, config=config, token=lease.token)
            process(missing, progress=progress, spent={} if spent is None else spent)
    return dataset_counts(read_metadata_json(store))


def _process(
    missing: Sequence[WorkUnit],
    *,
    units: Sequence[WorkUnit],
    store: Store,
    config: PreprocessConfig,
    token: str,
    progress: ProgressCallback | None,
    spent: dict[str, float],
) -> None:
    """Process the missing units, and those with damaged files; then write the counts."""
    for _ in range(2):
        _run(missing, units, store, token=token, config=config, progress=progress, spent=spent)
        damaged = _finish(store, config, units, token=token)
        if not damaged:
            return
        discard_units(store, token, damaged)
        missing = [unit for unit in units if unit.name in damaged]
    raise InfrastructureError(
        f"{store.uri} loses files that were written. Repair the storage, then run the same command again"
    )


def _report_missing_sources(known: Sequence[WorkUnit]) -> None:
    """Print a note if sources were deleted: their clips stay in the dataset."""
    uris = [source.uri.split("#", 1)[0] for unit in known for source in unit.sources]
    missing = [uri for uri in uris if not is_remote(uri) and not os.path.exists(local_path(uri))]
    if missing:
        print(
            f"note: {len(missing)} sources of this dataset no longer exist ({missing[0]} ...); their clips stay in it. "
            "To remove them, preprocess the other sources into a new dataset",
            file=sys.stderr,
            flush=True,
        )


def _check_named_files(arguments: Sequence[str]) -> None:
    """Raise ValueError if a file named by the user, not found in a folder, is not media."""
    for argument in arguments:
        if os.path.isfile(argument) and os.path.splitext(argument)[1].lower() not in MANIFESTS:
            try:
                probe(argument)
            except MediaError as error:
                raise UserInputError(
                    f"{argument} is not readable media ({error.detail}): name a video or audio file"
                ) from error


def _read_existing_metadata(store: Store, config: PreprocessConfig) -> dict[str, Any]:
    """Return the metadata of an existing dataset, {} for a new one.

    Raises ValueError if ``config`` cannot continue it.
    """
    if not store.exists(DATASET_FILE):
        others = [name for name in store.list_entries() if not name.startswith((LOCK, TEMPORARY))]
        if others:
            raise UserInputError(
                f"{store.uri} is not empty and no dataset (it holds {others[0]}): choose another --out"
            )
        return {}
    try:
        metadata = read_metadata_json(store)
    except UserInputError as error:
        if "is damaged" not in str(error):
            raise
        print(f"warning: {error}", file=sys.stderr, flush=True)
        _check_markers(store, config)
        return {}
    if metadata["fingerprint"] != config.fingerprint:
        changes = "\n  ".join(diff(metadata["config"], config.resolved()))
        raise UserInputError(
            f"{store.uri} was made with another configuration:\n  {changes}\n"
            "choose another --out, or use the configuration it was made with"
        )
    return metadata


def _check_markers(store: Store, config: PreprocessConfig) -> None:
    """Raise UserInputError if the first whole marker is of another configuration."""
    for name in store.list_files("_done"):
        if marker := try_marker(store, name):
            if marker["fingerprint"] != config.fingerprint:
                raise UserInputError(
                    f"{store.uri} was made with another configuration, of fingerprint {marker['fingerprint']} instead "
                    f"of {config.fingerprint}: choose another --out, or use the configuration it was made with"
                )
            return


def _write_metadata(store: Store, config: PreprocessConfig, more: dict[str, Any], *, token: str) -> None:
    encoders = build_encoders(config)
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": config.fingerprint,
        "config": config.resolved(),
        "codecs": {m: codec.id for m, codec in encoders.codecs.items()},
        "text_codec": encoders.words.id,
        "codec_folders": config.weight_folders,
        "clocks": {
            m: {"rate": str(c.rate), "offset": str(c.offset), "head": c.head}
            for m, c in encoders.timeline.clocks.items()
        },
        "chunk_seconds": str(config.chunk_seconds),
        **more,
    }
    write_fenced(store, token, DATASET_FILE, json.dumps(metadata, indent=1, sort_keys=True).encode())


def _run(
    missing: Sequence[WorkUnit],
    units: Sequence[WorkUnit],
    store: Store,
    *,
    token: str,
    config: PreprocessConfig,
    progress: ProgressCallback | None,
    spent: dict[str, float],
) -> None:
    done, totals = len(units) - len(missing), DatasetCounts()
    with _progress_callback(progress) as show:

        def on_done(marker: dict[str, Any], seconds: Mapping[str, float]) -> None:
            nonlocal done
            done += 1
            for name, value in seconds.items():
                spent[name] = spent.get(name, 0.0) + value
            totals.add(marker)
            show(done, len(units), totals.counts())

        process_units(missing, store, token, config, on_done=on_done)


def _finish(store: Store, config: PreprocessConfig, units: Sequence[WorkUnit], *, token: str) -> set[str]:
    """Write statistics and counts from the markers of all units, in order: a function of the units alone.

    Returns the names of units with missing or damaged files; nothing is written if there are any.
    """
    if planned_names(store) != [unit.name for unit in units]:
        raise LeaseLostError(f"{store.uri} was extended by another driver. Run the same command again")
    totals, sums, damaged = DatasetCounts(), dict[str, RunningMoments](), set[str]()
    sizes = file_sizes(store)
    for unit, marker in check_markers(store, [unit.name for unit in units], sizes):
        if marker is None:
            damaged.add(unit)
            continue
        totals.add(marker)
        merge_sums(sums, marker["sums"])
    if damaged:
        return damaged
    stats = {m: s.stats() for m, s in sums.items()}
    published = {m: codec.published_stats for m, codec in build_encoders(config).codecs.items()}
    stats |= {m: s for m, s in published.items() if s is not None}
    summary = {
        "complete": True,
        "counts": totals.counts(),
        "files": total_size(sizes),
        "stats": {m: vars(s) for m, s in stats.items() if s is not None},
    }
    _write_metadata(store, config, summary, token=token)
    return damaged


def dataset_counts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts of a finished dataset and its fingerprint."""
    return {**metadata["counts"], "fingerprint": metadata["fingerprint"]}


@contextmanager
def _progress_callback(progress: ProgressCallback | None) -> Generator[ProgressCallback]:
    """Yield ``progress``, or a callback that draws a bar on a terminal and prints a line every 5 s elsewhere."""
    if progress is not None:
        yield progress
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("preprocess", total=None)
            yield lambda done, total, counts: bar.update(
                task,
                completed=done,
                total=total,
                description=f"{counts['accepted']} clips, {counts['rejected']} rejected",
            )
    else:
        yield _plain_lines()


def _plain_lines(every: float = 5.0) -> ProgressCallback:
    last = 0.0

    def show(done: int, total: int, counts: dict[str, Any]) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= every:
            last = time.monotonic()
            line = f"preprocess: unit {done} of {total}, {counts['accepted']} clips, {counts['rejected']} rejected"
            print(line, file=sys.stderr, flush=True)

    return show
