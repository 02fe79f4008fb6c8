"""Metadata of an export, stored as ``model.json``."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from mfcore.codecs.stats import LatentStats
from mfcore.model.config import ModelConfig
from mfcore.solver import Mode
from mfcore.timeline import LatentClock, Timeline
from workflows.config.stage_names import Stage


@dataclass(frozen=True, kw_only=True)
class ExportMetadata:
    """Content of ``model.json``: all that generation needs in addition to the weights."""

    model: ModelConfig
    stage: Stage
    codecs: dict[str, str]  # modality -> codec id
    stats: dict[str, LatentStats]  # of the whitening
    clocks: dict[str, LatentClock]
    chunk_seconds: Fraction
    text_codec: str  # id of the text encoder
    shift: dict[str, float]  # time shift of the noise levels, per modality
    dataset: str  # fingerprint of the preprocessing configuration
    folders: dict[str, str] = field(default_factory=dict)  # modality or "text" -> folder of pretrained codec weights
    transcript: Literal["words", "phonemes"] = "words"  # entries of the transcripts of the training set
    world: str | None = None  # synthetic world of the training set, such as toyworld-english/1
    few_steps: int | None = None  # most steps per chunk in the training of the few-step mode; None: unknown

    def step_count_warning(self, mode: Mode, steps: int) -> str | None:
        """Return a warning if ``steps`` exceeds the training of the few-step mode, else None."""
        if mode == "multi" or self.few_steps is None or steps <= self.few_steps:
            return None
        return (
            f"the few-step mode was trained for up to {self.few_steps} steps per chunk, and {steps} steps degrade "
            f"quality: choose at most {self.few_steps}, or the multi-step mode"
        )

    @property
    def timeline(self) -> Timeline:
        """Clocks and chunk length of the latents."""
        return Timeline(clocks=self.clocks, chunk_seconds=self.chunk_seconds)
