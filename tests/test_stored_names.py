"""Compare every stored name with the frozen list in ``stored_names.json``.

Stored names are those that files, other programs and users rely on: file names and JSON keys in datasets, runs,
checkpoints, sweeps and studies, Parquet columns, tensor names, configuration keys, metric names, keys of ``--json``
results, and the options of the command line. A Python name may change. A stored name must not.

``python tests/test_stored_names.py --write`` regenerates the list. Do so only for an announced change of the format.
"""

import argparse
import ast
import csv
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python finds tests/ only

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

import preprocessing
from mfcore.codecs.oobleck import OobleckConfig
from mfcore.codecs.t5 import T5Config
from mfcore.codecs.wan import WanConfig
from mfcore.flow import TimeConfig
from mfcore.model.transformer import AVTransformer
from mfcore.types import AUDIO
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.near_duplicates import DUPLICATES
from preprocessing.dataset.near_duplicates import SCHEMA as DUPLICATES_SCHEMA
from preprocessing.dataset.reader import open_dataset
from preprocessing.dataset.schema import CLIPS, REJECTS, SCHEMA_VERSION, SOURCES, columns_for
from preprocessing.dataset.units import DATASET_FILE, SOURCES_FILE
from preprocessing.io.lease import LOCK, Lease
from preprocessing.io.ray_resources import PROMISED_RESOURCES_ENV
from preprocessing.io.storage import TEMPORARY, Store
from preprocessing.media.probe import MediaError
from preprocessing.records import Rejected
from preprocessing.sources.corpora import CORPORA
from preprocessing.steps.av_sync import SyncConfig
from preprocessing.steps.transcribe import WhisperConfig
from tests.helpers.analytic_models import LinearGaussian, linear_clips
from tests.helpers.checkpoint_parts import CARD, PROGRESS
from tests.helpers.latent_dataset import write_dataset
from tests.helpers.published_study import published_study_dir
from tests.helpers.random_exports import random_card
from tests.helpers.small_training import EVERY_PART_AT_ONCE, SMALL
from workflows import demo, doctor
from workflows.bench import preprocess as bench_preprocess
from workflows.bench import preprocess_memory as bench_memory
from workflows.bench import stream as bench_stream
from workflows.bench import train as bench_train
from workflows.bench import train_worker as bench_steps
from workflows.bench.gpu import plan as gpu_plan
from workflows.bench.gpu import results as gpu_results
from workflows.bench.gpu.command import summarize as summarize_gpu
from workflows.bench.matmul_overhead import MatmulOverhead
from workflows.bench.variants import RoundTiming, Variant
from workflows.checkpoints.layout import METADATA_FILE, OUTCOME_FILE, RUN_FILE
from workflows.checkpoints.store import COMPLETE_FILE
from workflows.cli import errors, output
from workflows.cli.app import app
from workflows.config import presets, serialization
from workflows.config.latent_shapes import geometry_for_preset
from workflows.config.stage_names import Stage
from workflows.config.stages import STAGES
from workflows.data import inspect
from workflows.evaluation import csv_report, mlflow_report
from workflows.evaluation.evaluate import evaluate_checkpoints
from workflows.evaluation.metrics.generic import FAILURE_PREDICATES
from workflows.evaluation.metrics.registry import METRICS as SWEEP_METRICS
from workflows.inference.generate import ClipPrompt, generate_clip
from workflows.jobs import job_server, kuberay, local_head, records, submit
from workflows.study import study as study_report
from workflows.study.config import SAMPLING, study_preset
from workflows.study.methods import GROUPS, METHODS
from workflows.study.results_table import COLUMNS, DRIFT_COLUMNS
from workflows.study.scheduler import COST_COLUMNS, ROW_COLUMNS, claim_study_dir, select_methods
from workflows.study.tasks import JOINT_KEY, REAL_KEY, WEIGHTS, StudyTask, plan_tasks, run_task
from workflows.study.tasks import LOG_FILE as STUDY_LOG
from workflows.study.trainer import STEP_FILE
from workflows.tracking.mlflow_sync import SYNC_STATE_FILE, SyncState, save_sync_state
from workflows.tracking.mlflow_tracker import EXPERIMENT_TAGS, PARENT_RUN_TAG
from workflows.tracking.tracker import ARTIFACTS, DEDUP_TAG, LATE_KEY, METRICS, PARAMS, STEP_KEY, JsonLinesTracker
from workflows.training import run_log, worker
from workflows.training.checkpointing import PARTS_DIR
from workflows.training.collapse_alarms import (
    ALARMS,
    BASELINE_FILE,
    AlarmStore,
    CollapseStatistics,
    FakeScoreRatio,
    HistoryUseMonitor,
    compare_to_real,
)
from workflows.training.cost_estimate import estimate_without_dataset
from workflows.training.heartbeat import HEARTBEAT_DIR, Heartbeat
from workflows.training.metrics import ThroughputMeter
from workflows.training.optimization_step import STUDENT
from workflows.training.preemption import STOP_FILE
from workflows.training.resolve import IMMUTABLE_EXCEPTIONS, MUTABLE_SETTINGS
from workflows.training.samples import DRIFT_METRICS, FOLDER, LOOKS, SampleReport, final_samples, sampling_modes
from workflows.training.train import train_stage
from workflows.utils import environment

FROZEN = Path(__file__).with_name("stored_names.json")
TINY_NETWORK = ("model.dim=32", "model.layers=1", "model.heads=2", "data.chunks=[2,2]")
STAGE_NAMES: tuple[Stage, ...] = get_args(Stage)


