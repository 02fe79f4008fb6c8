"""The training loop. It knows engines, objective, tracker and batches by what they do, and no stage by name."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from mfcore.ema import Ema
from mfcore.objectives.terms import Objective, StepInfo, Term, report, total
from mfcore.optim import OptimConfig, learning_rate
from mfcore.types import AVBatch, VelocityModel
from workflows import ranks
from workflows.checkpoint import Progress
from workflows.data import FILLER
from workflows.engine import Engine, NonFiniteError
from workflows.tracking import STEP, Tracker

Models = Mapping[str, VelocityModel]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, and how often."""

    name: str  # of the stage, for messages
    seed: int
    steps: int  # optimizer steps of the stage
    batch: int  # samples per step, over all ranks
    log_every: int  # steps
    eval_every: int  # steps
    save_every: int  # samples


def run_loop(
    config: LoopConfig,
    start: Progress,
    *,
    engines: Mapping[str, Engine],
    optims: Mapping[str, OptimConfig],
    ema: Ema,
    objective: Objective,
    batches: Iterable[list[AVBatch]],
    evaluate: Callable[[Models], dict[str, float]],
    count_tokens: Callable[[AVBatch], int],
    tracker: Tracker,
    save: Callable[[Progress], object],
    say: Callable[[str], None],
) -> Progress:
    """Train from ``start`` to the end of the stage; returns the final progress, which is saved.

    ``batches``: this rank's micro-batches of every step from ``start.step`` on.
    """
    models: dict[str, VelocityModel] = {"ema": ema.module} | {name: e.module for name, e in engines.items()}
    meter, progress = Meter(), start
    if start.step == 0:
        first = evaluate(models)
        progress = replace(start, first=first, last=first)
        tracker.log(0, {STEP: 0, **held_out(first)})
        say(line(progress, config, {}))
    for micros in batches:
        waited = meter.waited()
        step = progress.step
        info = StepInfo(seed=config.seed, step=step, stage_step=step)
        terms: dict[str, list[Term]] = {}
        seen: list[Term] = []
        for micro in micros:
            terms = objective(models, micro, info)
            share = len(micro.samples) / sum(len(m.samples) for m in micros)
            for name, own in terms.items():
                engines[name].backward(total(own) * share)
            stop_if_not_finite(terms, {name: engines[name] for name in terms}, config, step, micro)
            seen += [term for own in terms.values() for term in own]
            meter.add(len(micro.samples), count_tokens(micro))
        rates = {name: learning_rate(optims[name], step, config.steps) for name in terms}
        norms = {name: engines[name].step(rates[name]) for name in terms}
        ema.update(engines["student"].weights(), step)
        done = step + 1
        progress = replace(progress, step=done, samples_seen=done * config.batch)
        last, log = done == config.steps, {}
        if done % config.log_every == 0 or last:
            log = report(over_all_ranks(seen))
            log |= {f"grad_norm/{n}": v for n, v in norms.items()} | {f"lr/{n}": v for n, v in rates.items()}
            log |= meter.read()
        if done % config.eval_every == 0 or last:
            progress = replace(progress, last=evaluate(models))
            log |= held_out(progress.last)
        if log:
            tracker.log(done, {STEP: progress.samples_seen, "data_wait_s": waited, **log})
            say(line(progress, config, log))
        if last or crosses(progress.samples_seen, config.batch, config.save_every):
            save(progress)
        meter.resume()
    return progress


def crosses(samples: int, batch: int, every: int) -> bool:
    """Whether the latest step passed a multiple of ``every`` samples."""
    return samples // every > (samples - batch) // every


def held_out(terms: Mapping[str, float]) -> dict[str, float]:
    return {f"held_out/{key}": value for key, value in terms.items()}


