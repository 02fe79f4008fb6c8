"""Make a dataset (``preprocess``), play one of its clips (``reconstruct``). To look at all of it: ``inspection.py``."""

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mfcore.codecs.oobleck import read_oobleck
from mfcore.codecs.text import read_t5
from mfcore.codecs.wan import read_wan
from mfcore.types import AUDIO, VIDEO
from preprocessing.config import PreprocessConfig
from preprocessing.encode import ChannelSums, merge_sums
from preprocessing.lease import LOCK, Lease
from preprocessing.lipsync import syncnet_config
from preprocessing.manifest import (
    DATASET_FILE,
    Totals,
    Unit,
    difference,
    finished,
    plan_units,
    read_markers,
    read_units,
    write_units,
)
from preprocessing.mp4 import write_mp4
from preprocessing.pipeline import build_encoders
from preprocessing.probe import MediaError, probe
from preprocessing.reader import ClipDataset, open_dataset, read_facts
from preprocessing.schema import SCHEMA_VERSION
from preprocessing.source import MANIFESTS, find_sources
from preprocessing.storage import TEMPORARY, Store, is_remote, local_path
from preprocessing.transcribe import read_whisper
from preprocessing.units import run_units
from workflows.environment import absolute

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called as ``progress(units done, units in all, counts so far)``."""


def preprocess(
    sources: Sequence[str],
    out: str,
    config: PreprocessConfig,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
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
        store.sweep()
        # planned again: what another driver finished between the check above and the lease counts
        known = read_units(store)
        units = plan(known)
        _say_what_is_gone(known)
        missing = [unit for unit in units if unit.name not in finished(store)]
        if missing or not facts.get("complete"):
            _write_facts(store, config, {"complete": False})
            if len(units) > len(known):
                write_units(store, units)
            _run(missing, units, store, lease.token, config, progress, spent if spent is not None else {})
            _finish(store, config, units)
    return summary_of(read_facts(store))


def _say_what_is_gone(known: Sequence[Unit]) -> None:
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


def with_codecs(
    config: PreprocessConfig, video: str | None = None, audio: str | None = None, text: str | None = None
) -> PreprocessConfig:
    """The configuration with codecs named as on the command line, such as ``wan:DIR``. ValueError for other names."""
    parts: dict[str, Any] = {}
    for option, name, embedded, readers in (
        ("video", video, "dct", {"wan": read_wan}),
        ("audio", audio, "mel", {"oobleck": read_oobleck}),
        ("text", text, "words", {"t5": read_t5, "umt5": read_t5}),
    ):
        kind, _, folder = (name or embedded).partition(":")
        if kind in readers and folder:
            parts[option] = readers[kind](absolute(folder))
        elif name not in (None, embedded):
            known = ", ".join([embedded, *(f"{kind}:DIR" for kind in readers)])
            raise ValueError(f"--{'text' if option == 'text' else f'codec-{option}'} {name}: choose one of {known}")
    return replace(config, **parts)


def with_sync(config: PreprocessConfig, sync: str | None) -> PreprocessConfig:
    """The configuration with a sync filter named as on the command line. ValueError for other names."""
    kind, _, file = (sync or "motion").partition(":")
    if kind == "syncnet" and file:
        return replace(config, sync=syncnet_config(absolute(file)))
    if sync not in (None, "motion", "off"):
        raise ValueError(f"--sync {sync}: choose motion, syncnet:FILE or off")
    return replace(config, sync=replace(config.sync, estimator=None)) if sync == "off" else config


def with_transcripts(config: PreprocessConfig, transcribe: str | None) -> PreprocessConfig:
    """The configuration with what makes missing transcripts. ValueError for another name."""
    kind, _, folder = (transcribe or "off").partition(":")
    if kind == "whisper" and folder:
        return replace(config, whisper=read_whisper(absolute(folder)))
    if transcribe not in (None, "off"):
        raise ValueError(f"--transcribe {transcribe}: choose whisper:DIR or off")
    return config


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
        if strangers := [name for name in store.listing() if name != LOCK and not name.startswith(TEMPORARY)]:
            raise ValueError(f"{store.uri} is not empty and no dataset (it holds {strangers[0]}): choose another place")
        return {}
    facts = read_facts(store)
    if facts["fingerprint"] != config.fingerprint:
        changes = "\n  ".join(difference(facts["config"], config.resolved()))
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
        "codec_folders": config.folders,
        "clocks": {
            m: {"rate": str(c.rate), "offset": str(c.offset), "head": c.head}
            for m, c in encoders.timeline.clocks.items()
        },
        "chunk_seconds": str(config.chunk_seconds),
        **more,
    }
    store.write(DATASET_FILE, json.dumps(facts, indent=1, sort_keys=True).encode())


def _run(
    missing: Sequence[Unit],
    units: Sequence[Unit],
    store: Store,
    token: str,
    config: PreprocessConfig,
    progress: Progress | None,
    spent: dict[str, float],
) -> None:
    done, totals = len(units) - len(missing), Totals()
    with _shown(progress) as show:

        def on_done(marker: dict[str, Any], seconds: Mapping[str, float]) -> None:
            nonlocal done
            done += 1
            for name, value in seconds.items():
                spent[name] = spent.get(name, 0.0) + value
            totals.add(marker)
            show(done, len(units), totals.counts())

        run_units(missing, store, token, config, on_done)


def _finish(store: Store, config: PreprocessConfig, units: Sequence[Unit]) -> None:
    """Statistics and counts from the markers of all units, in their order: a function of the units alone."""
    totals, sums = Totals(), dict[str, ChannelSums]()
    for marker in read_markers(store, units):
        totals.add(marker)
        merge_sums(sums, marker["sums"])
    stats = {m: s.stats() for m, s in sums.items()}
    published = {m: codec.published for m, codec in build_encoders(config).codecs.items()}
    stats |= {m: s for m, s in published.items() if s is not None}
    facts = {
        "complete": True,
        "counts": totals.counts(),
        "stats": {m: vars(s) for m, s in stats.items() if s is not None},
    }
    _write_facts(store, config, facts)


def summary_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of a finished dataset and its fingerprint."""
    return {**facts["counts"], "fingerprint": facts["fingerprint"]}