# ------------------------------------------------------------------------------------------------- names of values


def types_of(value: Any) -> Any:
    """Return ``value`` with every scalar replaced by its JSON type; list items are merged into one."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            name = stable(str(key))
            found[name] = merged([found[name], types_of(inner)]) if name in found else types_of(inner)
        return found
    if isinstance(value, list | tuple):
        return [merged([types_of(item) for item in value])] if value else []
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "null" if value is None else "string"


def merged(kinds: Sequence[Any]) -> Any:
    """Return one description that covers all of ``kinds``."""
    texts = sorted({json.dumps(kind, sort_keys=True) for kind in kinds})
    if len(texts) == 1:
        return kinds[0]
    if all(isinstance(kind, dict) for kind in kinds):
        names = dict.fromkeys(name for kind in kinds for name in kind)
        return {name: merged([kind[name] for kind in kinds if name in kind]) for name in names}
    if all(isinstance(kind, list) for kind in kinds):
        items = [item for kind in kinds for item in kind]
        return [merged(items)] if items else []
    return {"one of": [json.loads(text) for text in texts]}


def stable(text: str) -> str:
    """Return ``text`` without step numbers, sample counts, digests and random parts."""
    text = re.sub(r"file://\S*/", "<folder>/", text)
    text = re.sub(r"(?<![0-9a-f])\d{12}-[0-9a-f]{8}(?![0-9a-f])", "<samples>-<attempt>", text)
    text = re.sub(r"step-\d{8}", "step-<step>", text)
    text = re.sub(r"(?<![0-9a-z])(?=[0-9a-f]*[0-9])[0-9a-f]{8,}(?![0-9a-z])", "<digest>", text)
    return re.sub(r"-(?=[a-f]*[0-9])[0-9a-f]{6}(?=[-.]|$)", "-<digest>", text)


def files_in(folder: Path) -> list[str]:
    """Return the stable names of all files below ``folder``, sorted."""
    return sorted({stable(str(path.relative_to(folder))) for path in folder.rglob("*") if path.is_file()})


def contents_of(folder: Path) -> dict[str, Any]:
    """Return key types, column names and tensor names of all files below ``folder`` by stable file name."""
    found: dict[str, list[Any]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = content_of(path)
        if content is not None:
            found.setdefault(stable(str(path.relative_to(folder))), []).append(content)
    return {name: merged(kinds) for name, kinds in found.items()}


def content_of(path: Path) -> Any:
    """Return the names stored in one file; None for a file without names, such as a video."""
    if path.suffix == ".json" or path.name == COMPLETE_FILE:
        return types_of(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return merged([types_of(json.loads(line)) for line in path.read_text().splitlines()])
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return next(csv.reader(file))
    if path.suffix == ".parquet":
        return schema_of(pq.read_schema(path))
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {"metadata": sorted(file.metadata() or {}), **tensors_of(file.keys())}
    return None


def schema_of(schema: pa.Schema) -> dict[str, Any]:
    """Return column names and types in order, and the metadata of a Parquet schema."""
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    return {
        "columns": [f"{field.name}: {field.type}" for field in schema],
        "metadata": {key: value for key, value in metadata.items() if not key.startswith("ARROW")},
    }


def tensors_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the tensor names, layer numbers replaced by ``<n>``, apart from their kinds such as ``exp_avg/``."""
    parts = [name.rpartition("/") for name in names]
    found = {"tensors": sorted({re.sub(r"\.\d+(?=\.|$)", ".<n>", name) for *_, name in parts})}
    kinds = sorted({kind for kind, slash, _ in parts if slash})
    return found | ({"kinds": kinds} if kinds else {})


def keys_of(folder: Path, name: str) -> Any:
    """Return the key types of one JSON file."""
    return types_of(json.loads((folder / name).read_text()))


# --------------------------------------------------------------------------------------------------- command line


def command_line(_: "Material") -> Any:
    """Return commands, arguments and options with their defaults, choices and exit codes."""
    return {
        "name": app.info.name,
        "commands": described(get_command(app)),
        "exit codes": {
            "failed": errors.FAILED,
            "wrong input": errors.WRONG_INPUT,
            "exit code of a job unknown": kuberay.UNKNOWN_EXIT,
        },
        "environment variables": {
            "working directory": environment.CWD_ENV,
            "traceback": errors.TRACEBACK,
            "resources of a cluster": PROMISED_RESOURCES_ENV,
            "temporary folder of a head": local_head.TEMP_ENV,
            "ports of a head": list(local_head.PORTS),
            "defaults": environment.DEFAULT_ENV,
        },
    }


def described(command: Any) -> dict[str, Any]:
    """Return the parameters of a command, or the commands of a group."""
    if isinstance(command, TyperGroup):
        return {name: described(inner) for name, inner in command.commands.items()}
    arguments = [parameter_of(p) for p in command.params if p.param_type_name == "argument"]
    options = dict(parameter_of(p) for p in command.params if p.param_type_name != "argument")
    return {"arguments, in order": arguments, "options": options}


