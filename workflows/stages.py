"""What each stage trains, from what, and how it is judged. Only this file and the presets know stages by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mfcore.ema import decay_at
from mfcore.model.config import ModelConfig
from mfcore.model.transformer import build_model
from mfcore.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from mfcore.objectives.mutual import Mutual
from mfcore.objectives.recipe import MutualConfig
from mfcore.objectives.terms import Objective
from mfcore.optim import learning_rate
from mfcore.types import AUDIO, VIDEO
from mfcore.weights import joined, load_strict
from preprocessing.reader import ClipDataset, DatasetMeta
from workflows.checkpoint import ModelCard, load_card, load_weights
from workflows.config import RunConfig, Stage
from workflows.initial import load_wan
from workflows.presets import LatentShapes

NEVER = 1 << 40


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One row of METHOD 5."""

    modalities: tuple[str, ...]
    parents: tuple[Stage, ...]  # stages it may start from; all of them, or none when they are optional
    parents_needed: bool
    trained: tuple[str, ...]  # networks with an optimizer
    headline: str  # the term whose held-out value tells whether the stage learns


STAGES: dict[Stage, StagePlan] = {
    "video": StagePlan(
        modalities=(VIDEO,), parents=(), parents_needed=False, trained=("student",), headline="flow_matching"
    ),
    "audio": StagePlan(
        modalities=(AUDIO,), parents=(), parents_needed=False, trained=("student",), headline="flow_matching"
    ),
    "joint": StagePlan(
        modalities=(VIDEO, AUDIO),
        parents=("video", "audio"),
        parents_needed=True,
        trained=("student",),
        headline="flow_matching",
    ),
    "mutual": StagePlan(
        modalities=(VIDEO, AUDIO),
        parents=("joint",),
        parents_needed=True,
        trained=("student", "fake"),
        headline="shortcut",
    ),
}


def objective_of(config: RunConfig) -> Objective:
    if isinstance(config.objective, MutualConfig):
        return Mutual(config.objective)
    return FlowMatching(config.objective)


def held_out_objective(config: RunConfig) -> Objective:
    """The terms an evaluation reports. Mutual: flow matching and ShortCut on real history, at levels fixed by
    the sample numbers; no roll-outs, no fake score: both ends of a run are judged on the same inputs."""
    if not isinstance(config.objective, MutualConfig):
        return FlowMatching(config.objective)
    rows = ("real",) * len(config.objective.rows)
    judged = replace(config.objective, rows=rows, fake_from=NEVER, dmd_from=NEVER)
    return Mutual(judged)


def schedule_position(config: RunConfig, step: int) -> dict[str, Any]:
    """Where the stage's schedules stand at ``step``: pure functions of it, so this is for readers of a checkpoint."""
    optims = {"student": config.optim, **({"fake": config.fake_optim} if config.fake_optim else {})}
    facts: dict[str, Any] = {"lr": {name: learning_rate(o, step, config.steps) for name, o in optims.items()}}
    facts["ema_decay"] = decay_at(config.ema, step)
    if isinstance(mutual := config.objective, MutualConfig):
        kinds = [mutual.kind(row, step) for row in range(len(mutual.rows))]
        facts["history"] = {kind: kinds.count(kind) / len(kinds) for kind in sorted(set(kinds))}  # share of the rows
        facts["strengths"] = [2.0**-k for k in mutual.strengths]  # of coupled history, drawn per step
        facts["dmd_weight"] = mutual.dmd_weight * mutual.dmd_scale(step)
    return {"schedule": {"stage_step": step, **facts}}


def headline(plan: StagePlan, terms: Mapping[str, float]) -> float:
    """The headline term, summed over the modalities."""
    return sum(value for key, value in terms.items() if key.split("/")[0] == plan.headline)


def latent_shapes(dataset: ClipDataset) -> LatentShapes:
    """What the first clip shows of the latents."""
    clip, meta = dataset.clip(0), dataset.meta
    latents = {VIDEO: clip.video, AUDIO: clip.audio}
    sizes = {m: tuple(x.shape[2:]) or (1, 1) for m, x in latents.items() if x is not None}
    return LatentShapes(
        channels={m: x.shape[1] for m, x in latents.items() if x is not None},
        size={m: (size[0], size[1]) for m, size in sizes.items()},
        still={m: meta.codec(m).still for m in sizes},
        text_dim=clip.caption_embedding.shape[-1],
        chunk_seconds=float(meta.chunk_seconds),
        chunks=clip.chunks,
    )


