from dataclasses import dataclass, field
from fractions import Fraction

from mfcore.codecs.stats import LatentStats
from mfcore.model.config import ModelConfig
from mfcore.solver import Mode
from mfcore.timeline import LatentClock, Timeline
from workflows.config.stage_names import Stage


@dataclass(frozen=True, kw_only=True)
class ExportMetadata:
    """``model.json``: what stands beside the weights, so that generation needs no dataset."""

    model: ModelConfig
    stage: Stage
    codecs: dict[str, str]  # modality -> codec id
    stats: dict[str, LatentStats]  # what the latents were whitened with
    clocks: dict[str, LatentClock]
    chunk_seconds: Fraction
    text_codec: str  # id of the text encoder
    shift: dict[str, float]  # time shift per modality that the noise levels of training and sampling go through
    dataset: str  # fingerprint of the preprocessing configuration that made the latents
    folders: dict[str, str] = field(default_factory=dict)  # modality or "text" -> where pretrained codecs' weights were
    few_steps: int | None = None  # most per chunk that the few-step mode was trained for; None: not on record

    def step_count_warning(self, mode: Mode, steps: int) -> str | None:
        """What speaks against so many steps: the few-step mode knows no shorter ones than it was trained for."""
        if mode == "multi" or self.few_steps is None or steps <= self.few_steps:
            return None
        return (
            f"the few-step mode was trained for up to {self.few_steps} steps per chunk, and {steps} lead away from the "
            f"data: choose at most {self.few_steps}, or the multi-step mode"
        )

    @property
    def timeline(self) -> Timeline:
        return Timeline(clocks=self.clocks, chunk_seconds=self.chunk_seconds)
