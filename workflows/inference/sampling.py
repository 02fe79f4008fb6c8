"""Sampling parameters and their defaults by stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from mfcore.errors import UserInputError, check_range
from mfcore.solver import (
    Mode,
    Renoising,
    SamplerName,
    Schedule,
    StepNoise,
    num_function_evaluations,
    sampler_renoising,
    sampler_schedule,
)

DEFAULT_MULTI_STEPS = 50
DEFAULT_GUIDANCE = 1.5  # of the multi-step mode
DEFAULT_FEW_STEPS = 4
DEFAULT_FEW_SAMPLER: SamplerName = "renoise"
MAX_STEPS = 10_000
MAX_GUIDANCE = 100.0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a chunk."""

    mode: Mode = "few"
    steps: int = DEFAULT_FEW_STEPS
    guidance: float = 1.0  # weight of the multi-step mode; 1 in few-step mode
    trust: float | None = None  # label of the generated history; None: 1 in few-step mode, no label in multi-step mode
    seed: int = 0
    sampler: SamplerName = "deterministic"  # others need the few-step mode

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, MAX_STEPS)
        check_range("guidance", self.guidance, 0, MAX_GUIDANCE)
        check_range("trust", self.trust, 0, 1)
        if self.mode not in ("few", "multi"):
            raise UserInputError(f"mode {self.mode!r}: unknown. Use few or multi.")
        if self.sampler not in get_args(SamplerName):
            raise UserInputError(f"sampler {self.sampler!r}: unknown. Use {', '.join(get_args(SamplerName))}.")
        if self.sampler != "deterministic" and self.mode != "few":
            raise UserInputError(f"sampler {self.sampler}: needs the few-step mode. Use deterministic.")

    @property
    def num_function_evaluations(self) -> int:
        """Return the number of function evaluations per chunk."""
        return num_function_evaluations(self.steps, self.guidance)

    @property
    def trust_label(self) -> float | None:
        """Return the trust label with its default by mode."""
        return self.trust if self.trust is not None else (1.0 if self.mode == "few" else None)

    def schedule(self, shift: Mapping[str, float]) -> Schedule:
        """Return the levels of the steps of a chunk, for the time shift per modality."""
        return sampler_schedule(self.sampler, self.steps, shift)

    def renoising(self, noise: StepNoise) -> Renoising | None:
        """Return the steps that are followed by ``noise``; None: none."""
        return sampler_renoising(self.sampler, self.steps, noise)


def resolve_sampling_params(
    stage: str,
    *,
    mode: Mode | None,
    steps: int | None,
    guidance: float | None,
    trust: float | None,
    seed: int,
    sampler: SamplerName | None = None,
) -> SamplingParams:
    """Fill in the defaults of a stage: only the mutual stage trains the few-step mode.

    Raises ValueError for an invalid mode or sampler, or fewer than one step.
    """
    mode = mode or ("few" if stage == "mutual" else "multi")
    return SamplingParams(
        mode=mode,
        steps=steps if steps is not None else (DEFAULT_FEW_STEPS if mode == "few" else DEFAULT_MULTI_STEPS),
        guidance=guidance if guidance is not None else (1.0 if mode == "few" else DEFAULT_GUIDANCE),
        trust=trust,
        seed=seed,
        sampler=sampler or (DEFAULT_FEW_SAMPLER if mode == "few" else "deterministic"),
    )
