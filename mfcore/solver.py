"""Solver steps, schedules of noise levels, and guidance.

Shapes: B batch, K chunks of a pass, S steps. A schedule holds S + 1 levels per modality, from the start down to 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mfcore.device import to_device_of
from mfcore.flow import add_noise, move_streams, shift_time
from mfcore.types import Condition, KVCache, NoiseLevels, Stream, Streams, VelocityModel

Mode = Literal["few", "multi"]
"""few: average velocity over the whole step (r = next level). multi: instantaneous velocity (r = t), an Euler step."""

SamplerName = Literal["deterministic", "renoise", "mixed"]
"""deterministic: each step ends at the next level. renoise: each step ends at t = 0, and noise raises the state to the
next level (multistep consistency sampling). mixed: the first half of the steps deterministic, the others renoise."""

Schedule = Mapping[str, Float[Tensor, " S+1"]]

StepNoise = Callable[[Streams, int], Mapping[str, Tensor]]
"""Return standard normal noise in the shape of each stream of a state, for the step that starts from it."""

RENOISE_INDICES: Mapping[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (1.0, 0.5),
    3: (1.0, 0.5, 0.25),
    4: (1.0, 0.5, 0.25, 0.25),
    8: (1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125),
}
"""Schedule indices from which the steps of the renoise sampler start, by number of steps."""


def schedule(steps: int, shift: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the levels t_j = shift(1 - j / S), j = 0 .. S, per modality."""
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, got {steps}")
    indices = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return {m: shift_time(indices, s).float() for m, s in shift.items()}