def make_card(config: RunConfig, meta: DatasetMeta, parents: Mapping[Stage, Path]) -> ModelCard:
    """What the run will write into ``model.json``: statistics are inherited from the parents, else frozen here.

    ValueError when a parent is of another stage or size, or the dataset holds latents that it was not trained on.
    """
    plan = STAGES[config.stage]
    cards: dict[Stage, ModelCard] = {stage: load_card(path) for stage, path in parents.items()}
    stats = {m: meta.stats[m].softened(config.data.whitening.get(m, 1.0)) for m in plan.modalities}
    for stage, card in cards.items():
        _check_parent(stage, parents[stage], card, config, meta)
        stats |= card.stats
    return ModelCard(
        model=config.model,
        stage=config.stage,
        codecs={m: meta.codecs[m] for m in plan.modalities},
        stats=stats,
        clocks={m: meta.clocks[m] for m in plan.modalities},
        chunk_seconds=meta.chunk_seconds,
        text_codec=meta.text_codec,
        folders={name: meta.folders[name] for name in (*plan.modalities, "text") if name in meta.folders},
        shift=dict(config.objective.time.shift),
        dataset=meta.fingerprint,
        few_steps=few_steps(config.objective),
    )


def few_steps(objective: FlowMatchingConfig | MutualConfig) -> int | None:
    """Intervals of ShortCut's finest rung, without it those of the longest roll-out: shorter ones nobody trains."""
    if not isinstance(objective, MutualConfig):
        return None
    return 2**objective.finest if objective.shortcut_weight else max(objective.rollout_steps)


def _check_parent(stage: Stage, path: Path, card: ModelCard, config: RunConfig, meta: DatasetMeta) -> None:
    if card.stage != stage:
        raise ValueError(f"{path} is of stage {card.stage}; stage {config.stage} starts from {_names(config.stage)}")
    mine, theirs = _size(config.model), _size(card.model)
    if mine != theirs or any(config.model.branches[m] != b for m, b in card.model.branches.items()):
        odd = [f"{k} {theirs[k]} there, {mine[k]} here" for k in mine if mine[k] != theirs[k]] or [
            "its branches differ"
        ]
        raise ValueError(f"{path} is of another size: {'; '.join(odd)}. Use the same --preset and --set for both")
    for m in card.codecs:
        if card.codecs[m] != meta.codecs.get(m) or card.clocks[m] != meta.clocks.get(m):
            raise ValueError(
                f"{path} was trained on {m} latents of {card.codecs[m]}, this dataset holds {meta.codecs.get(m)}: "
                "preprocess with the same codec settings"
            )
    if card.chunk_seconds != meta.chunk_seconds or card.text_codec != meta.text_codec:
        raise ValueError(
            f"{path} was trained with chunks of {float(card.chunk_seconds)} s and text of {card.text_codec}, "
            f"this dataset has {float(meta.chunk_seconds)} s and {meta.text_codec}: preprocess with the same settings"
        )


def _size(model: ModelConfig) -> dict[str, object]:
    return {k: v for k, v in vars(model).items() if k not in ("branches", "coupled", "attention")}


def _names(stage: Stage) -> str:
    parents = STAGES[stage].parents
    return " and ".join(f"a finished {parent} run" for parent in parents) or "nothing (leave out --from)"


def check_parents(stage: Stage, found: Sequence[tuple[Stage, Path]]) -> dict[Stage, Path]:
    """One run for each parent stage. ValueError says what is missing, doubled or of no use."""
    parents: dict[Stage, Path] = {}
    for parent, path in found:
        if parent not in STAGES[stage].parents:
            raise ValueError(f"{path} is of stage {parent}; stage {stage} starts from {_names(stage)}")
        if parent in parents:
            raise ValueError(f"--from names two {parent} runs, {parents[parent]} and {path}: choose one")
        parents[parent] = path
    return parents


def initial_network(config: RunConfig, parents: Mapping[Stage, Path]) -> nn.Module:
    """The student before its first step: the parents' EMA weights, or fresh ones and what ``init_video`` names."""
    model = build_model(config.model, config.seed)
    if config.init_video:
        load_wan(model, config.model, config.init_video)
    if not parents:
        return model
    weights = {stage: load_weights(path) for stage, path in parents.items()}
    if config.stage == "joint":
        load_strict(model, joined({VIDEO: weights["video"], AUDIO: weights["audio"]}), "the two parents")
    else:
        load_strict(model, next(iter(weights.values())), str(next(iter(parents.values()))))
    return model
