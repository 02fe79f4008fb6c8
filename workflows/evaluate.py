"""``mfctl evaluate``: sweep step counts and modes of checkpoints on held-out clips.

FOLDER/results.json   one row per (checkpoint, mode, steps, guidance, seed, window); "real" rows are the ceiling
FOLDER/rows/          one file per setting: what is there is not generated again
FOLDER/samples/       two clips of every setting, and the real ones as the codec keeps them
FOLDER/*.png          frontier, metrics over time, comparison sheet
FOLDER/mlflow.json    the parent run
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mfcore.metrics.windows import Window, parse_windows
from preprocessing.mp4 import write_mp4
from workflows import console, environment, report
from workflows.checkpoint import find_export, load_card, read_json
from workflows.heldout import HeldOut, Signals, check_match, frame_rate, real_signals, select
from workflows.measures import Numbers, Real
from workflows.readings import Reader, Reading
from workflows.sampler import Batch, batch_speed, decode, generate, stream_speed
from workflows.scores import score
from workflows.streamer import Streamer
from workflows.sweep import SCORER, Results, Row, Setting, Subject, examine, plan

SAMPLES = 2  # clips of every setting that are kept
_SHORTEST = 1.0  # seconds of a clip that must lie in a window
_HELD_OUT = 0.1  # share of the sources, where the checkpoint does not say what it was trained with


def evaluate(
    checkpoints: Sequence[str],
    *,
    data: str | None = None,
    steps: Sequence[int] = (1, 2, 4, 8, 16, 50),
    modes: Sequence[str] = ("few", "multi"),
    guidance: float | None = None,
    clips: int = 16,
    seconds: float | None = None,
    out: str | None = None,
    seeds: Sequence[int] = (0,),
    windows: str = "0-5,5-15,15-25,25-60,60-120",
    mlflow_uri: str | None = None,
    progress: console.Progress | None = None,
) -> dict[str, Any]:
    """Sample, score, plot and log; the same call again does only what is missing.

    ``data``: default the dataset of the first checkpoint's training. ``guidance``: of the multi-step mode. ``seconds``:
    length of the samples, default that of each clip; a longer sample repeats its clip's transcript. ValueError, with
    nothing written, when a checkpoint or the dataset is missing, they do not fit, or no setting makes sense.
    """
    subjects = [examine(path) for path in dict.fromkeys(checkpoints)]
    settings, skipped = plan(subjects, modes, steps, guidance, seeds)
    uri = data or _trained_on(subjects[0])
    held = select(uri, clips=clips, seconds=seconds, fraction=min(map(_held_out, subjects)))
    for subject in subjects:
        check_match(load_card(subject.path), held.meta, subject.path, uri)
    cut = parse_windows(windows)
    scope = hashlib.sha256(f"{SCORER} {windows} {held.digest()}".encode()).hexdigest()[:12]
    name = "+".join(dict.fromkeys(s.label for s in subjects)) + f"-{scope[:6]}"
    folder = Path(out) if out else Path(environment.absolute("runs/evaluate")) / name
    sweep = _Sweep(held=held, windows=cut, results=Results(folder, scope), subjects=subjects)
    if progress is not None:
        sweep.run(settings, progress)
    else:
        with console.progress("evaluate") as show:
            sweep.run(settings, show)
    facts = {"dataset": uri, "clips": len(held.prompts), "scope": scope, "skipped": skipped, "repeated": held.repeated}
    return sweep.finish(name, mlflow_uri or environment.tracking_uri(), facts)


def _record(subject: Subject) -> Mapping[str, Any]:
    """``run.json`` of the checkpoint; empty for a bare export."""
    path = find_export(subject.path).parent / "run.json"
    return read_json(path) if path.exists() else {}


def _trained_on(subject: Subject) -> str:
    uri = _record(subject).get("data")
    if not uri:
        raise ValueError(f"{subject.path} does not say what it was trained on: name a dataset with --data DATASET")
    return str(uri)


def _held_out(subject: Subject) -> float:
    """The share that the training kept away; a smaller share of the same sources lies inside it."""
    return float(_record(subject).get("config", {}).get("data", {}).get("held_out", _HELD_OUT))


@contextmanager
def one_thread_less() -> Iterator[None]:
    """Leave a core to the thread that reads: small networks gain nothing from sharing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(kw_only=True)
