"""Study tasks: training of one method, or scores of one sampling setting.

A task is done when its file exists.

```text
OUT/study.json                         configuration; a different one is rejected
OUT/seed-S/METHOD/weights.safetensors  EMA weights after training
OUT/seed-S/METHOD/train.json           history use and costs
OUT/seed-S/METHOD/step.json, state-*   state of an unfinished training
OUT/rows/seed-S-METHOD-MODE-STEPS.json scores per window
```
"""

import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mfcore.metrics.history_use import history_use
from mfcore.metrics.windows import parse_windows
from mfcore.model.ring_cache import to_ring_cache
from mfcore.model.transformer import build_model
from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective
from mfcore.rng import STUDY_HISTORY_SAMPLE_OFFSET, STUDY_MUTUAL_SEED_OFFSET, STUDY_SCORE_SAMPLE_OFFSET
from mfcore.rollout import join_chunks, noise_starts, rollout, step_noise
from mfcore.solver import (
    DenoiserContext,
    Mode,
    SamplerName,
    num_function_evaluations,
    sampler_renoising,
    sampler_schedule,
)
from mfcore.types import AVBatch, Stream
from workflows.study import latent_world
from workflows.study.config import StudyConfig
from workflows.study.latent_world import GroundTruth
from workflows.study.methods import METHODS
from workflows.study.metrics import real_statistics, score_window
from workflows.study.results_table import StudyRow
from workflows.study.trainer import Trainer
from workflows.utils.json_io import atomic_path, read_json, write_json

JOINT_KEY = "joint"
REAL_KEY = "real"  # real clips, scored like generated clips
WEIGHTS = "weights.safetensors"
LOG_FILE = "log.jsonl"
SAVE_SECONDS = 60.0
LOG_STEPS = 50
HISTORY_CLIPS = 64


@dataclass(frozen=True, kw_only=True)
class StudyTask:
    """One training or one score; ``dependency`` must be done before it."""

    kind: Literal["train", "score"]
    method: str
    seed: int
    mode: Mode = "few"
    steps: int = 0
    guidance: float = 1.0
    sampler: SamplerName = "deterministic"

    @property
    def name(self) -> str:
        """Return the unique name, which is also the name of the score file."""
        name = f"seed-{self.seed}-{self.method}"
        if self.kind == "train":
            return name
        sampler = "" if self.sampler == "deterministic" else f"-{self.sampler}"
        return f"{name}-{self.mode}-{self.steps}{sampler}" + ("" if self.guidance == 1.0 else f"-w{self.guidance:g}")

    @property
    def dependency(self) -> "StudyTask | None":
        """Return the training that provides the weights, if any."""
        if self.kind == "score":
            return None if self.method == REAL_KEY else StudyTask(kind="train", method=self.method, seed=self.seed)
        if self.method == JOINT_KEY:
            return None
        start = METHODS[self.method].start if self.method in METHODS else JOINT_KEY
        return StudyTask(kind="train", method=start, seed=self.seed)

    def result_path(self, out: Path) -> Path:
        """Return the path of the file that marks the task as done."""
        if self.kind == "score":
            return out / "rows" / f"{self.name}.json"
        return out / f"seed-{self.seed}" / self.method / "train.json"

    def is_done(self, out: Path) -> bool:
        """Return True if the result file exists."""
        return self.result_path(out).exists()

    def is_ready(self, out: Path) -> bool:
        """Return True if the dependency is done and its weights exist."""
        return self.dependency is None or (
            self.dependency.is_done(out) and _weights_path(out, self.dependency.method, self.seed).exists()
        )


def plan_tasks(config: StudyConfig, methods: dict[str, Sequence[int]]) -> list[StudyTask]:
    """Return all tasks of ``methods`` (name -> seeds), seed by seed, dependencies first."""
    tasks: list[StudyTask] = []
    for s in sorted(set().union(*methods.values())):
        names = [name for name, seeds in methods.items() if s in seeds]
        tasks.append(StudyTask(kind="train", method=JOINT_KEY, seed=s))
        trained = dict.fromkeys(part for name in names for part in (METHODS[name].start, name))
        tasks += [StudyTask(kind="train", method=name, seed=s) for name in trained if name != JOINT_KEY]
        tasks.append(StudyTask(kind="score", method=REAL_KEY, seed=s, mode="multi", steps=0))
        for n in dict.fromkeys((4, max(config.counts))):
            tasks.append(StudyTask(kind="score", method=JOINT_KEY, seed=s, mode="multi", steps=n))
        for name in names:
            for mode in METHODS[name].modes:
                tasks += _score_tasks(config, name, s, mode)
    return tasks


