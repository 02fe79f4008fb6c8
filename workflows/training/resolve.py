"""Resolve a ``mfctl train`` command: configuration, dataset, parent runs, and the settings that are fixed on resume."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from mfcore.errors import UserInputError
from mfcore.model.config import ModelConfig
from mfcore.types import AUDIO, VIDEO
from preprocessing.dataset.reader import ClipDataset, DatasetMetadata, open_dataset
from preprocessing.io.storage import is_remote
from preprocessing.speech.phonemes import is_phoneme_transcript
from workflows.checkpoints.layout import OUTCOME_FILE, RUN_FILE
from workflows.checkpoints.load import find_export, load_metadata
from workflows.checkpoints.model_card import ExportMetadata
from workflows.checkpoints.store import CheckpointStore
from workflows.config import presets, serialization
from workflows.config.latent_shapes import LatentShapes
from workflows.config.run import RunConfig
from workflows.config.stage_names import Stage
from workflows.config.stages import STAGES
from workflows.evaluation.feature_models import parse_feature_models
from workflows.training.dataset_check import dataset_record
from workflows.training.objectives import max_few_steps
from workflows.training.progress import Progress
from workflows.utils import environment
from workflows.utils.json_io import read_intact_json

MUTABLE_SETTINGS = (
    *("engine", "checkpoint", "log_every", "sample_every", "sample_clips", "sample_weights", "skip_nonfinite"),
    *("data.micro", "data.prefetch"),
)
"""Settings that may change on resume: they change results by rounding at most."""
IMMUTABLE_EXCEPTIONS = ("engine.precision",)
"""Exceptions to MUTABLE_SETTINGS."""
_CLIPS_WITH_TRANSCRIPT = 32  # clips that are searched for a transcript

_LOGGER = logging.getLogger(__name__)
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """Resolved command: everything that determines a run."""

    config: RunConfig
    data: str
    dataset: ClipDataset
    parents: dict[Stage, Path]  # export folders
    run_dir: Path

    def record(self) -> dict[str, Any]:
        """Return the record of the run. Two runs are equal if it differs in MUTABLE_SETTINGS only."""
        return {
            "stage": self.config.stage,
            "config": serialization.to_dict(self.config),
            "data": self.data,
            "dataset": dataset_record(self.dataset),
            "from": {stage: str(path) for stage, path in self.parents.items()},
        }


def resolve_run(
    stage: Stage,
    *,
    data: str | None,
    init_from: Sequence[str],
    preset: str,
    sets: Sequence[str],
    config_file: str | None,
    run: str | None,
    runs: Path,
    count_only: bool = False,
) -> ResolvedRun:
    """Complete a command: from the record of the run if it exists, else with the latest dataset and runs.

    With ``count_only`` the latest runs are optional: parents that are missing or do not fit are left out.

    Raises ValueError for an invalid configuration, or a missing dataset or parent run.
    """
    if run is not None:
        _check_run_name(run, runs)
    existing = read_run_record(runs / run) if run else {}
    named = list(init_from) or list(existing.get("from", {}).values())
    parents, uri = collect_errors(
        lambda: find_parents(stage, named, runs, optional=count_only),
        lambda: str(data or existing.get("data") or latest_dataset(runs)),
    )
    dataset = open_dataset(uri, STAGES[stage].modalities)
    if not len(dataset):
        raise UserInputError(f"{uri} has no accepted clip. Run `mfctl inspect {uri}` for the reasons")
    config = presets.build_preset(preset, stage, latent_shapes_of(dataset))
    if config_file:
        config = serialization.apply_overrides(config, serialization.load_config_file(config_file))
    config = serialization.apply_overrides(config, serialization.parse_overrides(sets))
    if config.checkpoint.to is not None:
        config = replace(
            config, checkpoint=replace(config.checkpoint, to=environment.resolve_path(config.checkpoint.to))
        )
    parse_feature_models(config.sample_weights)  # raises ValueError for missing folders
    _check_lengths(config, dataset, uri)
    if count_only and not named:
        unfit: list[Stage] = [p for p, path in parents.items() if not _parent_fits(p, path, config, dataset.meta)]
        for parent in unfit:
            del parents[parent]
    if config.stage != stage:
        raise UserInputError(f"--stage {stage} contradicts the setting stage={config.stage}")
    request = ResolvedRun(config=config, data=uri, dataset=dataset, parents=parents, run_dir=runs / (run or ""))
    name = run or f"{stage}-{_digest(request)}"
    return ResolvedRun(config=config, data=uri, dataset=dataset, parents=parents, run_dir=runs / name)


def _check_run_name(run: str, runs: Path) -> None:
    """Raise UserInputError unless ``run`` can be the name of a folder and fits into one line of a log."""
    if not run or run in (".", "..") or Path(run).name != run or not run.isprintable():
        raise UserInputError(
            f"--run {run!r} is not a folder name. Use printable characters without slashes; runs are in {runs}"
        )
    if len(run.encode()) > environment.MAX_NAME_BYTES:
        raise UserInputError(f"--run {run[:40]}... is too long. Use at most {environment.MAX_NAME_BYTES} bytes")


def _check_lengths(config: RunConfig, dataset: ClipDataset, uri: str) -> None:
    """Raise UserInputError if no clip is as long as the shortest training clip."""
    if (longest := max(dataset.lengths)) < config.data.chunks[0]:
        raise UserInputError(
            f"data.chunks={list(config.data.chunks)}: the longest clip of {uri} has {longest} chunks. Lower it, "
            "or preprocess longer clips"
        )


def collect_errors(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """Return both values, or raise one ValueError with the messages of both."""
    found: list[Any] = []
    errors: list[str] = []
    for find in (first, second):
        try:
            found.append(find())
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise UserInputError("; ".join(errors))
    return found[0], found[1]


def latest_dataset(runs: Path) -> str:
    """Return the latest finished dataset under ``runs``. Raise ValueError if there is none."""
    places = [p for depth in range(3) for p in runs.glob("*/" * depth + "_dataset.json")]
    found = [p for p in places if (read_intact_json(p) or {}).get("complete")]
    if not found:
        raise UserInputError(
            f"no finished dataset under {runs}. Run `mfctl preprocess SRC {runs}/dataset`, "
            "or name one with --data DATASET"
        )
    return str(max(found, key=lambda p: p.stat().st_mtime).parent)


def find_parents(stage: Stage, named: Sequence[str], runs: Path, *, optional: bool = False) -> dict[Stage, Path]:
    """Return the export folder of a run for each parent stage: named, else the latest finished one under ``runs``.

    A named run of ``stage`` itself is the only parent: training continues from its weights (fine-tuning).

    Raises UserInputError for a missing one, unless ``optional``.
    """
    plan = STAGES[stage]
    exports = [_named_export(name, runs) for name in named]
    parents = check_parents(stage, [(load_metadata(export).stage, export) for export in exports])
    if stage in parents:
        return parents
    missing: list[str] = []
    for parent in plan.parents:
        if parent not in parents:
            try:
                parents[parent] = _latest_export(stage, parent, runs)
            except ValueError as error:
                missing.append(str(error))
    if missing and not optional:
        raise UserInputError("; ".join(missing))
    return {parent: parents[parent] for parent in plan.parents if parent in parents}


def _named_export(name: str, runs: Path) -> Path:
    if is_remote(name):
        return find_export(name)
    path = Path(environment.resolve_path(name))
    if not path.exists() and (runs / name).exists():
        path = runs / name
    if (path / RUN_FILE).exists() and not (path / "export").is_dir() and final_progress(path) is None:
        raise UserInputError(f"the run {path} is not finished. Run its command again, or name one of its checkpoints")
    return find_export(path if path.exists() else name)


def _latest_export(stage: Stage, parent: Stage, runs: Path) -> Path:
    outcomes = [p for depth in (1, 2) for p in runs.glob("*/" * depth + OUTCOME_FILE)]
    done = [p.parent for p in outcomes if final_progress(p.parent) and read_run_record(p.parent).get("stage") == parent]
    if not done:
        raise UserInputError(
            f"stage {stage} starts from a finished {parent} run, and {runs} has none. "
            f"Run `mfctl train --stage {parent}` first, or name one with --from RUN"
        )
    return find_export(max(done, key=lambda path: (path / OUTCOME_FILE).stat().st_mtime))


def read_run_record(run_dir: Path) -> dict[str, Any]:
    """Return ``run.json``; if it is damaged, that of the latest checkpoint in the run directory; {} without any."""
    record = read_intact_json(run_dir / RUN_FILE)
    if record is None and (run_dir / RUN_FILE).exists():
        record = latest_checkpoint_record(CheckpointStore(run_dir / "checkpoints"))[1]
    return record or {}


def latest_checkpoint_record(store: CheckpointStore) -> tuple[str, dict[str, Any]]:
    """Return the name and ``run.json`` of the latest checkpoint with an intact record; "" and {} without any."""
    for name in reversed(store.list_complete()):
        try:
            return name, store.read_json(name, RUN_FILE)
        except (FileNotFoundError, ValueError):
            _LOGGER.warning(f"{store.uri_of(name)}/{RUN_FILE} is damaged or missing")
    return "", {}


def _digest(request: ResolvedRun) -> str:
    """Return the part of a run's name that depends on its settings. It excludes the digest of the clips."""
    settings = immutable_settings(request.record())
    del settings["dataset.digest"]
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


