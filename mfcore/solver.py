"""One solver step, schedules of noise levels, and guidance.

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
from mfcore.flow import move_streams, shift_time
from mfcore.types import Condition, KVCache, NoiseLevels, Stream, Streams, VelocityModel

Mode = Literal["few", "multi"]
"""few: average velocity over the whole step (r = next level). multi: instantaneous velocity (r = t), an Euler step."""

Schedule = Mapping[str, Float[Tensor, " S+1"]]


def schedule(steps: int, shift: Mapping[str, float]) -> dict[str, Tensor]:
    """t_j = shift(1 - j / S), per modality."""
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, got {steps}")
    line = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return {m: shift_time(line, s).float() for m, s in shift.items()}


def single_step_schedule(index: float, shift: Mapping[str, float]) -> dict[str, Tensor]:
    """The single call that finishes from ``shift(index)``: levels (shift(index), 0)."""
    line = torch.tensor([index, 0.0], dtype=torch.float64)
    return {m: shift_time(line, s).float() for m, s in shift.items()}


def constant_levels(like: Streams, value: Mapping[str, Tensor | float]) -> dict[str, Float[Tensor, "B K"]]:
    """One level (a scalar, or one per row) for every chunk of ``like``."""
    out: dict[str, Tensor] = {}
    for m, stream in like.items():
        batch, chunks = stream.latents.shape[0], int(stream.chunk[-1] - stream.chunk[0]) + 1
        v = value[m]
        if isinstance(v, Tensor) and v.ndim:
            out[m] = to_device_of(v, stream.latents, torch.float32).reshape(-1, 1).expand(batch, chunks)
        else:
            out[m] = torch.full((batch, chunks), float(v), device=stream.latents.device)
    return out


@dataclass(frozen=True, kw_only=True)
class DenoiserContext:
    """A network together with what a clip is conditioned on and what it remembers; a value, extended by ``remember``.

    With ``guidance`` w other than 1 a second memory is kept for the null branch, whose history has its own keys and
    values, and velocities are u_null + w (u - u_null).
    """

    model: VelocityModel
    cond: Condition
    guidance: float = 1.0
    memory: KVCache | None = None
    null_memory: KVCache | None = None

    @cached_property
    def null_condition(self) -> Condition:
        """The condition of the null branch."""
        return self.cond.unconditional()

    def prefill(self) -> "DenoiserContext":
        """With the sink (first frame, voice) in memory. It reads no text, so both branches of guidance share it."""
        _, sink = self.model({}, {}, {}, self.cond, None, store=True)
        return replace(self, memory=sink, null_memory=sink if self.guidance != 1.0 else None)

    def append_history(self, clean: Streams, trust: Float[Tensor, " B"] | None) -> "DenoiserContext":
        """With the clean chunks ``clean``, of history strength ``trust``, in memory."""
        if self.memory is None:
            return self.prefill().append_history(clean, trust)
        if not clean:
            return self
        zero = constant_levels(clean, dict.fromkeys(clean, 0.0))
        _, memory = self.model(clean, zero, zero, self.cond, self.memory, store=True, trust=trust)
        null = None
        if self.guidance != 1.0:
            _, null = self.model(clean, zero, zero, self.null_condition, self.null_memory, store=True, trust=trust)
        return replace(self, memory=memory, null_memory=null)

    def velocity(self, x: Streams, t: NoiseLevels, r: NoiseLevels) -> dict[str, Tensor]:
        """Guided velocity of every chunk of ``x``."""
        u, _ = self.model(x, t, r, self.cond, self.memory)
        if self.guidance == 1.0:
            return u
        null, _ = self.model(x, t, r, self.null_condition, self.null_memory)
        return {m: null[m] + self.guidance * (u[m] - null[m]) for m in u}

    def map_memories(self, change: Callable[[KVCache], KVCache]) -> "DenoiserContext":
        """With each of its memories changed."""
        return replace(
            self,
            memory=self.memory and change(self.memory),
            null_memory=self.null_memory and change(self.null_memory),
        )

    def evict_before(self, chunk: int) -> "DenoiserContext":
        """Forget what ``chunk`` and later ones cannot see."""
        return self.map_memories(lambda memory: memory.evict_before(chunk))

    def detach(self) -> "DenoiserContext":
        return self.map_memories(lambda memory: memory.detach())

    def shared_passes(self) -> "DenoiserContext":
        """Return the context for several passes over the same chunks; see ``KVCache.shared_passes``."""
        return self.map_memories(lambda memory: memory.shared_passes())

    def snapshot(self) -> "DenoiserContext":
        """To continue from here, more than once if need be: what is remembered is not changed by later passes."""
        return self.map_memories(lambda memory: memory.snapshot())

    def rows(self, index: Tensor) -> "DenoiserContext":
        """The same for some rows of the batch."""
        return replace(self.map_memories(lambda memory: memory.rows(index)), cond=self.cond.rows(index))

    @staticmethod
    def stack(parts: Sequence["DenoiserContext"]) -> "DenoiserContext":
        """The rows of all parts, one after the other, without guidance: one network, the same chunks remembered."""
        memories = [part.memory for part in parts if part.memory is not None]
        assert len(memories) == len(parts)
        return DenoiserContext(
            model=parts[0].model,
            cond=Condition.stack([part.cond for part in parts]),
            memory=type(memories[0]).stack(memories),
        )

    def unguided(self) -> "DenoiserContext":
        """Without guidance."""
        return replace(self, guidance=1.0, null_memory=None)


@dataclass(frozen=True, kw_only=True)
class VelocityQuery:
    """States and levels at which some rows of a context are asked for their velocity."""

    rows: Int64[Tensor, " B"]  # of the context; a row may be asked several times
    x: Streams
    t: NoiseLevels
    r: NoiseLevels


def query_velocities(context: DenoiserContext, queries: Sequence[VelocityQuery]) -> list[dict[str, Tensor]]:
    """The answer to each query, by one forward pass of all their rows."""
    sizes = [len(q.rows) for q in queries]
    x = {m: s.with_latents(torch.cat([q.x[m].latents for q in queries])) for m, s in queries[0].x.items()}
    t = {m: torch.cat([q.t[m] for q in queries]) for m in x}
    r = {m: torch.cat([q.r[m] for q in queries]) for m in x}
    u = context.rows(torch.cat([q.rows for q in queries])).velocity(x, t, r)
    parts = zip(*(u[m].split(sizes) for m in x), strict=True)
    return [dict(zip(x, part, strict=True)) for part in parts]


def history_of(streams: Streams) -> dict[str, Stream]:
    """The history that the chunks of a clip can see: all but its last chunk, which none of them comes after."""
    some = next(iter(streams.values())).chunk
    first, last = int(some[0]), int(some[-1])
    return {m: s.chunks(first, last) for m, s in streams.items()} if last > first else {}


def solver_step(context: DenoiserContext, x: Streams, t: NoiseLevels, r: NoiseLevels, mode: Mode) -> Streams:
    """From level t down to level r by one evaluation (two with guidance)."""
    u = context.velocity(x, t, r if mode == "few" else t)
    return move_streams(x, u, t, r)


def denoise(
    context: DenoiserContext, x: Streams, plan: Schedule, *, mode: Mode = "few", exit_step: int | None = None
) -> tuple[dict[str, Stream], dict[str, Stream] | None]:
    """All steps of ``plan`` from its first level, at which ``x`` is; beside it the state at the exit step t_j.

    Gradient, where it is enabled, runs from ``exit_step`` on (without one: nowhere) and reads memory as data.
    """
    now, stash, read = dict(x), None, context.detach().shared_passes()
    for j in range(len(next(iter(plan.values()))) - 1):
        stash = now if j == exit_step else stash
        t, r = (constant_levels(now, {m: line[i] for m, line in plan.items()}) for i in (j, j + 1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and exit_step is not None and j >= exit_step):
            now = dict(solver_step(read, now, t, r, mode))
    return now, stash


def num_function_evaluations(steps: int, guidance: float) -> int:
    """NFE of one chunk: denoising evaluations; guidance doubles them; the cache-writing pass is reported apart."""
    return steps * (1 if guidance == 1.0 else 2)