def parameter_of(parameter: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of an argument or option and what a user may give it; what does not apply is left out."""
    annotation = parameter.type_descriptor.annotation
    choices = list(get_args(annotation)) if get_origin(annotation) is Literal else []
    default = parameter.default() if callable(parameter.default) else parameter.default
    argument = parameter.param_type_name == "argument"
    if "--jobs" in parameter.opts:
        default = "<CPUs>"
    facts = {
        "type": "choice" if choices else annotation.__name__,
        "choices": choices,
        "names that switch off": parameter.secondary_opts,
        "default": default,
        "required": parameter.required,
        "several": parameter.nargs != 1 or (not argument and parameter.multiple),
        "least": parameter.min,
    }
    name = parameter.metavar or parameter.name.upper() if argument else " ".join(parameter.opts)
    return name, {key: value for key, value in facts.items() if value not in (None, []) and value is not False}


# -------------------------------------------------------------------------------------------------- configurations


def training_configurations(_: "Material") -> Any:
    """Return the configuration of every preset and stage, keys and values, and what ``--dry-run`` prints."""
    plans = {
        f"{name} {stage}": estimate_without_dataset(stage, name, (), None)
        for name in presets.PRESETS
        for stage in STAGE_NAMES
    }
    return {
        "values": {name: plan["config"] for name, plan in plans.items()},
        "dry run": {name: types_of({**plan, "config": None}) for name, plan in plans.items()},
    }


def other_configurations(material: "Material") -> Any:
    """Return the configurations of preprocessing, the toy world and the study, keys and values."""
    default = PreprocessConfig()
    pretrained = {
        "wan": WanConfig(channels=16, block=8, weights="w"),
        "oobleck": OobleckConfig(channels=64, sample_rate=44100, hop=2048, weights="w"),
        "t5": T5Config(width=4096, weights="w"),
        "whisper": WhisperConfig(weights="w"),
        "syncnet": SyncConfig(estimator="syncnet", weights="w"),
    }
    claim_study_dir(study_preset("quick"), material.folder / "study of quick")
    return {
        "preprocess": serialization.to_dict(default),
        "preprocess, as stored": default.resolved(),
        "preprocess, fingerprint": default.fingerprint,
        "pretrained": {name: serialization.to_dict(config) for name, config in pretrained.items()},
        "toy world": json.loads((material.toy_clips / "_toyworld.json").read_text()),
        "study": {name: serialization.to_dict(study_preset(name)) for name in ("toy-study", "quick")},
        "study, as stored": keys_of(material.folder / "study of quick", "study.json"),
    }


def setting_names(_: "Material") -> Any:
    """Return configuration keys that the code names as text."""
    return {
        "may change on resume": sorted(MUTABLE_SETTINGS),
        "may not change on resume": sorted(IMMUTABLE_EXCEPTIONS),
        "of sampling in a study": sorted(SAMPLING),
    }


# ----------------------------------------------------------------------------------------------------------- files


def file_names(_: "Material") -> Any:
    """Return the constants that name files, folders, fields and tags."""
    return {
        "run": {
            "record": RUN_FILE,
            "outcome": OUTCOME_FILE,
            "log": run_log.LOG_FILE,
            "metrics": METRICS,
            "parameters": PARAMS,
            "artifacts": ARTIFACTS,
            "state of delivery": SYNC_STATE_FILE,
            "alarms": ALARMS,
            "first history use": BASELINE_FILE,
            "heartbeats": HEARTBEAT_DIR,
            "samples": FOLDER,
            "reports on samples": LOOKS,
            "request to stop": STOP_FILE,
            "lease": LOCK,
            "temporary": TEMPORARY,
        },
        "checkpoint": {
            "model card": METADATA_FILE,
            "marker": COMPLETE_FILE,
            "parts": PARTS_DIR,
            "trained network": STUDENT,
        },
        "dataset": {
            "facts": DATASET_FILE,
            "sources": SOURCES_FILE,
            "duplicates": DUPLICATES,
            "version": SCHEMA_VERSION,
        },
        "study": {"weights": WEIGHTS, "log": STUDY_LOG, "step": STEP_FILE, "joint": JOINT_KEY, "real": REAL_KEY},
        "tracking": {
            "parent": PARENT_RUN_TAG,
            "step": STEP_KEY,
            "late": LATE_KEY,
            "once": DEDUP_TAG,
            "experiment tags": EXPERIMENT_TAGS,
            "experiments": [mlflow_report.EXPERIMENT, inspect.EXPERIMENT, study_report.EXPERIMENT],
        },
        "corpora": sorted(CORPORA),
    }


def small_records(material: "Material") -> Any:
    """Return the keys of small JSON files that a run or a cluster keeps, each written by its own writer."""
    folder = material.folder / "records"
    folder.mkdir()
    AlarmStore(folder).update("samples", {"motion/few": "motion is low"}, 3)
    watch = HistoryUseMonitor(folder, [linear_clips(8, 4, 0)], TimeConfig(shift={AUDIO: 1.0}), 0)
    watch.measure(LinearGaussian(0.95, 0.0, 0.1))
    save_sync_state(folder, SyncState(uri="sqlite:///mlflow.db", key="k"))
    SampleReport(step=4, numbers={"sample/sync/few": 1.0}, error="").write(folder)
    log = JsonLinesTracker(folder)
    log.log(1, {STEP_KEY: 8.0})
    log.log(1, {STEP_KEY: 8.0}, late=True)
    log.params({"a.b": 1})
    log.artifact(folder / ALARMS, "configuration")
    with Lease(Store(str(folder))):
        lease = keys_of(folder, LOCK)
    return {
        "files": contents_of(folder),
        "heartbeat": heartbeat(folder),
        "lease": lease,
        "model card": serialization.to_dict(CARD),
        "model card of stage mutual": types_of(serialization.to_dict(random_card("mutual"))),
        "progress": serialization.to_dict(PROGRESS),
        "head": types_of(asdict(local_head.LocalHead(cluster="c", address="a", temp="t"))),
    }


def heartbeat(folder: Path) -> Any:
    """Return the name and the key types of a heartbeat file."""
    pulse = Heartbeat(folder / HEARTBEAT_DIR, 0)
    try:
        deadline = time.monotonic() + 10
        while not (files := sorted((folder / HEARTBEAT_DIR).glob("[0-9]*.json"))):
            assert time.monotonic() < deadline, "no heartbeat was written"
            time.sleep(0.01)
        return {files[0].name: keys_of(folder / HEARTBEAT_DIR, files[0].name)}
    finally:
        pulse.close()


def dataset_schemas(_: "Material") -> Any:
    """Return Parquet columns and the reasons for which sources and spans are rejected."""
    return {
        "clips": schema_of(CLIPS),
        "rejects": schema_of(REJECTS),
        "sources": schema_of(SOURCES),
        "duplicates": schema_of(DUPLICATES_SCHEMA),
        "read": {name: columns_for(spec.modalities) for name, spec in STAGES.items()},
        "reasons": reject_reasons(),
        "histograms": sorted(inspect.HISTOGRAM_COLUMNS),
    }


def reject_reasons() -> dict[str, list[str]]:
    """Return the words in the calls that reject something, as the source of the package has them."""
    counted = {Rejected.__name__: 2, MediaError.__name__: 1}  # leading arguments that are stored words
    found: dict[str, set[str]] = {"rejected": set(), "media error": set()}
    for path in Path(preprocessing.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in counted:
                words = [texts_in(argument) for argument in node.args[: counted[node.func.id]]]
                kind = "rejected" if node.func.id == Rejected.__name__ else "media error"
                if all(words):
                    found[kind] |= {"/".join(pair) for pair in product_of(words)}
    return {kind: sorted(words) for kind, words in found.items()}


def texts_in(node: ast.expr) -> list[str]:
    """Return the texts that an expression may have as its value; [] for one that only runs know."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    return [*texts_in(node.body), *texts_in(node.orelse)] if isinstance(node, ast.IfExp) else []


def product_of(words: Sequence[list[str]]) -> list[tuple[str, ...]]:
    """Return every combination of one text from each list."""
    pairs: list[tuple[str, ...]] = [()]
    for texts in words:
        pairs = [(*pair, text) for pair in pairs for text in texts]
    return pairs


def tensor_names(_: "Material") -> Any:
    """Return the tensor names of every preset and stage: what the weight files of a checkpoint hold."""
    found: dict[str, Any] = {}
    for name in presets.PRESETS:
        for stage in STAGE_NAMES:
            known = geometry_for_preset(name)
            config = presets.build_preset(name, stage, known.shapes(known.padded((64, 64))))
            config = serialization.apply_overrides(config, serialization.parse_overrides(["model.layers=2"]))
            with torch.device("meta"):
                found[f"{name} {stage}"] = tensors_of(list(AVTransformer(config.model).state_dict()))
    return found


# --------------------------------------------------------------------------------------------------------- metrics


def metric_names(material: "Material") -> Any:
    """Return the metric names of training, alarms, sweep and study."""
    return {
        "speed": speed_names(),
        "alarms": alarm_names(material.folder),
        "sweep": [list(metric.names) for metric in SWEEP_METRICS],
        "failures": sorted(FAILURE_PREDICATES),
        "by window while training": sorted(DRIFT_METRICS),
        "modes": {stage: list(sampling_modes(stage)) for stage in STAGE_NAMES},
        "headline": {stage: [STAGES[stage].headline, *STAGES[stage].trained] for stage in STAGE_NAMES},
        "table": content_of(csv_report.write_csv([], material.folder / "table.csv")),
        "study": {
            "shown": list(COLUMNS),
            "drifting": list(DRIFT_COLUMNS),
            "row": sorted(ROW_COLUMNS),
            "cost": sorted(COST_COLUMNS),
        },
    }


def speed_names() -> list[str]:
    """Return the names of what a throughput reading holds, on a GPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "utilization", lambda: 50)
        for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
            patch.setattr(torch.cuda, name, lambda: 0)
        meter = ThroughputMeter()
        with meter.saving():
            meter.count(8, 100)
        return sorted(meter.collect(8))


def alarm_names(folder: Path) -> dict[str, list[str]]:
    """Return the names of the numbers and alarms of a collapsed run."""
    lively = CollapseStatistics(
        motion=1.0, power=1.0, finite=True, variance={"video": 1.0}, seam={"video": 1.0}, lag1={"video": 0.9}
    )
    dead = CollapseStatistics(
        motion=0.0, power=0.0, finite=False, variance={"video": 0.0}, seam={"video": 9.0}, lag1={"video": 0.0}
    )
    numbers, wrong = compare_to_real("few", dead, lively)
    watch = HistoryUseMonitor(folder, [linear_clips(8, 4, 0)], TimeConfig(shift={AUDIO: 1.0}), 0)
    watch.measure(LinearGaussian(0.95, 0.0, 0.1))
    use, lost = watch.measure(LinearGaussian(0.07, 0.0, 1.0))
    log = {f"{term}/video/t1": value for term, value in (("flow_matching", 1.0), ("fake_score", 0.01))}
    gap = FakeScoreRatio()
    readings = [gap.measure(log | {"fake_score/video": 0.01}) for _ in range(10)]
    return {
        "numbers": sorted(numbers | readings[-1][0] | use),
        "alarms": sorted(wrong | readings[-1][1] | lost),
        "statistics": sorted(lively.as_metrics),
    }


# ----------------------------------------------------------------------------------------- results of the commands


def quick_results(material: "Material") -> Any:
    """Return the keys of the ``--json`` results of commands that take no time."""
    data = str(material.random_data)
    return {
        "toyworld": types_of(material.toy_world),
        "preprocess": types_of(material.toy_dataset),
        "preprocess --dry-run": types_of(
            mfctl("preprocess", str(material.toy_clips), "elsewhere", "--set", "workers=0", "--dry-run")
        ),
        "inspect": types_of(
            mfctl("inspect", str(material.toy_data), "--verify", "--near-duplicates", "--sheet", "sheet.png")
        ),
        "train --dry-run": types_of(mfctl("train", "--stage", "video", "--data", data, "--dry-run")),
        "study --dry-run": types_of(mfctl("study", "--preset", "quick", "--dry-run")),
        "manifest": corpus(material.folder),
        "doctor": checks(),
        "status": jobs(material.folder),
        "error": types_of(mfctl("inspect", "nowhere", code=errors.WRONG_INPUT)),
    }


def mfctl(*words: str, code: int = 0) -> dict[str, Any]:
    """Run a command in this process and return its ``--json`` result."""
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def corpus(folder: Path) -> Any:
    """Return the result of ``mfctl manifest`` and the keys of the manifest's rows."""
    media = folder / "emilia"
    media.mkdir()
    (media / "one.mp3").write_text("sound")
    (media / "one.json").write_text(json.dumps({"text": "so it is", "duration": 7.0}))
    result = mfctl("manifest", "emilia", str(media), str(folder / "emilia.jsonl"))
    return {"result": types_of(result), "rows": content_of(folder / "emilia.jsonl")}


def checks() -> Any:
    """Return the result of ``mfctl doctor`` without its external programs."""

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, stdout="1.0\n", stderr="")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        result = output.to_json_types(doctor.run_checks())
    return {"result": types_of(result), "names": [check["name"] for check in result["checks"]]}