def _score_tasks(config: StudyConfig, name: str, seed: int, mode: Mode) -> list[StudyTask]:
    """Return the score tasks of one method and mode.

    The few-step mode has built-in guidance. The multi-step mode runs unguided, and guided at the largest step count.
    Methods with both modes run the multi-step mode once, to detect a loss of quality.
    """
    counts = METHODS[name].counts or config.counts
    plain = [StudyTask(kind="score", method=name, seed=seed, mode=mode, steps=n) for n in counts]
    if mode == "few":
        return [replace(task, sampler=sampler) for sampler in config.samplers for task in plain]
    if "few" in METHODS[name].modes:
        return plain[-1:]
    if config.guidance == 1.0:  # guidance is off
        return plain
    most = max(config.counts)
    return [*plain, StudyTask(kind="score", method=name, seed=seed, mode=mode, steps=most, guidance=config.guidance)]


class DeadlineReached(Exception):
    """The deadline passed; the progress is saved."""


def run_task(config: StudyConfig, out: Path, task: StudyTask, *, device: str, deadline: float) -> None:
    """Run one task. Raises DeadlineReached (progress is saved) at the time ``deadline``."""
    if task.kind == "train":
        _train(config, out, task, device=device, deadline=deadline)
    else:
        _score(config, out, task, device)


def pending_tasks(out: Path, tasks: Sequence[StudyTask]) -> list[StudyTask]:
    """Return the tasks to run, including finished trainings with missing but needed weights."""
    pending = {task for task in tasks if not task.is_done(out)}
    for task in reversed(tasks):  # dependencies precede their dependents
        if task in pending and task.dependency and not task.is_ready(out):
            pending.add(task.dependency)
    return [task for task in tasks if task in pending]


def _weights_path(out: Path, method: str, seed: int) -> Path:
    return out / f"seed-{seed}" / method / WEIGHTS


def _method_config(config: StudyConfig, method: str) -> StudyConfig:
    """Return the settings with the changes of ``method``."""
    return METHODS[method].change(config) if method in METHODS else config


def _load_network(config: StudyConfig, out: Path, *, method: str, seed: int, device: str) -> nn.Module:
    net = build_model(config.model, seed)
    net.load_state_dict(load_file(_weights_path(out, method, seed)))
    return net.to(device)


def _build_trainer(config: StudyConfig, out: Path, task: StudyTask, device: str) -> Trainer:
    if task.method == JOINT_KEY:
        objective = FlowMatchingObjective(FlowMatchingConfig(time=config.method.time))
        student = build_model(config.model, task.seed).to(device)
        config = replace(config, batch=config.joint_batch, chunks=config.joint_chunks)
        return Trainer(config, objective, student, seed=task.seed, steps=config.joint_steps, optim=config.joint_optim)
    method, config = METHODS[task.method], _method_config(config, task.method)
    student = _load_network(config, out, method=method.start, seed=task.seed, device=device)
    frozen = None
    if method.teacher == "frozen":
        frozen = (
            _load_network(config, out, method=JOINT_KEY, seed=task.seed, device=device).eval().requires_grad_(False)
        )
    return Trainer(
        config,
        method.objective(config.method),
        student,
        seed=task.seed + STUDY_MUTUAL_SEED_OFFSET,
        steps=config.steps,
        optim=config.optim,
        teacher=frozen,
    )


def _train(config: StudyConfig, out: Path, task: StudyTask, *, device: str, deadline: float) -> None:
    folder = task.result_path(out).parent
    trainer = _build_trainer(config, out, task, device)
    trainer.resume(folder)
    log = folder / LOG_FILE
    if trainer.step == 0:  # discard log and costs of a deleted training
        (folder / "cost.json").unlink(missing_ok=True)
        log.unlink(missing_ok=True)
    cost = read_json(folder / "cost.json", default={"seconds": 0.0, "cpu_seconds": 0.0})
    started = time.monotonic()
    cpu_started = time.process_time()
    saved = time.monotonic()

    def save() -> None:
        trainer.save(folder)
        spent = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu_started}
        write_json(folder / "cost.json", {k: cost[k] + spent[k] for k in spent})

    while trainer.step < trainer.steps:
        log_due = (trainer.step + 1) % LOG_STEPS == 0 or trainer.step + 1 == trainer.steps
        metrics = trainer.train_step(with_metrics=log_due)
        if log_due:
            folder.mkdir(parents=True, exist_ok=True)
            with log.open("a") as lines:
                lines.write(json.dumps({"step": trainer.step, **metrics}) + "\n")
        if time.monotonic() - saved > SAVE_SECONDS or time.time() > deadline:
            save()
            saved = time.monotonic()
            if time.time() > deadline:
                raise DeadlineReached(f"{task.name} stopped at step {trainer.step} of {trainer.steps}")
    save()
    _finish(config, out, task, trainer)


