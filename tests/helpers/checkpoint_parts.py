"""Parts of a checkpoint of a small audio run."""

from fractions import Fraction
from pathlib import Path

from mfcore.codecs.stats import LatentStats
from mfcore.ema import Ema, EmaConfig
from mfcore.model.transformer import build_model
from mfcore.optim import OptimConfig
from mfcore.timeline import audio_clock
from tests.helpers.tiny_model import model_config
from workflows.checkpoints.model_card import ExportMetadata
from workflows.checkpoints.store import CheckpointStore
from workflows.config.run import EngineConfig
from workflows.training.checkpointing import CheckpointWriter
from workflows.training.engines.base import build_engine
from workflows.training.progress import Progress

CARD = ExportMetadata(
    model=model_config("audio"),
    stage="audio",
    codecs={"audio": "mel"},
    stats={"audio": LatentStats(mean=(0.0,) * 5, std=(1.0,) * 5)},
    clocks={"audio": audio_clock(16000, 1024)},
    chunk_seconds=Fraction(1, 2),
    text_codec="words",
    shift={"audio": 1.0},
    dataset="f1",
)
PROGRESS = Progress(step=3, samples_seen=12, first={"a": 1.0}, last={"a": 0.5})


def list_checkpoints(root: str | Path) -> list[Path]:
    """Return the complete checkpoints in a local folder, oldest first."""
    return [Path(root, name) for name in CheckpointStore(root).list_complete()]


def parts(seed: int):
    net = build_model(CARD.model, seed)
    ema = Ema(build_model(CARD.model, seed + 10), EmaConfig())
    return {"student": build_engine(net, OptimConfig(), EngineConfig(kind="torch", workers=1))}, ema


def writer(root: Path | str | CheckpointStore, engines, ema, keep: int = 2, *, ours: bool = True) -> CheckpointWriter:
    return CheckpointWriter(
        root if isinstance(root, CheckpointStore) else CheckpointStore(root),
        engines=engines,
        ema=ema,
        metadata=CARD,
        record=lambda _: {"stage": "audio"},
        keep=keep,
        may_write=lambda: ours,
    )
