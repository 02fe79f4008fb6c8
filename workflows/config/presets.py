"""Presets: complete configurations by size, as functions of the stage and the latent shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Literal

from mfcore.ema import EmaConfig
from mfcore.errors import UserInputError
from mfcore.flow import TimeConfig
from mfcore.model.config import BranchConfig, ModelConfig
from mfcore.model.lora import FakeScoreConfig
from mfcore.objectives.flow_matching import FlowMatchingConfig
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.optim import OptimConfig
from mfcore.types import AUDIO, VIDEO
from workflows.config.latent_shapes import LatentShapes
from workflows.config.run import CheckpointConfig, DataConfig, EngineConfig, RunConfig
from workflows.config.stage_names import Stage
from workflows.config.stages import STAGES

CROSS_BIAS = -4.0  # a coupled network starts close to its uni-modal parents


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Network size and sampling settings of one preset."""

    dim: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0  # feed-forward width over dim
    patch: tuple[int, int]  # latent positions merged into a token, height and width, where the size allows
    window_chunks: int
    longest: int  # chunks of the longest training clip
    shift: Mapping[str, float]
    data_std: Mapping[str, float | None] = field(default_factory=lambda: {VIDEO: 0.5, AUDIO: 0.5})
    layout: Literal["own", "wan"] = "own"
    word_heads: int | None = None
    rope_seconds_scale: float = 8.0
    attention: Literal["sdpa", "flex"] = "flex"
    learned_std: bool = False


def _model(stage: Stage, shapes: LatentShapes, size: ModelSize) -> ModelConfig:
    patches = {m: (gcd(size.patch[0], h), gcd(size.patch[1], w)) for m, (h, w) in shapes.size.items()}
    return ModelConfig(
        branches={
            m: BranchConfig(
                channels=shapes.channels[m],
                size=shapes.size[m],
                patch=patches[m],
                data_std=size.data_std[m],
                anchor=shapes.static_channels[m] if size.data_std[m] is not None else 0,
                learned_std=size.learned_std,
            )
            for m in STAGES[stage].modalities
        },
        dim=size.dim,
        layers=size.layers,
        mlp_ratio=size.mlp_ratio,
        heads=size.heads,
        word_heads=size.word_heads,
        attention=size.attention,
        layout=size.layout,
        local_start=size.layout == "own",
        chunk_phase=True,
        cross_bias=CROSS_BIAS if size.layout == "own" and len(STAGES[stage].modalities) > 1 else None,
        rope_seconds_scale=size.rope_seconds_scale,
        text_dim=shapes.text_dim,
        chunk_seconds=shapes.chunk_seconds,
        window_chunks=size.window_chunks,
    )


def _lengths(shapes: LatentShapes, size: ModelSize) -> tuple[int, int]:
    """Return the fewest and most chunks of a training clip; the most exceed the window, to train its truncation."""
    return min(3, shapes.chunks), max(1, min(size.longest, shapes.chunks))


TINY_SIZE = ModelSize(
    dim=128,
    layers=3,
    heads=4,
    mlp_ratio=2.0,
    patch=(2, 8),  # horizontal bands: do not split eyes, mouth and hands
    window_chunks=4,
    longest=8,
    shift={VIDEO: 3.0, AUDIO: 3.0},
    data_std={VIDEO: 0.15, AUDIO: 0.2},
    attention="sdpa",
)


def _tiny_mutual(time: TimeConfig) -> MutualConfig:
    """Return the objective of the mutual stage of the preset ``tiny``."""
    return MutualConfig(
        time=time,
        finest=3,  # finer levels, which no sampler uses, cost training time
        strengths=(2, 3),
        rollout_steps=(4,),
        guidance=1.25,
        shortcut_weight=2.0,  # its loss is near 0.03, flow matching near 0.5
        dmd_weight=0.02,  # its normalized gradient has order 1 and would dominate both
        real_until=115,  # a rollout triples the step time
        free_from=120,
        fake_from=120,
        dmd_from=128,
        dmd_ramp=5,
    )


def tiny(stage: Stage, shapes: LatentShapes) -> RunConfig:
    """Return the preset for the toy world on a CPU: minutes of training.

    Sizes: docs/dev/lab-notes/2026-11-20-tiny-network-size.md.
    """
    time = TimeConfig(shift={m: TINY_SIZE.shift[m] for m in STAGES[stage].modalities})
    model, engine = _model(stage, shapes, TINY_SIZE), EngineConfig(zero_stage=1, workers=2)
    data = DataConfig(batch=16, chunks=_lengths(shapes, TINY_SIZE), whitening={VIDEO: 0.3, AUDIO: 0.5})
    if stage == "mutual":
        return RunConfig(
            stage=stage,
            steps=140,
            model=model,
            objective=_tiny_mutual(time),
            optim=OptimConfig(lr=2e-3, warm_up=10, final=0.05),
            fake_optim=OptimConfig(lr=2e-3, warm_up=5),
            ema=EmaConfig(decay=0.9),
            data=replace(data, batch=8, chunks=(data.chunks[0], min(6, data.chunks[1]))),
            engine=engine,
            checkpoint=CheckpointConfig(every=40 * 8),
            log_every=5,
            eval_every=30,
        )
    return RunConfig(
        stage=stage,
        steps={"video": 240, "audio": 300, "joint": 200}[stage],
        model=model,
        objective=FlowMatchingConfig(time=time),
        optim=OptimConfig(lr=6e-3 if stage != "joint" else 4e-3, warm_up=30, clip=1.0, final=0.1),
        ema=EmaConfig(decay=0.98),
        data=data,
        engine=engine,
        checkpoint=CheckpointConfig(every=200 * data.batch),
        log_every=20,
        eval_every=100,
    )