class _Sweep:
    """A sweep at work."""

    held: HeldOut
    windows: tuple[Window, ...]
    results: Results
    subjects: Sequence[Subject]
    times: dict[str, float] = field(default_factory=dict[str, float])  # seconds by kind of work

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.held)

    @cached_property
    def real(self) -> Real:
        """Read when the first setting needs it: a sweep that is done needs none."""
        with self._timed("real"):
            prompts = real_signals(self.held, [p.clip for p in self.held.prompts])
            others = real_signals(self.held, self.held.reference)
            return Real(prompts=[self.reader.read(s) for s in prompts], reference=[self.reader.read(s) for s in others])

    def run(self, settings: Sequence[Setting], progress: console.Progress) -> None:
        """Everything that is not there yet. One thread samples, another reads and scores the setting before."""
        todo = [s for s in settings if self.results.done(s.key(self.results.scope)) is None]
        if todo and self.results.done(f"real-{self.results.scope}") is None:
            self._score_real()
        progress(0, len(todo))
        done = 0
        for path, group in groupby(todo, key=lambda s: s.subject.path):
            streamer, mine = Streamer.load(path), list(group)
            with self._timed("speed"):  # while nothing else runs
                speeds = [stream_speed(streamer, self.held.prompts[0], s.how) for s in mine]
            with ThreadPoolExecutor(1) as pool, one_thread_less():
                before: Future[None] | None = None
                for setting, speed in zip(mine, speeds, strict=True):
                    with self._timed("generate"):
                        batches = list(generate(streamer, self.held.prompts, setting.how))
                    if before is not None:
                        before.result()
                    before = pool.submit(self._measure, streamer, setting, batches, speed)
                    done += 1
                    progress(done, len(todo))
                if before is not None:
                    before.result()

    def _score_real(self) -> None:
        facts = {"checkpoint": "real", "mode": "real", "steps": 0, "nfe": 0, "guidance": 1.0, "seed": 0}
        lengths = [float(p.clip.chunks * self.held.meta.chunk_seconds) for p in self.held.prompts]
        real = self.real
        rows = self._rows({**facts, "label": "real"}, real.prompts, lengths)
        self._keep("real", real_signals(self.held, [p.clip for p in self.held.prompts[:SAMPLES]]))
        samples = self._sample_paths("real")
        part = {"digest": "real", "name": "real", "rows": rows, "samples": samples}
        self.results.store(f"real-{self.results.scope}", part)

    def _measure(self, streamer: Streamer, setting: Setting, batches: Sequence[Batch], speed: Numbers) -> None:
        """Decode, read and score the samples of a setting, and store its rows."""
        real = self.real
        readings: list[Reading] = []
        lengths: list[float] = []
        kept: list[Signals] = []
        for batch in batches:
            with self._timed("decode"):
                signals = decode(streamer, batch)
            with self._timed("read"):
                readings += [self.reader.read(s) for s in signals]
            lengths += [float(batch.length)] * len(signals)
            kept = (kept + signals)[:SAMPLES]
        with self._timed("score"):
            label = {**setting.facts, "label": setting.subject.label}
            rows = self._rows(label, readings, lengths, real)
            rows[0]["metrics"] |= speed | batch_speed(batches)
        self._keep(setting.name, kept)
        part = {"digest": setting.subject.digest, "name": setting.name, "rows": rows}
        samples = self._sample_paths(setting.name)
        self.results.store(setting.key(self.results.scope), {**part, "samples": samples})

    def _rows(
        self, facts: Row, readings: Sequence[Reading], lengths: Sequence[float], real: Real | None = None
    ) -> list[Row]:
        """A row for the whole clips, then one for each window that they reach into."""
        rows: list[Row] = []
        for name, window in [("all", Window(start=0.0)), *((w.name, w) for w in self.windows)]:
            least = window.start + _SHORTEST if name != "all" else 0.0
            part = [r.cut(window) for r, length in zip(readings, lengths, strict=True) if length >= least]
            if not part:
                continue
            scores = score(part, real or self.real)
            rows.append(
                {
                    **facts,
                    "window": name,
                    "clips": len(part),
                    "metrics": scores.metrics,
                    "failures": scores.failures,
                    "not_measured": scores.not_measured,
                }
            )
        return rows

    def _keep(self, name: str, signals: Sequence[Signals]) -> None:
        with self._timed("files"):
            for i, one in enumerate(signals[:SAMPLES]):
                path = self.results.folder / "samples" / f"{name}-{i}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_mp4(
                    path,
                    None if one.frames is None else one.frames.numpy(),
                    frame_rate(self.held.meta) if one.frames is not None else None,
                    None if one.sound is None else one.sound.numpy(),
                    self.reader.sample_rate if one.sound is not None else None,
                )

    def _sample_paths(self, name: str) -> list[str]:
        count = min(SAMPLES, len(self.held.prompts))
        return [f"samples/{name}-{i}.mp4" for i in range(count)]

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.times[kind] = self.times.get(kind, 0.0) + time.perf_counter() - began

    def finish(self, name: str, mlflow_uri: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Results, plots and MLflow from all that this folder holds of these checkpoints and clips."""
        parts = self.results.parts(s.digest for s in self.subjects)
        rows = self.results.write(parts)
        with self._timed("plots"):
            plots = report.draw(parts, self.results.folder, frame_rate(self.held.meta), self.reader.sample_rate, name)
        with self._timed("tracking"):
            parent = report.log(parts, plots, self.results, mlflow_uri, name, facts)
        return {
            "results": str(self.results.path),
            "mlflow_parent_run": parent,
            "plots": [str(path) for path in plots],
            "samples": [str(self.results.folder / path) for part in parts for path in part["samples"]],
            "rows": len(rows),
            "not_measured": {k: v for row in rows if row["window"] == "all" for k, v in row["not_measured"].items()},
            "skipped": facts["skipped"],
            **({"note": "samples are longer than their clips: transcripts repeat"} if facts["repeated"] else {}),
            "seconds": {kind: round(spent, 2) for kind, spent in self.times.items()},
        }