def _finish(config: StudyConfig, out: Path, task: StudyTask, trainer: Trainer) -> None:
    folder = task.result_path(out).parent
    held_out = torch.arange(HISTORY_CLIPS) + STUDY_HISTORY_SAMPLE_OFFSET
    batch = latent_world.sample_clips(task.seed, held_out, max(config.joint_chunks), config.voices).batch.to(
        trainer.device
    )
    use = history_use(trainer.ema.model, batch, config.method.time, task.seed)
    weights = _weights_path(out, task.method, task.seed)
    with atomic_path(weights) as temporary:
        save_file({n: w.contiguous() for n, w in trainer.ema.module.state_dict().items()}, temporary)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if trainer.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    result = {
        "method": task.method,
        "seed": task.seed,
        "steps": trainer.steps,
        "history_use": use,
        "state_bytes": trainer.state_bytes(),
        "peak_memory_bytes": peak,
        **read_json(folder / "cost.json"),
    }
    write_json(folder / "train.json", result)


def _score(config: StudyConfig, out: Path, task: StudyTask, device: str) -> None:
    clips = _generate(config, out, task, device)
    real = real_statistics(task.seed)
    speed = {"clip_seconds_per_second": clips.clip_seconds_per_second}
    rows: list[StudyRow] = []
    for window in parse_windows(config.windows):
        part = clips.short if window.end <= config.seconds else clips.long
        assert part is not None  # checked by the configuration
        streams, truth = part
        metrics = score_window(streams, truth, window, real) | speed
        row: StudyRow = {
            "method": task.method,
            "mode": task.mode,
            "steps": task.steps,
            "nfe": num_function_evaluations(task.steps, task.guidance) if task.steps else 0,
            "guidance": task.guidance,
            "seed": task.seed,
            "window": window.name,
            "clips": len(truth.identity),
            "metrics": metrics,
        }
        if task.sampler != "deterministic":
            row["sampler"] = task.sampler
        rows.append(row)
    write_json(task.result_path(out), rows)


@dataclass(frozen=True)
class _GeneratedClips:
    """Clips and ground truth: all clips up to the common length, and the long clips in full."""

    short: tuple[dict[str, Stream], GroundTruth]
    long: tuple[dict[str, Stream], GroundTruth] | None
    clip_seconds_per_second: float


def _generate(config: StudyConfig, out: Path, task: StudyTask, device: str) -> _GeneratedClips:
    """Generate the clips of ``task`` with its network, or draw real clips."""
    short, long = (int(s / float(latent_world.CHUNK_SECONDS)) for s in (config.seconds, config.long_seconds))
    drawn = torch.arange(config.clips) + STUDY_SCORE_SAMPLE_OFFSET
    clips = latent_world.sample_clips(task.seed, drawn, long if config.long_clips else short, config.voices)
    net = (
        None
        if task.method == REAL_KEY
        else _load_network(config, out, method=task.method, seed=task.seed, device=device)
    )
    started = time.monotonic()

    def generate(rows: slice, chunks: int) -> dict[str, Stream]:
        batch = clips.batch.rows(rows)
        if net is None:
            return {m: s.chunks(0, chunks) for m, s in batch.streams.items()}
        return _roll_out(config, task, net, batch.to(device), chunks=chunks)

    long_rows = slice(0, config.long_clips)
    long_streams: dict[str, Stream] | None = None
    parts: list[dict[str, Stream]] = []
    if config.long_clips:
        long_streams = generate(long_rows, long)
        parts.append({m: s.chunks(0, short) for m, s in long_streams.items()})
    if config.clips > config.long_clips:
        parts.append(generate(slice(config.long_clips, config.clips), short))
    seconds = time.monotonic() - started
    streams: dict[str, Stream] = {}
    for m, stream in parts[0].items():
        streams[m] = stream.with_latents(torch.cat([part[m].latents for part in parts]))
    length = config.long_clips * config.long_seconds + (config.clips - config.long_clips) * config.seconds
    return _GeneratedClips(
        short=(streams, clips.truth),
        long=(long_streams, clips.truth.rows(long_rows)) if long_streams else None,
        clip_seconds_per_second=length / seconds,
    )


@torch.no_grad()
def _roll_out(
    config: StudyConfig, task: StudyTask, net: nn.Module, batch: AVBatch, *, chunks: int
) -> dict[str, Stream]:
    shapes = {m: tuple(s.latents.shape[2:]) for m, s in batch.streams.items()}
    like = batch.streams["video"].latents
    starts = noise_starts(
        latent_world.TIMELINE, shapes, range(chunks), seed=task.seed, samples=batch.samples, like=like
    )
    tokens = sum(latent_world.TIMELINE.max_count(m) for m in shapes)
    context = DenoiserContext(model=net, cond=batch.cond, guidance=task.guidance).prefill()
    context = context.map_caches(lambda cache: to_ring_cache(cache, tokens))
    # as in streaming: the few-step mode labels its history as generated, the multi-step mode as real
    labelled = task.mode == "few" and _method_config(config, task.method).method.trust_label
    trust = torch.ones(len(batch.samples), device=like.device) if labelled else None
    plan = sampler_schedule(task.sampler, task.steps, config.shift)
    renoising = sampler_renoising(task.sampler, task.steps, step_noise(task.seed, batch.samples))
    chunks_made = rollout(context, starts, plan, mode=task.mode, trust=trust, renoising=renoising)
    return join_chunks(chunk.clean for chunk in chunks_made)