def jobs(folder: Path) -> Any:
    """Return the results of ``mfctl status`` with one job and a stub server, and the record of the job."""

    class Client:
        def get_job_info(self, job: str) -> Any:
            del job
            ended = SimpleNamespace(is_terminal=lambda: True, value="SUCCEEDED")
            return SimpleNamespace(status=ended, driver_exit_code=0, message="")

    job = records.SubmittedJob(id="raysubmit_1", address="http://host:8265", command=["doctor"], submitted=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_server, job_server.connect.__name__, lambda address: Client())
        submit._record(job)
        return {
            "one": types_of(mfctl("status", job.id)),
            "all": types_of(mfctl("status")),
            "record": contents_of(folder / "runs" / "cluster"),
        }


def gpu_bench() -> dict[str, Any]:
    """Return the files of ``mfctl bench gpu``, its parts, and the keys of its lines and of its result."""
    with tempfile.TemporaryDirectory() as path:
        folder = gpu_results.ResultFolder(Path(path) / "gpu", {"device": "cpu", "preset": "tiny"})
        line = {"part": "stream", "case": "full 192x336 graphs", "seconds": 1.0, "at": 1.0}
        folder.append(line | {"status": "done", "result": {"fps": 1.0}})
        folder.append(line | {"case": "base 192x336 graphs", "status": "cut", "reason": "no time"})
        return {
            "files": list(gpu_results.FILES),
            "parts": [part.name for part in gpu_plan.PARTS],
            "lines": types_of(folder.records()),
            "settings": contents_of(folder.path)[gpu_results.SETTINGS_FILE],
            "result": types_of(summarize_gpu(folder, device="cpu", preset="tiny", seconds=1.0)),
        }


