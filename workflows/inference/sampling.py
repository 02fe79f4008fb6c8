from dataclasses import dataclass

from mfcore.solver import Mode, num_function_evaluations

DEFAULT_MULTI_STEPS = 50
DEFAULT_GUIDANCE = 1.5  # of the multi-step mode
DEFAULT_FEW_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How chunks are sampled."""

    mode: Mode = "few"
    steps: int = DEFAULT_FEW_STEPS
    guidance: float = 1.0  # of the multi-step mode; the few-step mode has it built in
    trust: float | None = None  # label of the generated history; None: 1 in few-step mode, no label in multi-step mode
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}: at least one step is needed")
        if self.mode not in ("few", "multi"):
            raise ValueError(f"unknown mode {self.mode!r}: choose few or multi")

    @property
    def num_function_evaluations(self) -> int:
        """Denoising evaluations per chunk."""
        return num_function_evaluations(self.steps, self.guidance)

    @property
    def trust_label(self) -> float | None:
        """The trust label in force."""
        return self.trust if self.trust is not None else (1.0 if self.mode == "few" else None)


def resolve_sampling_params(
    stage: str, *, mode: Mode | None, steps: int | None, guidance: float | None, trust: float | None, seed: int
) -> SamplingParams:
    """Defaults by stage: only the mutual stage has trained the few-step mode. ValueError for fewer than one step."""
    if steps is not None and steps < 1:
        raise ValueError(f"--steps {steps}: a chunk needs at least 1 solver step")
    mode = mode or ("few" if stage == "mutual" else "multi")
    return SamplingParams(
        mode=mode,
        steps=steps or (DEFAULT_FEW_STEPS if mode == "few" else DEFAULT_MULTI_STEPS),
        guidance=guidance if guidance is not None else (1.0 if mode == "few" else DEFAULT_GUIDANCE),
        trust=trust,
        seed=seed,
    )