def toy(stage: Stage, shapes: LatentShapes) -> RunConfig:
    """Return the preset for the toy world that speaks English: hours of training on a CPU.

    The recipe of ``tiny`` with a larger network, a learned spread of the latents, and about ten times the steps.
    """
    size = replace(TINY_SIZE, dim=160, layers=4, heads=5, learned_std=True)
    config = tiny(stage, shapes)
    config = replace(
        config,
        model=_model(stage, shapes, size),
        ema=EmaConfig(decay=0.995),
        optim=replace(config.optim, lr=4e-3 if stage != "joint" else 3e-3),
        checkpoint=replace(config.checkpoint, every=300 * config.data.batch),
        eval_every=300,
    )
    if not isinstance(config.objective, MutualConfig):
        return replace(config, steps={"video": 3000, "audio": 2400, "joint": 2400}[stage])
    objective = replace(config.objective, real_until=280, free_from=300, fake_from=300, dmd_from=330, dmd_ramp=30)
    return replace(
        config,
        steps=400,
        objective=objective,
        optim=OptimConfig(lr=1e-3, warm_up=30, final=0.05),
        ema=EmaConfig(decay=0.98),
        eval_every=100,
    )


def _recipe(
    stage: Stage, shapes: LatentShapes, size: ModelSize, *, batch: int, steps: dict[Stage, int], lr: float
) -> RunConfig:
    """Return the recipe of the paper: AdamW 0.9/0.95, decay 0.02, clip 0.5, EMA 0.999, 0.99 in the mutual stage."""
    time = TimeConfig(shift={m: size.shift[m] for m in STAGES[stage].modalities})
    mutual = MutualConfig(
        time=time, guidance=5.0, real_until=1000, free_from=3000, fake_from=3000, dmd_from=3200, dmd_ramp=1000
    )
    return RunConfig(
        stage=stage,
        steps=steps[stage],
        model=_model(stage, shapes, size),
        objective=mutual if stage == "mutual" else FlowMatchingConfig(time=time),
        optim=OptimConfig(lr=lr, warm_up=1000),
        fake=FakeScoreConfig(rank=size.dim // 32, gain=16.0),
        fake_optim=OptimConfig(lr=4 * lr, warm_up=200) if stage == "mutual" else None,
        ema=EmaConfig(decay=0.99 if stage == "mutual" else 0.999),
        data=DataConfig(batch=batch, micro=4, chunks=_lengths(shapes, size)),
        engine=EngineConfig(zero_stage=2, workers=8, use_gpu=True, precision="bf16"),
        checkpoint=CheckpointConfig(every=1000 * batch, keep=3),
        log_every=20,
        eval_every=1000,
    )


def small(stage: Stage, shapes: LatentShapes) -> RunConfig:
    """Return the preset for one GPU: about 100M parameters in both branches."""
    size = ModelSize(
        dim=512, layers=8, heads=8, patch=(2, 2), window_chunks=8, longest=16, shift={VIDEO: 3.0, AUDIO: 1.0}
    )
    steps: dict[Stage, int] = {"video": 50_000, "audio": 50_000, "joint": 30_000, "mutual": 10_000}
    config = _recipe(stage, shapes, size, batch=64, steps=steps, lr=2e-4)
    return replace(config, engine=replace(config.engine, workers=1, zero_stage=1))


def base(stage: Stage, shapes: LatentShapes) -> RunConfig:
    """Return the preset for one node: about 1.3B parameters per branch.

    Branches have the layout of Wan 2.1 1.3B plus transcript attention. The video branch can start from the weights of
    Wan (``--init-video-from``).
    """
    size = ModelSize(
        dim=1536,
        layers=30,
        heads=12,
        mlp_ratio=8960 / 1536,
        patch=(2, 2),
        window_chunks=10,
        longest=20,
        shift={VIDEO: 5.0, AUDIO: 1.0},
        data_std={VIDEO: None, AUDIO: 0.5},  # the output of Wan is the velocity
        layout="wan",
        word_heads=3,
        # a unit per latent, as in Wan; Wan 2.1 learned 16 fps, so a latent has 2/3 of its motion
        rope_seconds_scale=6.0,
    )
    steps: dict[Stage, int] = {"video": 200_000, "audio": 200_000, "joint": 100_000, "mutual": 20_000}
    config = _recipe(stage, shapes, size, batch=128, steps=steps, lr=1e-4)
    return replace(config, engine=replace(config.engine, recompute=True))


def full(stage: Stage, shapes: LatentShapes) -> RunConfig:
    """Return the preset of the paper: about 7B parameters per branch."""
    size = ModelSize(
        dim=4096, layers=20, heads=32, patch=(2, 2), window_chunks=10, longest=20, shift={VIDEO: 5.0, AUDIO: 1.0}
    )
    steps: dict[Stage, int] = {"video": 400_000, "audio": 400_000, "joint": 100_000, "mutual": 20_000}
    batch = 256 if stage in ("video", "audio") else 128
    config = _recipe(stage, shapes, size, batch=batch, steps=steps, lr=5e-5)
    return replace(config, engine=replace(config.engine, zero_stage=3, workers=32, recompute=True))


PRESETS: dict[str, Callable[[Stage, LatentShapes], RunConfig]] = {
    "tiny": tiny,
    "toy": toy,
    "small": small,
    "base": base,
    "full": full,
}


def build_preset(name: str, stage: Stage, shapes: LatentShapes) -> RunConfig:
    """Return the configuration of a preset; ValueError for an unknown name."""
    if name not in PRESETS:
        raise UserInputError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name](stage, shapes)