def bench_results(_: "Material") -> Any:
    """Return the keys of the results of ``mfctl bench`` from the functions that assemble them."""
    turn = RoundTiming(step_s=1.0, wait_s=0.0, cpu_s=1.0, loss=1.0)
    names = (bench_steps.REFERENCE_VARIANT, "ray_zero1")
    plan = bench_steps.TrainBenchPlan(
        config=bench_train.bench_config(stage="joint", preset="tiny", workers=1, tokens=1, sets=()),
        variants=dict.fromkeys(names, Variant()),
        rounds=1,
        turn=1,
        threads=1,
    )
    measured = bench_steps.TrainBenchResult(
        turns={name: [turn] for name in names},
        state_bytes=dict.fromkeys(names, 1),
        over_products=MatmulOverhead(forward=1.0, block=1.0),
        flops_per_s=[1.0],
        flops=1,
        tokens=1,
        parameters=1,
        threads=1,
        peak_memory_bytes=1,
        profiles={},
    )
    media = bench_preprocess.Measurement(
        wall_s=1.0, cpu_s=1.0, counts={"accepted": 1, "hours": 1.0}, spent={"decode": 1.0}, peak_rss_bytes=1
    )
    with pytest.MonkeyPatch.context() as patch:
        used = {"sources": 1, "accepted": 1, "rss_bytes": 1, "object_store_bytes": 1}
        patch.setattr(bench_memory, bench_memory._measure.__name__, lambda clips, workers: used)
        growth = bench_memory.bench_memory(few=1, many=2, workers=1)
    turns = {name: [media] for name in ("limit", "ours", "plain")}
    return {
        "train": types_of(bench_train.summarize(plan, measured, {"ray_zero2": "not measured"})),
        "train, variants": [*bench_train.VARIANTS, *bench_train.MUTUAL_VARIANTS, *bench_train.OTHER_VARIANTS],
        "preprocess": types_of(bench_preprocess._summary(turns, 1, 1)),
        "preprocess --memory": types_of(growth),
        "gpu": gpu_bench(),
    }


