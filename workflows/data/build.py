"""Make a dataset (``preprocess``), play one of its clips (``reconstruct``). To look at all of it: ``inspection.py``."""

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import read_metadata_json
from preprocessing.dataset.schema import SCHEMA_VERSION
from preprocessing.dataset.units import (
    DATASET_FILE,
    DatasetCounts,
    WorkUnit,
    finished_units,
    plan_units,
    read_markers,
    read_units,
    write_units,
)
from preprocessing.io.lease import LOCK, Lease
from preprocessing.io.storage import TEMPORARY, Store, is_remote, local_path
from preprocessing.media.probe import MediaError, probe
from preprocessing.pipeline import build_encoders
from preprocessing.runner import process_units
from preprocessing.sources.discovery import MANIFESTS, find_sources
from preprocessing.steps.encode import RunningMoments, merge_sums
from workflows.config.serialization import diff

ProgressCallback = Callable[[int, int, dict[str, Any]], None]
"""Called as ``progress(units done, units in all, counts so far)``."""


def build_dataset(
    sources: Sequence[str],
    out: str,
    config: PreprocessConfig,
    *,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
    spent: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Make, resume or extend the dataset ``out``; the counts of the command line's contract.

    ``spent``: filled with the seconds that each step took, over all workers.
    ValueError, with nothing written, when an argument names no readable media, when ``out`` is something else or was
    made with another configuration, or when another driver is writing it.
    """
    found = find_sources(sources)
    _check_named_files(sources)
    store = Store(out)
    facts = _existing_facts(store, config)
    plan = partial(
        plan_units,
        sources=found,
        per_unit=config.sources_per_unit,
        fingerprint=config.fingerprint,
        keep_duplicates=config.keep_duplicates,
    )
    units = plan(read_units(store))
    if dry_run:
        return {
            "sources": len(found),
            "units": len(units),
            "config": config.resolved(),
            "fingerprint": config.fingerprint,
        }
    with Lease(store) as lease:
        store.delete_temporary()
        # planned again: what another driver finished between the check above and the lease counts
        known = read_units(store)
        units = plan(known)
        _say_what_is_gone(known)
        missing = [unit for unit in units if unit.name not in finished_units(store)]
        if missing or not facts.get("complete"):
            _write_facts(store, config, {"complete": False})
            if len(units) > len(known):
                write_units(store, units)
            _run(
                missing,
                units,
                store,
                token=lease.token,
                config=config,
                progress=progress,
                spent=spent if spent is not None else {},
            )
            _finish(store, config, units)
    return dataset_counts(read_metadata_json(store))


def _say_what_is_gone(known: Sequence[WorkUnit]) -> None:
    """Sources of this dataset that no longer exist: whoever deleted them may think that their clips went too."""
    uris = [source.uri.split("#", 1)[0] for unit in known for source in unit.sources]
    gone = [uri for uri in uris if not is_remote(uri) and not os.path.exists(local_path(uri))]
    if gone:
        print(
            f"note: {len(gone)} sources of this dataset are no longer there ({gone[0]} ...); their clips stay in it. "
            "To be rid of them, preprocess the rest into a new dataset",
            file=sys.stderr,
            flush=True,
        )


def _check_named_files(arguments: Sequence[str]) -> None:
    """A file that the user named, not one found in a folder, must be media."""
    for argument in arguments:
        if os.path.isfile(argument) and os.path.splitext(argument)[1].lower() not in MANIFESTS:
            try:
                probe(argument)
            except MediaError as error:
                raise ValueError(
                    f"{argument} is not readable media ({error.detail}): name a video or audio file"
                ) from error


def _existing_facts(store: Store, config: PreprocessConfig) -> dict[str, Any]:
    """What an existing dataset says, {} for a new one. ValueError when this configuration cannot continue it."""
    if not store.exists(DATASET_FILE):
        if strangers := [name for name in store.list_entries() if name != LOCK and not name.startswith(TEMPORARY)]:
            raise ValueError(f"{store.uri} is not empty and no dataset (it holds {strangers[0]}): choose another place")
        return {}
    facts = read_metadata_json(store)
    if facts["fingerprint"] != config.fingerprint:
        changes = "\n  ".join(diff(facts["config"], config.resolved()))
        raise ValueError(
            f"{store.uri} was made with another configuration:\n  {changes}\n"
            "write to a new place, or use the configuration it was made with"
        )
    return facts


def _write_facts(store: Store, config: PreprocessConfig, more: dict[str, Any]) -> None:
    encoders = build_encoders(config)
    facts = {
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
    store.write(DATASET_FILE, json.dumps(facts, indent=1, sort_keys=True).encode())


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
    with _shown(progress) as show:

        def on_done(marker: dict[str, Any], seconds: Mapping[str, float]) -> None:
            nonlocal done
            done += 1
            for name, value in seconds.items():
                spent[name] = spent.get(name, 0.0) + value
            totals.add(marker)
            show(done, len(units), totals.counts())

        process_units(missing, store, token, config, on_done=on_done)


def _finish(store: Store, config: PreprocessConfig, units: Sequence[WorkUnit]) -> None:
    """Statistics and counts from the markers of all units, in their order: a function of the units alone."""
    totals, sums = DatasetCounts(), dict[str, RunningMoments]()
    for marker in read_markers(store, units):
        totals.add(marker)
        merge_sums(sums, marker["sums"])
    stats = {m: s.stats() for m, s in sums.items()}
    published = {m: codec.published_stats for m, codec in build_encoders(config).codecs.items()}
    stats |= {m: s for m, s in published.items() if s is not None}
    facts = {
        "complete": True,
        "counts": totals.counts(),
        "stats": {m: vars(s) for m, s in stats.items() if s is not None},
    }
    _write_facts(store, config, facts)


def dataset_counts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of a finished dataset and its fingerprint."""
    return {**facts["counts"], "fingerprint": facts["fingerprint"]}


@contextmanager
def _shown(progress: ProgressCallback | None) -> Generator[ProgressCallback]:
    """The caller's progress function, or a bar on a terminal, or a plain line every few seconds elsewhere."""
    if progress is not None:
        yield progress
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("preprocess", total=None)
            yield lambda done, of, counts: bar.update(
                task, completed=done, total=of, description=f"{counts['accepted']} clips, {counts['rejected']} rejected"
            )
    else:
        yield _plain_lines()


def _plain_lines(every: float = 5.0) -> ProgressCallback:
    last = 0.0

    def show(done: int, of: int, counts: dict[str, Any]) -> None:
        nonlocal last
        if done == of or time.monotonic() - last >= every:
            last = time.monotonic()
            line = f"preprocess: unit {done} of {of}, {counts['accepted']} clips, {counts['rejected']} rejected"
            print(line, file=sys.stderr, flush=True)

    return show