@contextmanager
def _shown(progress: Progress | None) -> Generator[Progress]:
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


def _plain_lines(every: float = 5.0) -> Progress:
    last = 0.0

    def show(done: int, of: int, counts: dict[str, Any]) -> None:
        nonlocal last
        if done == of or time.monotonic() - last >= every:
            last = time.monotonic()
            line = f"preprocess: unit {done} of {of}, {counts['accepted']} clips, {counts['rejected']} rejected"
            print(line, file=sys.stderr, flush=True)

    return show


def reconstruct(dataset: str, clip_id: str, out: str, overwrite: bool = False) -> dict[str, Any]:
    """Decode one row back to an mp4: what the model's own output can look and sound like at best."""
    if os.path.exists(out) and not overwrite:
        raise ValueError(f"{out} exists: choose another name, or add --overwrite")
    clips = open_dataset(dataset)
    clip = clips.clip(clips.index(clip_id))
    frames, sound = decoded(clips, clip.video, VIDEO), decoded(clips, clip.audio, AUDIO)
    fps, rate = Fraction(clips.meta.config["video"]["fps"]), int(clips.meta.config["audio"]["sample_rate"])
    seconds = len(frames) / fps if frames is not None else Fraction(0 if sound is None else len(sound), rate)
    sound = None if sound is None else sound[: round(seconds * rate)]
    Path(out).resolve().parent.mkdir(parents=True, exist_ok=True)
    write_mp4(out, frames, fps, sound, rate)
    return {"path": out, "seconds": float(seconds), "frames": 0 if frames is None else len(frames), "fps": float(fps)}


def decoded(clips: ClipDataset, latents: Tensor | None, modality: str) -> Any:
    """Frames or sound of latents of a dataset."""
    if latents is None:
        return None
    return clips.meta.codec(modality).decode(latents).numpy()