# ------------------------------------------------------------------------------------------ what the commands write


def toy_world(material: "Material") -> Any:
    """Return files and keys of a toy world."""
    return {"files": files_in(material.toy_clips), "contents": contents_of(material.toy_clips)}


def dataset(material: "Material") -> Any:
    """Return files, keys and columns of a dataset, and the values that later versions must understand."""
    facts = json.loads((material.toy_data / DATASET_FILE).read_text())
    values = {name: facts[name] for name in ("codecs", "text_codec", "clocks", "chunk_seconds", "fingerprint")}
    preprocessed = mfctl("inspect", str(material.toy_data), "--near-duplicates")
    assert preprocessed["near_duplicates"] == 0
    return {
        "files": files_in(material.toy_data),
        "contents": contents_of(material.toy_data),
        "values": values,
        "log": contents_of(material.folder / "runs" / "preprocess"),
    }


def run_folders(material: "Material") -> Any:
    """Return files, keys, metric names and tensor names of a run of every stage, and the results of ``mfctl train``."""
    return {stage: run_of(result) for stage, result in material.runs.items()}


def run_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one run stores and what ``mfctl train`` prints about it."""
    folder = Path(result["run_dir"])
    return {
        "files": files_in(folder),
        "contents": contents_of(folder),
        "result": types_of(output.to_json_types(result)),
    }


def study_folder(material: "Material") -> Any:
    """Return methods, units, files, keys and metric names of a study of two trainings."""
    out, config = material.folder / "study", serialization.apply_overrides(study_preset("quick"), SMALL_STUDY)
    claim_study_dir(config, out)
    scored = [StudyTask(kind="score", method=name, seed=0, mode=mode, steps=1) for name, mode in SCORED.items()]
    for unit in (*(StudyTask(kind="train", method=name, seed=0) for name in (JOINT_KEY, "mutual")), *scored):
        run_task(config, out, unit, device="cpu", deadline=float("inf"))
    planned = plan_tasks(study_preset("toy-study"), select_methods(["all", "ablations"], [0]))
    return {
        "methods": {name: [m.key, list(m.modes), list(m.counts or ())] for name, m in METHODS.items()},
        "groups": {name: list(methods) for name, methods in GROUPS.items()},
        "units": [f"{unit.name} {unit.result_path(Path())}" for unit in planned],
        "files": files_in(out),
        "contents": contents_of(out),
    }


SCORED: dict[str, Literal["few", "multi"]] = {"mutual": "few", JOINT_KEY: "multi", REAL_KEY: "multi"}
SMALL_STUDY: dict[str, Any] = {
    "model": {"dim": 16, "layers": 1, "heads": 1},
    "joint_batch": 4,
    "joint_chunks": [3],
    "joint_steps": 3,
    "batch": 4,
    "chunks": [3],
    "steps": 4,
    "method": {"real_until": 1, "free_from": 2, "fake_from": 2, "dmd_from": 3, "dmd_ramp": 1},
    "counts": [1, 2],
    "clips": 3,
    "seconds": 3.0,
    "long_clips": 1,
    "long_seconds": 4.0,
    "windows": "0-1,1-3,3-4",
}


class Material:
    """Folders and results that several sections need, made on first use."""

    def __init__(self, folder: Path, clips: int) -> None:
        self.folder, self.clips = folder, clips

    @cached_property
    def toy_world(self) -> dict[str, Any]:
        """Write a toy world; return the command's result."""
        words = ("--clips", str(self.clips), "--seconds", "2.6", "--jobs", "1", "--seed", "3")
        return mfctl("toyworld", str(self.folder / "clips"), *words)

    @property
    def toy_clips(self) -> Path:
        """Return the folder of the toy world."""
        return Path(self.toy_world["path"])

    @cached_property
    def toy_dataset(self) -> dict[str, Any]:
        """Preprocess the toy world and a file that is not media; return the command's result."""
        damaged = self.folder / "damaged"
        damaged.mkdir()
        (damaged / "pointer.mp4").write_text("a pointer, not a clip\n")
        sets = ("--set", "workers=0", "--set", "window_seconds=5/2")
        return mfctl("preprocess", str(self.toy_clips), str(damaged), str(self.folder / "data"), *sets)

    @property
    def toy_data(self) -> Path:
        """Return the dataset of the toy world."""
        assert self.toy_dataset["accepted"] == self.clips
        return self.folder / "data"

    @cached_property
    def random_data(self) -> Path:
        """Write a dataset of random latents."""
        return Path(write_dataset(self.folder / "random"))

    @cached_property
    def runs(self) -> dict[Stage, dict[str, Any]]:
        """Train every stage for a few steps; return the results by stage."""
        return trained(str(self.random_data), self.folder / "runs")

    @cached_property
    def sampled(self) -> dict[Stage, dict[str, Any]]:
        """Train every stage on playable clips and make samples; return the results by stage."""
        sets = ("data.held_out=0.5", "sample_every=8")
        return trained(str(self.toy_data), self.folder / "sampled", sets, sample=final_samples)


