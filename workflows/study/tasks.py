"""A study in units that end in a file: training of one method, or scores of one setting. What is on disk is done.

```text
OUT/study.json                         the configuration; another one is refused
OUT/seed-S/METHOD/weights.safetensors  average weights at the end of training; beside it train.json: losses, costs
OUT/seed-S/METHOD/step.json, state-*   where an unfinished training stands
OUT/rows/seed-S-METHOD-MODE-STEPS.json scores by window
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
from mfcore.rollout import join_chunks, noise_starts, rollout
from mfcore.solver import DenoiserContext, Mode, num_function_evaluations, schedule
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
REAL_KEY = "real"  # real clips, scored like generated ones
WEIGHTS = "weights.safetensors"
LOG_FILE = "log.jsonl"
SAVE_SECONDS = 60.0
LOG_STEPS = 50
HISTORY_CLIPS = 64


@dataclass(frozen=True, kw_only=True)
class StudyTask:
    """One piece of work; ``needs`` must be done before."""

    kind: Literal["train", "score"]
    method: str
    seed: int
    mode: Mode = "few"
    steps: int = 0
    guidance: float = 1.0

    @property
    def name(self) -> str:
        asked = f"-{self.mode}-{self.steps}" + ("" if self.guidance == 1.0 else f"-w{self.guidance:g}")
        return f"seed-{self.seed}-{self.method}" + (asked if self.kind == "score" else "")

    @property
    def dependency(self) -> "StudyTask | None":
        if self.kind == "score":
            return None if self.method == REAL_KEY else StudyTask(kind="train", method=self.method, seed=self.seed)
        return None if self.method == JOINT_KEY else StudyTask(kind="train", method=JOINT_KEY, seed=self.seed)

    def result_path(self, out: Path) -> Path:
        """The file that says it is done."""
        if self.kind == "score":
            return out / "rows" / f"{self.name}.json"
        return out / f"seed-{self.seed}" / self.method / "train.json"

    def is_done(self, out: Path) -> bool:
        return self.result_path(out).exists()

    def is_ready(self, out: Path) -> bool:
        """Whether its needs are met: a training may be on record without its weights."""
        return self.dependency is None or (
            self.dependency.is_done(out) and _weights(out, self.dependency.method, self.seed).exists()
        )


def plan_tasks(config: StudyConfig, methods: dict[str, Sequence[int]]) -> list[StudyTask]:
    """What a study of ``methods`` (name -> seeds) consists of, seed after seed, in an order that respects needs."""
    units: list[StudyTask] = []
    for s in sorted({s for some in methods.values() for s in some}):
        names = [name for name, some in methods.items() if s in some]
        units.append(StudyTask(kind="train", method=JOINT_KEY, seed=s))
        units += [StudyTask(kind="train", method=name, seed=s) for name in names]
        units.append(StudyTask(kind="score", method=REAL_KEY, seed=s, mode="multi", steps=0))
        units += [
            StudyTask(kind="score", method=JOINT_KEY, seed=s, mode="multi", steps=n)
            for n in {4: None, max(config.counts): None}
        ]
        units += [unit for name in names for mode in METHODS[name].modes for unit in _settings(config, name, s, mode)]
    return units


def _settings(config: StudyConfig, name: str, seed: int, mode: Mode) -> list[StudyTask]:
    """The few-step mode has its guidance built in; the multi-step mode is asked plainly, and at most steps with it.

    Beside a few-step mode the multi-step one is asked once: is it still what it was?
    """
    most, counts = max(config.counts), METHODS[name].counts or config.counts
    plain = [StudyTask(kind="score", method=name, seed=seed, mode=mode, steps=n) for n in counts]
    if mode == "few":
        return plain
    if "few" in METHODS[name].modes:
        return plain[-1:]
    if config.guidance == 1.0:  # which is none
        return plain
    return [*plain, StudyTask(kind="score", method=name, seed=seed, mode=mode, steps=most, guidance=config.guidance)]


class DeadlineReached(Exception):
    """The deadline came; what was done so far is saved."""


def run_task(config: StudyConfig, out: Path, unit: StudyTask, device: str, deadline: float) -> None:
    """Do one unit, or as much of it as the time until ``deadline`` (seconds of ``time.time``) allows."""
    if unit.kind == "train":
        _train(config, out, unit, device, deadline)
    else:
        _score(config, out, unit, device)


def pending_tasks(out: Path, units: Sequence[StudyTask]) -> list[StudyTask]:
    """What is to be done of ``units``, in their order; trainings that are done, and whose weights others need and are
    not there, among it.
    """
    left = {unit for unit in units if not unit.is_done(out)}
    for unit in reversed(units):  # what is needed comes first
        if unit in left and unit.dependency and not unit.is_ready(out):
            left.add(unit.dependency)
    return [unit for unit in units if unit in left]


def _weights(out: Path, method: str, seed: int) -> Path:
    return out / f"seed-{seed}" / method / WEIGHTS


def _of(config: StudyConfig, method: str) -> StudyConfig:
    """Settings with what ``method`` changes of them."""
    return METHODS[method].change(config) if method in METHODS else config


def _network(config: StudyConfig, out: Path, method: str, seed: int, device: str) -> nn.Module:
    net = build_model(config.model, seed)
    net.load_state_dict(load_file(_weights(out, method, seed)))
    return net.to(device)


def _trainer(config: StudyConfig, out: Path, unit: StudyTask, device: str) -> Trainer:
    if unit.method == JOINT_KEY:
        objective = FlowMatchingObjective(FlowMatchingConfig(time=config.method.time))
        student = build_model(config.model, unit.seed).to(device)
        config = replace(config, batch=config.joint_batch, chunks=config.joint_chunks)
        return Trainer(config, objective, student, seed=unit.seed, steps=config.joint_steps, optim=config.joint_optim)
    method, config = METHODS[unit.method], _of(config, unit.method)
    student = _network(config, out, JOINT_KEY, unit.seed, device)
    frozen = None
    if method.teacher == "frozen":
        frozen = _network(config, out, JOINT_KEY, unit.seed, device).eval().requires_grad_(False)
    return Trainer(
        config,
        method.objective(config.method),
        student,
        seed=unit.seed + STUDY_MUTUAL_SEED_OFFSET,
        steps=config.steps,
        optim=config.optim,
        teacher=frozen,
    )


def _train(config: StudyConfig, out: Path, unit: StudyTask, device: str, deadline: float) -> None:
    folder = unit.result_path(out).parent
    trainer = _trainer(config, out, unit, device)
    trainer.resume(folder)
    log = folder / LOG_FILE
    if trainer.step == 0:  # of a training that is gone nothing counts
        (folder / "cost.json").unlink(missing_ok=True)
        log.unlink(missing_ok=True)
    cost = read_json(folder / "cost.json", default={"seconds": 0.0, "cpu_seconds": 0.0})
    wall, cpu, saved = time.monotonic(), time.process_time(), time.monotonic()

    def keep() -> None:
        trainer.save(folder)
        spent = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        write_json(folder / "cost.json", {k: cost[k] + spent[k] for k in spent})

    while trainer.step < trainer.steps:
        logged = (trainer.step + 1) % LOG_STEPS == 0 or trainer.step + 1 == trainer.steps
        seen = trainer.train_step(told=logged)
        if logged:
            folder.mkdir(parents=True, exist_ok=True)
            with log.open("a") as lines:
                lines.write(json.dumps({"step": trainer.step, **seen}) + "\n")
        if time.monotonic() - saved > SAVE_SECONDS or time.time() > deadline:
            keep()
            saved = time.monotonic()
            if time.time() > deadline:
                raise DeadlineReached(f"{unit.name} stands at step {trainer.step} of {trainer.steps}")
    keep()
    _finish(trainer, out, unit, device, config)


def _finish(trainer: Trainer, out: Path, unit: StudyTask, device: str, config: StudyConfig) -> None:
    folder = unit.result_path(out).parent
    average = trainer.ema.module
    held_out = torch.arange(HISTORY_CLIPS) + STUDY_HISTORY_SAMPLE_OFFSET
    batch = latent_world.sample_clips(unit.seed, held_out, max(config.joint_chunks), config.voices).batch.to(device)
    use = history_use(trainer.ema.model, batch, config.method.time, unit.seed)
    weights = _weights(out, unit.method, unit.seed)
    with atomic_path(weights) as temporary:
        save_file({n: w.contiguous() for n, w in average.state_dict().items()}, temporary)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    result = {
        "method": unit.method,
        "seed": unit.seed,
        "steps": trainer.steps,
        "history_use": use,
        "state_bytes": trainer.state_bytes(),
        "peak_memory_bytes": peak,
        **read_json(folder / "cost.json"),
    }
    write_json(folder / "train.json", result)


def _score(config: StudyConfig, out: Path, unit: StudyTask, device: str) -> None:
    made = _made(config, out, unit, device)
    real = real_statistics(unit.seed)
    speed = {"clip_seconds_per_second": made.clip_seconds_per_second}
    rows: list[StudyRow] = []
    for w in parse_windows(config.windows):
        part = made.short if w.end <= config.seconds else made.long
        assert part is not None  # the configuration has no windows beyond the clips
        streams, script = part
        metrics = score_window(streams, script, w, real) | speed
        rows.append(
            {
                "method": unit.method,
                "mode": unit.mode,
                "steps": unit.steps,
                "nfe": num_function_evaluations(unit.steps, unit.guidance) if unit.steps else 0,
                "guidance": unit.guidance,
                "seed": unit.seed,
                "window": w.name,
                "clips": len(script.identity),
                "metrics": metrics,
            }
        )
    write_json(unit.result_path(out), rows)


@dataclass(frozen=True)
class _Made:
    """Clips with their truth: all of them as far as all go, and those that go on in whole."""

    short: tuple[dict[str, Stream], GroundTruth]
    long: tuple[dict[str, Stream], GroundTruth] | None
    clip_seconds_per_second: float


def _made(config: StudyConfig, out: Path, unit: StudyTask, device: str) -> _Made:
    """Generated by the network of ``unit``, or drawn where it asks for real clips."""
    short, long = (int(s / float(latent_world.CHUNK_SECONDS)) for s in (config.seconds, config.long_seconds))
    drawn = torch.arange(config.clips) + STUDY_SCORE_SAMPLE_OFFSET
    clips = latent_world.sample_clips(unit.seed, drawn, long if config.long_clips else short, config.voices)
    net = None if unit.method == REAL_KEY else _network(config, out, unit.method, unit.seed, device)
    started = time.monotonic()

    def streams(rows: slice, chunks: int) -> dict[str, Stream]:
        batch = clips.batch.rows(rows)
        if net is None:
            return {m: s.chunks(0, chunks) for m, s in batch.streams.items()}
        return _rolled_out(config, net, unit, batch.to(device), chunks)

    going_on, others = slice(0, config.long_clips), slice(config.long_clips, config.clips)
    whole = streams(going_on, long) if config.long_clips else None
    parts = [{m: s.chunks(0, short) for m, s in whole.items()}] if whole else []
    parts += [streams(others, short)] if config.clips > config.long_clips else []
    seconds = time.monotonic() - started
    made = {m: s.with_latents(torch.cat([part[m].latents for part in parts])) for m, s in parts[0].items()}
    length = config.long_clips * config.long_seconds + (config.clips - config.long_clips) * config.seconds
    return _Made(
        short=(made, clips.script),
        long=(whole, clips.script.rows(going_on)) if whole else None,
        clip_seconds_per_second=length / seconds,
    )


@torch.no_grad()
def _rolled_out(config: StudyConfig, net: nn.Module, unit: StudyTask, batch: AVBatch, chunks: int) -> dict[str, Stream]:
    shapes = {m: tuple(s.latents.shape[2:]) for m, s in batch.streams.items()}
    like = batch.streams["video"].latents
    starts = noise_starts(latent_world.TIMELINE, shapes, range(chunks), unit.seed, batch.samples, like)
    tokens = sum(latent_world.TIMELINE.max_count(m) for m in shapes)
    context = DenoiserContext(model=net, cond=batch.cond, guidance=unit.guidance).prefill()
    context = context.map_memories(lambda memory: to_ring_cache(memory, tokens))
    # as when streaming: what the few-step mode writes is labelled as its own, the multi-step mode takes it for real
    labelled = unit.mode == "few" and _of(config, unit.method).method.trust_label
    trust = torch.ones(len(batch.samples), device=like.device) if labelled else None
    plan = schedule(unit.steps, config.shift)
    return join_chunks(c.clean for c in rollout(context, starts, plan, mode=unit.mode, trust=trust))