def immutable_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are fixed on resume, by flat name."""

    def is_mutable(name: str) -> bool:
        setting = name.removeprefix("config.")
        return setting not in IMMUTABLE_EXCEPTIONS and any(
            setting == f or setting.startswith(f"{f}.") for f in MUTABLE_SETTINGS
        )

    return {name: value for name, value in serialization.flatten(record).items() if not is_mutable(name)}


def final_progress(run_dir: Path) -> Progress | None:
    """Return the final progress of a finished run, else None."""
    outcome = read_intact_json(run_dir / OUTCOME_FILE) or {}
    return serialization.from_dict(Progress, outcome["progress"]) if "progress" in outcome else None


def latent_shapes_of(dataset: ClipDataset) -> LatentShapes:
    """Return the shapes of the latents, read from the first clip."""
    clip, meta = dataset.clip(0), dataset.meta
    latents = {VIDEO: clip.video, AUDIO: clip.audio}
    sizes = {m: tuple(x.shape[2:]) or (1, 1) for m, x in latents.items() if x is not None}
    return LatentShapes(
        channels={m: x.shape[1] for m, x in latents.items() if x is not None},
        size={m: (size[0], size[1]) for m, size in sizes.items()},
        static_channels={m: meta.codec(m).static_channels for m in sizes},
        text_dim=clip.caption_embedding.shape[-1],
        chunk_seconds=float(meta.chunk_seconds),
        chunks=clip.chunks,
    )


def transcript_kind(dataset: ClipDataset) -> Literal["words", "phonemes"]:
    """Return the kind of the entries of the transcripts, read from the first clips that have one."""
    clips = (dataset.clip(i) for i in range(min(len(dataset), _CLIPS_WITH_TRANSCRIPT)))
    spoken = next((clip.transcript for clip in clips if clip.transcript), ())
    return "phonemes" if is_phoneme_transcript(spoken) else "words"


def world_of(dataset: ClipDataset) -> str | None:
    """Return the synthetic world of the clips, read from the first one; None for real media and older datasets."""
    return dataset.clip(0).world


def make_export_metadata(config: RunConfig, meta: DatasetMetadata, parents: Mapping[Stage, Path]) -> ExportMetadata:
    """Return the content of ``model.json``. Latent statistics come from the parents, else from the dataset.

    Raises ValueError for a parent of another stage, size or kind of latents.
    """
    plan = STAGES[config.stage]
    parent_metadata: dict[Stage, ExportMetadata] = {stage: load_metadata(path) for stage, path in parents.items()}
    stats = {m: meta.stats[m].soften(config.data.whitening.get(m, 1.0)) for m in plan.modalities}
    for stage, metadata in parent_metadata.items():
        _check_parent(stage, parents[stage], metadata, config=config, meta=meta)
        stats |= metadata.stats
    return ExportMetadata(
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
        few_steps=max_few_steps(config.objective),
    )


def _parent_fits(stage: Stage, path: Path, config: RunConfig, meta: DatasetMetadata) -> bool:
    """Return True if a run can be the parent of ``config``."""
    try:
        _check_parent(stage, path, load_metadata(path), config=config, meta=meta)
    except UserInputError:
        return False
    return True


def _check_parent(
    stage: Stage, path: Path, metadata: ExportMetadata, *, config: RunConfig, meta: DatasetMetadata
) -> None:
    if metadata.stage != stage:
        raise UserInputError(
            f"{path} is of stage {metadata.stage}; stage {config.stage} starts from {_describe_parents(config.stage)}"
        )
    mine, theirs = _size(config.model), _size(metadata.model)
    if config.model.cross_bias is not None or not metadata.model.has_cross_bias:
        mine["cross_bias"] = theirs["cross_bias"]  # parents may lack it or have another initial value
    if mine != theirs or any(config.model.branches[m] != b for m, b in metadata.model.branches.items()):
        differences = [f"{k} {theirs[k]} there, {mine[k]} here" for k in mine if mine[k] != theirs[k]]
        text = "; ".join(differences) or "its branches differ"
        raise UserInputError(f"{path} has another size: {text}. Use the same --preset and --set for both")
    for m in metadata.codecs:
        if metadata.codecs[m] != meta.codecs.get(m) or metadata.clocks[m] != meta.clocks.get(m):
            raise UserInputError(
                f"{path} was trained on {m} latents of {metadata.codecs[m]}, this dataset has {meta.codecs.get(m)}. "
                "Preprocess with the same codec settings"
            )
    if metadata.chunk_seconds != meta.chunk_seconds or metadata.text_codec != meta.text_codec:
        raise UserInputError(
            f"{path} was trained with chunks of {float(metadata.chunk_seconds)} s and text of {metadata.text_codec}, "
            f"this dataset has {float(meta.chunk_seconds)} s and {meta.text_codec}. Preprocess with the same settings"
        )


def _size(model: ModelConfig) -> dict[str, object]:
    return {k: v for k, v in vars(model).items() if k not in ("branches", "coupled", "attention")}


def _describe_parents(stage: Stage) -> str:
    parents = " and ".join(f"a finished {parent} run" for parent in STAGES[stage].parents)
    start = parents or "random weights (leave out --from)"
    return f"{start}, or continues the weights of a finished {stage} run"


def check_parents(stage: Stage, found: Sequence[tuple[Stage, Path]]) -> dict[Stage, Path]:
    """Return one run for each parent stage, or one run of ``stage`` itself.

    Raises UserInputError for a second run of a stage, another stage, or parents next to a run of ``stage``.
    """
    parents: dict[Stage, Path] = {}
    for parent, path in found:
        if parent not in (stage, *STAGES[stage].parents):
            raise UserInputError(f"{path} is of stage {parent}; stage {stage} starts from {_describe_parents(stage)}")
        if parent in parents:
            raise UserInputError(f"--from names two {parent} runs, {parents[parent]} and {path}. Choose one")
        parents[parent] = path
    if stage in parents and len(parents) > 1:
        raise UserInputError(
            f"{parents[stage]} is of stage {stage}, which continues from its weights. Leave out the other --from runs"
        )
    return parents