def trained(data: str, runs: Path, sets: Sequence[str] = (), **more: Any) -> dict[Stage, dict[str, Any]]:
    """Train every stage for a few steps in this process; return the results by stage."""
    found: dict[Stage, dict[str, Any]] = {}
    for stage in STAGE_NAMES:
        own = ("steps=4", "fake.rank=2", *EVERY_PART_AT_ONCE) if stage == "mutual" else ("steps=2", "eval_every=2")
        parents = [found[parent]["run_dir"] for parent in STAGES[stage].parents]
        found[stage] = train_stage(
            stage,
            data=data,
            init_from=parents,
            sets=(*SMALL, *own, *sets),
            run=stage,
            runs_dir=runs,
            launch=worker.run_worker,
            **more,
        )
    return found


# ------------------------------------------------------------------------------------- slow: samples, sweep, MLflow


def sampled_runs(material: "Material") -> Any:
    """Return what runs on playable clips store, with sample reports and MLflow."""
    found = {stage: without_alarms(run_of(result)) for stage, result in material.sampled.items()}
    for run in found.values():  # another section has what is in a checkpoint
        run["contents"] = {name: kinds for name, kinds in run["contents"].items() if "safetensors" not in name}
    return found


def without_alarms(value: Any) -> Any:
    """Return ``value`` without what depends on which alarms are on; their names are in another section."""
    if isinstance(value, dict):
        dropped = ("alarms", "wrong", ALARMS)
        return {key: without_alarms(inner) for key, inner in value.items() if key not in dropped}
    return [without_alarms(item) for item in value if item != ALARMS] if isinstance(value, list) else value


def sweep(material: "Material") -> Any:
    """Return what a sweep stores and prints, and the summary of a demo with it."""
    out = material.folder / "sweep"
    result = evaluate_checkpoints(
        [material.sampled["mutual"]["run_dir"]],
        steps=[1],
        clips=2,
        seeds=[0, 1],
        windows="0-1,1-2",
        out=str(out),
        progress=lambda done, of: None,
    )
    summary = demo.summarize(
        material.toy_dataset, stages=material.sampled, sweep=result, joint_sweep=result, samples=[], took={"sweep": 1.0}
    )
    return {
        "files": files_in(out),
        "contents": contents_of(out),
        "result": types_of(output.to_json_types(result)),
        "demo": types_of(output.to_json_types(summary)),
    }


def generated(material: "Material") -> Any:
    """Return the results of ``mfctl generate`` and ``mfctl reconstruct``."""
    clip = open_dataset(str(material.toy_data)).clip(0).id
    source = str(min(material.toy_clips.glob("*.mp4")))
    made = generate_clip(
        material.sampled["mutual"]["run_dir"],
        ClipPrompt(first_frame=source, transcript="ba do", seconds=1.0),
        out=str(material.folder / "g.mp4"),
    )
    return {
        "generate": types_of(output.to_json_types(made)),
        "reconstruct": types_of(mfctl("reconstruct", str(material.toy_data), clip, str(material.folder / "r.mp4"))),
    }


def streamed(_: "Material") -> Any:
    """Return the result of ``mfctl bench stream`` on a tiny network."""
    early, cached = bench_stream.EARLY_CHUNKS, bench_stream.CACHED_AT
    bench_stream.EARLY_CHUNKS, bench_stream.CACHED_AT = 6, 10
    try:
        result = bench_stream.bench_stream(chunks=9, rounds=1, steps=1, device="cpu", sets=TINY_NETWORK[:3])
    finally:
        bench_stream.EARLY_CHUNKS, bench_stream.CACHED_AT = early, cached
    return types_of(output.to_json_types(result))


def published_study(material: "Material") -> Any:
    """Return what ``mfctl study`` stores and prints when all its units are done."""
    out = material.folder / "published"
    patterns = ["study.json", "seed-0/joint/train.json", "seed-0/mutual/train.json"]
    patterns += [f"rows/seed-0-{name}-*.json" for name in (JOINT_KEY, "mutual", REAL_KEY)]
    for file in (file for pattern in patterns for file in published_study_dir().glob(pattern)):
        target = out / file.relative_to(published_study_dir())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    result = study_report.run_study(
        out=str(out),
        preset="toy-study",
        seeds="1",
        methods=["mutual"],
        device="cpu",
        workers=1,
        minutes=1e-9,
        sets=[],
        dry_run=False,
        tracking=environment.tracking_uri(),
    )
    made = ("results.json", "bars.json", "mlflow.json")
    return {
        "files": files_in(out),
        "contents": {name: keys_of(out, name) for name in made},
        "result": types_of(output.to_json_types(result)),
    }