def stop_if_not_finite(
    terms: Mapping[str, list[Term]], engines: Mapping[str, Engine], config: LoopConfig, step: int, batch: AVBatch
) -> None:
    """All ranks raise NonFiniteError together, before any weight has moved, when any has a bad loss or gradient."""
    flat = [term for own in terms.values() for term in own]
    bad = torch.stack([~torch.isfinite(t.values).all() for t in flat if t.values.numel()]).any()
    for engine in engines.values():
        bad = bad | engine.bad_gradient
    if not ranks.any_true(bad):
        return
    names = [f"the loss {t.key}" for t in flat if not torch.isfinite(t.values).all()]
    names = names or [f"the gradient of {name}" for name, e in engines.items() if bool(e.bad_gradient)]
    samples = f"{int(batch.samples[0])}..{int(batch.samples[-1])}"
    found = [text for text in ranks.gather(f"{', '.join(names)} on samples {samples}" if names else "") if text]
    raise NonFiniteError(
        f"stage {config.name}, step {step}: not finite: {'; '.join(found)}. No weight was changed; lower optim.lr, "
        "raise optim.warm_up, or look at those samples, then run the same command to go on from the last checkpoint"
    )


def over_all_ranks(terms: Iterable[Term]) -> list[Term]:
    """One term per name and modality with the rows of all micro-batches and ranks: what a log is computed from."""
    own = [replace(t, values=t.values.detach().cpu(), level=None if t.level is None else t.level.cpu()) for t in terms]
    groups: dict[str, list[Term]] = {}
    for term in (term for part in ranks.gather(own) for term in part):
        groups.setdefault(term.key, []).append(term)
    out: list[Term] = []
    for parts in groups.values():
        levels = [p.level for p in parts if p.level is not None]
        level = torch.cat(levels) if len(levels) == len(parts) else None
        out.append(replace(parts[0], values=torch.cat([p.values for p in parts]), level=level))
    return out


@torch.no_grad()
def evaluate_terms(objective: Objective, batches: list[AVBatch], seed: int, models: Models) -> dict[str, float]:
    """Held-out means of the student's terms. Fixed: batches, noise, levels; only the weights differ between calls."""
    sums: dict[str, float] = {}
    for batch in batches:
        terms = objective(models, batch, StepInfo(seed=seed, step=0, stage_step=0))["student"]
        counts = batch.samples != FILLER
        for term in terms:
            sums[term.key] = sums.get(term.key, 0.0) + float(term.values[counts].mean(-1).sum())
    rows = sum(int((batch.samples != FILLER).sum()) for batch in batches)
    return ranks.mean_numbers({key: value / max(1, rows) for key, value in sums.items()}, rows)


class Meter:
    """Speed since it was last read, and the time spent waiting for data."""

    def __init__(self) -> None:
        self._since = self._resumed = time.perf_counter()
        self._samples = self._tokens = 0

    def waited(self) -> float:
        """Seconds between the end of the last step and now, when its batch is there."""
        return time.perf_counter() - self._resumed

    def resume(self) -> None:
        self._resumed = time.perf_counter()

    def add(self, samples: int, tokens: int) -> None:
        self._samples += samples
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Over all ranks."""
        elapsed = time.perf_counter() - self._since
        world = ranks.world()
        out = {"samples_per_s": world * self._samples / elapsed, "tokens_per_s": world * self._tokens / elapsed}
        self._since, self._samples, self._tokens = time.perf_counter(), 0, 0
        return out


def line(progress: Progress, config: LoopConfig, log: Mapping[str, float]) -> str:
    """One line for people: step, losses, speed, time left."""
    parts = [f"{config.name} {progress.step}/{config.steps}"]
    parts += [f"{key} {value:.4f}" for key, value in log.items() if key.count("/") == 1 and _is_loss(key)]
    if not log:
        parts += [f"held_out/{key} {value:.4f}" for key, value in progress.first.items()]
    speed = log.get("samples_per_s", 0.0)
    if speed > 0:
        left = (config.steps - progress.step) * config.batch / speed
        parts += [f"{speed:.1f} samples/s", f"{math.ceil(left)} s left"]
    return "  ".join(parts)


def _is_loss(key: str) -> bool:
    return not key.startswith(("grad_norm/", "lr/"))