def sampler_schedule(sampler: SamplerName, steps: int, shift: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the levels from which the steps of a sampler start, then 0, per modality.

    The renoise sampler starts its steps at ``RENOISE_INDICES``, or like the others where that has no entry.
    """
    if sampler != "renoise" or steps not in RENOISE_INDICES:
        return schedule(steps, shift)
    indices = torch.tensor([*RENOISE_INDICES[steps], 0.0], dtype=torch.float64)
    return {m: shift_time(indices, s).float() for m, s in shift.items()}


def single_step_schedule(index: float, shift: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the schedule of one step from ``shift(index)`` to 0."""
    indices = torch.tensor([index, 0.0], dtype=torch.float64)
    return {m: shift_time(indices, s).float() for m, s in shift.items()}


def constant_levels(like: Streams, value: Mapping[str, Tensor | float]) -> dict[str, Float[Tensor, "B K"]]:
    """Return one level, a scalar or one per row, for every chunk of ``like``."""
    levels: dict[str, Tensor] = {}
    for m, stream in like.items():
        batch = stream.latents.shape[0]
        chunks = int(stream.chunk[-1] - stream.chunk[0]) + 1
        v = value[m]
        if isinstance(v, Tensor) and v.ndim:
            levels[m] = to_device_of(v, stream.latents, torch.float32).reshape(-1, 1).expand(batch, chunks)
        else:
            levels[m] = torch.full((batch, chunks), float(v), device=stream.latents.device)
    return levels


@dataclass(frozen=True, kw_only=True)
class DenoiserContext:
    """Network with the conditions and the KV cache of a batch of clips. A value: methods return a new context.

    With ``guidance`` w other than 1, velocities are u_null + w (u - u_null). The null branch has a separate cache.
    """

    model: VelocityModel
    cond: Condition
    guidance: float = 1.0
    cache: KVCache | None = None
    null_cache: KVCache | None = None

    @cached_property
    def null_condition(self) -> Condition:
        """Condition of the null branch, computed once."""
        return self.cond.unconditional()

    def prefill(self) -> "DenoiserContext":
        """Return the context with the sink (first frame, voice) in the cache.

        The sink reads no text, so both branches of guidance share it.
        """
        _, sink = self.model({}, {}, {}, self.cond, store=True)
        return replace(self, cache=sink, null_cache=sink if self.guidance != 1.0 else None)

    def append_history(self, clean: Streams, trust: Float[Tensor, " B"] | None) -> "DenoiserContext":
        """Return the context with the clean chunks ``clean``, of history strength ``trust``, in the cache."""
        if self.cache is None:
            return self.prefill().append_history(clean, trust)
        if not clean:
            return self
        zero = constant_levels(clean, dict.fromkeys(clean, 0.0))
        _, cache = self.model(clean, zero, zero, self.cond, cache=self.cache, store=True, trust=trust)
        null = None
        if self.guidance != 1.0:
            _, null = self.model(clean, zero, zero, self.null_condition, cache=self.null_cache, store=True, trust=trust)
        return replace(self, cache=cache, null_cache=null)

    def velocity(self, x: Streams, t: NoiseLevels, r: NoiseLevels) -> dict[str, Tensor]:
        """Return the guided velocity of every chunk of ``x``."""
        u, _ = self.model(x, t, r, self.cond, cache=self.cache)
        if self.guidance == 1.0:
            return u
        null, _ = self.model(x, t, r, self.null_condition, cache=self.null_cache)
        return {m: null[m] + self.guidance * (u[m] - null[m]) for m in u}

    def map_caches(self, function: Callable[[KVCache], KVCache]) -> "DenoiserContext":
        """Apply ``function`` to each cache."""
        return replace(
            self,
            cache=self.cache and function(self.cache),
            null_cache=self.null_cache and function(self.null_cache),
        )

    def evict_before(self, chunk: int) -> "DenoiserContext":
        """Drop the chunks that ``chunk`` and later ones cannot see."""
        return self.map_caches(lambda cache: cache.evict_before(chunk))

    def detach(self) -> "DenoiserContext":
        """Return the context with caches without gradient."""
        return self.map_caches(lambda cache: cache.detach())

    def shared_passes(self) -> "DenoiserContext":
        """Return the context for several passes over the same chunks; see ``KVCache.shared_passes``."""
        return self.map_caches(lambda cache: cache.shared_passes())

    def snapshot(self) -> "DenoiserContext":
        """Return a context that later passes do not change, to continue from any number of times."""
        return self.map_caches(lambda cache: cache.snapshot())

    def rows(self, index: Tensor) -> "DenoiserContext":
        """Select rows of the batch."""
        return replace(self.map_caches(lambda cache: cache.rows(index)), cond=self.cond.rows(index))

    @staticmethod
    def stack(parts: Sequence["DenoiserContext"]) -> "DenoiserContext":
        """Concatenate the rows of contexts with one network and the same cached chunks, without guidance."""
        caches = [part.cache for part in parts if part.cache is not None]
        assert len(caches) == len(parts)
        return DenoiserContext(
            model=parts[0].model,
            cond=Condition.stack([part.cond for part in parts]),
            cache=type(caches[0]).stack(caches),
        )

    def unguided(self) -> "DenoiserContext":
        """Return the context without guidance."""
        return replace(self, guidance=1.0, null_cache=None)


@dataclass(frozen=True, kw_only=True)
class VelocityQuery:
    """States and levels at which the velocity of some rows of a context is evaluated."""

    rows: Int64[Tensor, " B"]  # rows of the context; may repeat
    x: Streams
    t: NoiseLevels
    r: NoiseLevels


def query_velocities(context: DenoiserContext, queries: Sequence[VelocityQuery]) -> list[dict[str, Tensor]]:
    """Return the velocities of each query, computed in one forward pass."""
    sizes = [len(q.rows) for q in queries]
    x = {m: s.with_latents(torch.cat([q.x[m].latents for q in queries])) for m, s in queries[0].x.items()}
    t = {m: torch.cat([q.t[m] for q in queries]) for m in x}
    r = {m: torch.cat([q.r[m] for q in queries]) for m in x}
    u = context.rows(torch.cat([q.rows for q in queries])).velocity(x, t, r)
    split = {m: u[m].split(sizes) for m in x}
    return [{m: split[m][i] for m in x} for i in range(len(queries))]


def history_of(streams: Streams) -> dict[str, Stream]:
    """Return the history that the chunks of a clip can see: all chunks but the last."""
    chunk = next(iter(streams.values())).chunk
    first, last = int(chunk[0]), int(chunk[-1])
    return {m: s.chunks(first, last) for m, s in streams.items()} if last > first else {}


def solver_step(context: DenoiserContext, x: Streams, t: NoiseLevels, r: NoiseLevels, *, mode: Mode) -> Streams:
    """Step from level t down to level r with one evaluation, two with guidance."""
    u = context.velocity(x, t, r if mode == "few" else t)
    return move_streams(x, u, t, r)


@dataclass(frozen=True, kw_only=True)
class Renoising:
    """Steps that end at t = 0, each followed by noise up to the next level.

    Independent noise cancels part of the errors of earlier steps. Trajectories are not those of the flow.
    """

    noise: StepNoise
    first_step: int = 0  # earlier steps end at the next level


def sampler_renoising(sampler: SamplerName, steps: int, noise: StepNoise) -> Renoising | None:
    """Return the steps of a sampler that are followed by ``noise``; None: none."""
    if sampler == "deterministic":
        return None
    return Renoising(noise=noise, first_step=steps // 2 if sampler == "mixed" else 0)


def denoise(
    context: DenoiserContext,
    x: Streams,
    schedule: Schedule,
    *,
    mode: Mode = "few",
    exit_step: int | None = None,
    renoising: Renoising | None = None,
) -> tuple[dict[str, Stream], dict[str, Stream] | None]:
    """Run all steps of ``schedule`` from ``x``. Returns the clean streams, and the state at ``exit_step`` if given.

    If gradients are enabled, only steps from ``exit_step`` on have one. The cache is detached. ``renoising`` selects
    the renoise sampler for the few-step mode.
    """
    state = dict(x)
    exit_state = None
    detached = context.detach().shared_passes()
    steps = len(next(iter(schedule.values()))) - 1
    for j in range(steps):
        exit_state = state if j == exit_step else exit_state
        t = constant_levels(state, {m: levels[j] for m, levels in schedule.items()})
        r = constant_levels(state, {m: levels[j + 1] for m, levels in schedule.items()})
        jump = renoising if renoising is not None and j >= renoising.first_step and j + 1 < steps else None
        end = r if jump is None else constant_levels(state, dict.fromkeys(state, 0.0))
        with torch.set_grad_enabled(torch.is_grad_enabled() and exit_step is not None and j >= exit_step):
            state = dict(solver_step(detached, state, t, end, mode=mode))
            if jump is not None:
                state = add_noise(state, jump.noise(state, j + 1), r)
    return state, exit_state


def num_function_evaluations(steps: int, guidance: float) -> int:
    """Return the NFE of one chunk. Guidance doubles it; the pass that writes the cache is not counted."""
    return steps * (1 if guidance == 1.0 else 2)