def tracked(_: "Material") -> Any:
    """Return the names in MLflow: experiments, tags, parameters, metrics and artifacts of all runs so far."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=environment.tracking_uri())
    found: dict[str, Any] = {}
    for experiment in client.search_experiments():
        runs = client.search_runs([experiment.experiment_id], max_results=100)
        found[experiment.name] = {
            "tags of the experiment": sorted(experiment.tags),
            "runs": {stable(run.info.run_name): names_of_run(client, run) for run in runs},
        }
    return found


def names_of_run(client: Any, run: Any) -> dict[str, list[str]]:
    """Return the names that one MLflow run holds."""
    own = [tag for tag in run.data.tags if not tag.startswith("mlflow.") or tag == PARENT_RUN_TAG]
    return {
        "tags": sorted(own),
        "params": sorted(run.data.params),
        "metrics": sorted(run.data.metrics),
        "artifacts": sorted({stable(item.path) for item in client.list_artifacts(run.info.run_id)}),
    }


# ------------------------------------------------------------------------------------------------------- comparison

FAST: dict[str, Callable[[Material], Any]] = {
    "command line": command_line,
    "training configurations": training_configurations,
    "other configurations": other_configurations,
    "setting names": setting_names,
    "file names": file_names,
    "small records": small_records,
    "dataset schemas": dataset_schemas,
    "tensor names": tensor_names,
    "metric names": metric_names,
    "quick results": quick_results,
    "bench results": bench_results,
    "toy world": toy_world,
    "dataset": dataset,
    "run folders": run_folders,
    "study folder": study_folder,
}
SLOW: dict[str, Callable[[Material], Any]] = {  # in this order: later ones use what earlier ones made
    "sampled runs": sampled_runs,
    "sweep": sweep,
    "generated": generated,
    "streamed": streamed,
    "published study": published_study,
    "tracked": tracked,
}


@contextmanager
def prepared(folder: Path, tracker: Literal["json", "mlflow"]) -> Iterator[Material]:
    """Yield material in an empty ``folder`` that is the current directory, with the environment of a fresh shell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in (
            environment.CWD_ENV,
            "MFCTL_TRACKER",
            "MLFLOW_TRACKING_URI",
            "RAY_ADDRESS",
            "RAY_API_SERVER_ADDRESS",
        ):
            patch.delenv(name, raising=False)
        if tracker == "json":
            patch.setenv("MFCTL_TRACKER", tracker)
        else:
            patch.setenv("MLFLOW_TRACKING_URI", environment.tracking_uri())
        torch.set_num_threads(1)
        yield Material(folder, clips=2 if tracker == "json" else 6)


def normal(value: Any) -> Any:
    """Return ``value`` as JSON stores it."""
    return json.loads(json.dumps(value, sort_keys=True))


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return the scalars of nested values by path, with a line for every empty container."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{path} > {key}").items()}
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return {f"{path} > {item!r}": True for item in value} | {path: value}
        return {k: v for i, inner in enumerate(value) for k, v in leaves(inner, f"{path}[{i}]").items()}
    return {path: value}


def compare_with_frozen(section: str, found: Any) -> None:
    """Raise AssertionError that lists the stored names that changed."""
    frozen = json.loads(FROZEN.read_text())[section]
    if (found := normal(found)) == frozen:
        return
    before, now = leaves(frozen), leaves(found)
    lines = [f"gone:    {path} = {before[path]!r:.100}" for path in before if path not in now]
    lines += [f"new:     {path} = {now[path]!r:.100}" for path in now if path not in before]
    lines += [
        f"changed: {path}: {before[path]!r:.100} -> {now[path]!r:.100}"
        for path in before
        if path in now and before[path] != now[path]
    ]
    listed = "\n  ".join(lines[:60]) or "the order of names"
    raise AssertionError(f"stored names of {section!r} changed ({len(lines)} places):\n  {listed}")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Material]:
    """Yield what the fast sections share; logs go to JSON lines."""
    with prepared(tmp_path_factory.mktemp("fast"), "json") as made:
        yield made


@pytest.mark.parametrize("section", FAST)
def test_stored_names_are_those_that_were_frozen(section: str, material: Material) -> None:
    compare_with_frozen(section, FAST[section](material))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stored_names_of_samples_sweep_and_mlflow_are_those_that_were_frozen(tmp_path: Path) -> None:
    with prepared(tmp_path, "mlflow") as made:
        found = {section: collect(made) for section, collect in SLOW.items()}
    for section, names in found.items():
        compare_with_frozen(section, names)


def test_the_list_holds_no_section_that_is_not_compared() -> None:
    assert json.loads(FROZEN.read_text()).keys() == {*FAST, *SLOW}


@pytest.mark.parametrize(
    ("section", "name"),
    [("run folders", "samples_seen"), ("training configurations", "warm_up"), ("quick results", "fingerprint")],
)
def test_a_renamed_key_is_reported(section: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = FROZEN.read_text()
    (tmp_path / "list.json").write_text(text.replace(f'"{name}"', '"renamed"'))
    found = json.loads(text)
    monkeypatch.setitem(globals(), "FROZEN", tmp_path / "list.json")
    with pytest.raises(AssertionError, match=rf"gone: .* > renamed[\s\S]*new: .* > {name}"):
        compare_with_frozen(section, found[section])


# ----------------------------------------------------------------------------------------------------------- script


def write(sections: Sequence[str]) -> None:
    """Regenerate the named sections of the list and keep the others."""
    known: dict[str, Any] = json.loads(FROZEN.read_text()) if FROZEN.exists() else {}
    for part, tracker in ((FAST, "json"), (SLOW, "mlflow")):
        chosen = [section for section in part if section in sections]
        chosen = list(part) if chosen and part is SLOW else chosen
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as folder, prepared(Path(folder), tracker) as made:
            known |= {section: normal(part[section](made)) for section in chosen}
    kept = {section: known[section] for section in (*FAST, *SLOW) if section in known}
    FROZEN.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="regenerate stored_names.json")
    parser.add_argument("sections", nargs="*", help="sections to regenerate (default: all)")
    write(parser.parse_args().sections or (*FAST, *SLOW))
