"""``mfctl train``: settle what is to be trained, refuse what cannot be, and have Ray Train run it.

Nothing is written before everything was checked. A run is a folder:

    run.json      what was asked for: stage, resolved configuration, dataset, parents, versions
    mlflow.json   its MLflow run
    checkpoints/  see ``workflows.checkpoint``
    log.txt       what people are shown while it trains
    outcome.json  put last: the final progress, or why the run stopped
"""

import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from preprocessing.lease import Lease
from preprocessing.reader import ClipDataset, open_dataset
from preprocessing.storage import Store
from workflows import config_io, environment, presets
from workflows.checkpoint import Progress, complete, find_export, load_card, progress_of, read_json, write_json
from workflows.config import RunConfig, Stage
from workflows.stages import STAGES, check_parents, headline, latent_shapes, make_card
from workflows.tracking import log_all, open_tracker, tracking_uri
from workflows.worker import LOG, OUTCOME, RECORD, Job

A = TypeVar("A")
B = TypeVar("B")
Launch = Callable[[Job], None]
"""Runs ``workflows.worker.work`` on all ranks of a job and returns when they are done."""
Sample = Callable[[Path], Sequence[Path]]
"""Makes sample files from a finished run's folder."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a command line resolves to."""

    config: RunConfig
    data: str
    dataset: ClipDataset
    parents: dict[Stage, Path]  # export folders
    run_dir: Path

    def record(self) -> dict[str, Any]:
        """What identifies the run: a command that differs in any of it is another run."""
        return {
            "stage": self.config.stage,
            "config": config_io.dump(self.config),
            "data": self.data,
            "dataset": {"fingerprint": self.dataset.meta.fingerprint, "clips": len(self.dataset)},
            "from": {stage: str(path) for stage, path in self.parents.items()},
        }


def train(
    stage: Stage,
    *,
    data: str | None = None,
    init_from: Sequence[str] = (),
    preset: str = "tiny",
    sets: Sequence[str] = (),
    config_file: str | None = None,
    run: str | None = None,
    runs_dir: str | Path = "runs",
    dry_run: bool = False,
    launch: Launch | None = None,
    sample: Sample | None = None,
) -> dict[str, Any]:
    """Train one stage; the same call again resumes, or says that the run is finished.

    ``launch``: default Ray Train. ``sample``: called with the run's folder when training has ended; the files it makes
    become artifacts of the MLflow run. ValueError, before anything is written, when the request cannot be met.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: choose one of {', '.join(STAGES)}")
    runs = Path(environment.absolute(str(runs_dir)))
    request = resolve(stage, data, init_from, preset, sets, config_file, run, runs)
    card = make_card(request.config, request.dataset.meta, request.parents)
    if dry_run:
        return {**request.record(), "run_dir": str(request.run_dir)}
    _check_record(request)
    with _lease(request.run_dir) as lease:
        if _finished(request.run_dir) is None:
            _begin(request)
            job = Job(
                config=request.config,
                card=card,
                data=request.data,
                parents=request.parents,
                run_dir=request.run_dir,
                tracking_uri=tracking_uri(runs),
                token=lease.token,
            )
            with _shown(request.run_dir / LOG):
                (launch or launch_on_ray)(job)
            _raise_if_failed(request.run_dir, lease.token)
        if sample is not None:
            _sample(request, sample, tracking_uri(runs))
    return _result(request)


def resolve(
    stage: Stage,
    data: str | None,
    init_from: Sequence[str],
    preset: str,
    sets: Sequence[str],
    config_file: str | None,
    run: str | None,
    runs: Path,
) -> Request:
    """Fill in what the command leaves open: from the run's own record if it was begun, else the latest there is."""
    if run is not None and (not run or run in (".", "..") or Path(run).name != run):
        raise ValueError(f"--run {run!r} is no name of a folder in {runs}: leave out slashes")
    begun = runs / run / RECORD if run else None
    known = read_json(begun) if begun and begun.exists() else {}
    named = list(init_from) or list(known.get("from", {}).values())
    parents, uri = all_of(
        lambda: find_parents(stage, named, runs), lambda: str(data or known.get("data") or latest_dataset(runs))
    )
    dataset = open_dataset(uri, STAGES[stage].modalities)
    if not len(dataset):
        raise ValueError(f"{uri} holds no accepted clip: `mfctl inspect {uri}` tells why")
    config = presets.preset(preset, stage, latent_shapes(dataset))
    if config_file:
        config = config_io.change(config, config_io.read_file(config_file))
    config = config_io.change(config, config_io.parse_sets(sets))
    if config.stage != stage:
        raise ValueError(f"--stage {stage} contradicts the setting stage={config.stage}")
    request = Request(config=config, data=uri, dataset=dataset, parents=parents, run_dir=runs / (run or ""))
    name = run or f"{stage}-{_digest(request)}"
    return Request(config=config, data=uri, dataset=dataset, parents=parents, run_dir=runs / name)


def all_of(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """Both values, or one ValueError that says everything that is missing."""
    found: list[Any] = []
    missing: list[str] = []
    for find in (first, second):
        try:
            found.append(find())
        except ValueError as error:
            missing.append(str(error))
    if missing:
        raise ValueError("; ".join(missing))
    return found[0], found[1]


def latest_dataset(runs: Path) -> str:
    """The finished dataset under ``runs`` that was written last."""
    found = [p for depth in range(3) for p in runs.glob("*/" * depth + "_dataset.json") if read_json(p).get("complete")]
    if not found:
        raise ValueError(
            f"no finished dataset under {runs}: make one with `mfctl preprocess SRC {runs}/dataset`, "
            "or name one with --data DATASET"
        )
    return str(max(found, key=lambda p: p.stat().st_mtime).parent)


def find_parents(stage: Stage, named: Sequence[str], runs: Path) -> dict[Stage, Path]:
    """The export folder of one run for each parent stage: the named ones, else the latest finished under ``runs``."""
    plan = STAGES[stage]
    exports = [_named_export(name, runs) for name in named]
    parents = check_parents(stage, [(load_card(export).stage, export) for export in exports])
    missing: list[str] = []
    for parent in plan.parents:
        if parent not in parents:
            try:
                parents[parent] = _latest_export(stage, parent, runs)
            except ValueError as error:
                missing.append(str(error))
    if missing:
        raise ValueError("; ".join(missing))
    return {parent: parents[parent] for parent in plan.parents}


def _named_export(name: str, runs: Path) -> Path:
    path = Path(environment.absolute(name))
    if not path.exists() and (runs / name).exists():
        path = runs / name
    if (path / RECORD).exists() and (path / "checkpoints").is_dir() and _finished(path) is None:
        raise ValueError(f"the run {path} is not finished: run its command again, or name one of its checkpoints")
    return find_export(path)


def _latest_export(stage: Stage, parent: Stage, runs: Path) -> Path:
    outcomes = [p for depth in (1, 2) for p in runs.glob("*/" * depth + OUTCOME)]
    finished = [p.parent for p in outcomes if _finished(p.parent) and read_json(p.parent / RECORD)["stage"] == parent]
    if not finished:
        raise ValueError(
            f"stage {stage} starts from a finished {parent} run and there is none under {runs}: "
            f"run `mfctl train --stage {parent}` first, or name one with --from RUN"
        )
    return find_export(max(finished, key=lambda path: (path / OUTCOME).stat().st_mtime))


def _digest(request: Request) -> str:
    return hashlib.sha256(repr(config_io.flatten(request.record())).encode()).hexdigest()[:8]


def _check_record(request: Request) -> None:
    """Refuse to go on with a run that was begun otherwise."""
    place = request.run_dir / RECORD
    if not place.exists():
        if request.run_dir.exists() and any(p.name != "_lock" for p in request.run_dir.iterdir()):
            raise ValueError(f"{request.run_dir} exists and is no training run: choose another name with --run")
        return
    begun = {key: value for key, value in read_json(place).items() if key in request.record()}
    if lines := config_io.differences(begun, request.record()):
        more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
        raise ValueError(
            f"the run {request.run_dir} was begun with other settings: {'; '.join(lines[:4])}{more}. "
            "Use the old ones to go on with it, or another --run name to start anew"
        )


def _lease(run_dir: Path) -> Lease:
    return Lease(Store(str(run_dir)))


def _begin(request: Request) -> None:
    """Write the record of a new run; forget the outcome of one that failed."""
    place = request.run_dir / RECORD
    if not place.exists():
        names = ("torch", "deepspeed", "ray", "mlflow", "mutual-forcing")
        versions = {"python": platform.python_version()} | {name: _version(name) for name in names}
        write_json(place, {**request.record(), "versions": versions})
    (request.run_dir / OUTCOME).unlink(missing_ok=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _finished(run_dir: Path) -> Progress | None:
    """The final progress of a run that reached its end."""
    place = run_dir / OUTCOME
    facts = read_json(place) if place.exists() else {}
    return config_io.load(Progress, facts["progress"]) if "progress" in facts else None


@contextmanager
def _shown(log: Path) -> Iterator[None]:
    """Copy what the workers add to their log to standard error, without the noise of Ray's own processes."""
    stop = threading.Event()
    start = log.stat().st_size if log.exists() else 0

    def follow() -> None:
        place = start
        while True:
            ended = stop.wait(0.3)
            if log.exists():
                with log.open() as file:
                    file.seek(place)
                    sys.stderr.write(file.read())
                    place = file.tell()
                sys.stderr.flush()
            if ended:
                return

    thread = threading.Thread(target=follow, name="log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _raise_if_failed(run_dir: Path, token: str) -> None:
    place = run_dir / OUTCOME
    outcome = read_json(place) if place.exists() else {}
    if outcome.get("token") != token:
        raise RuntimeError(f"the workers of {run_dir} ended without an outcome: see their log above")
    if "error" in outcome:
        raise RuntimeError(outcome["error"])


def _sample(request: Request, sample: Sample, uri: str) -> None:
    """Once per run; its files go to the run's MLflow run."""
    place = request.run_dir / OUTCOME
    outcome = read_json(place)
    if "samples" in outcome:
        return
    paths = list(sample(request.run_dir))
    tracker = open_tracker(
        uri=uri,
        folder=request.run_dir,
        experiment="train",
        name=request.run_dir.name,
        run_id=outcome["mlflow_run"],
    )
    log_all(tracker, paths, "samples")
    tracker.finish()
    write_json(place, {**outcome, "samples": [str(path) for path in paths]})


def _result(request: Request) -> dict[str, Any]:
    """What ``--json`` prints."""
    outcome = read_json(request.run_dir / OUTCOME)
    checkpoint = complete(request.run_dir / "checkpoints")[-1]
    progress = progress_of(checkpoint)
    plan = STAGES[request.config.stage]
    return {
        "run_dir": str(request.run_dir),
        "stage": request.config.stage,
        "samples_seen": progress.samples_seen,
        "losses": {
            "first": headline(plan, progress.first),
            "last": headline(plan, progress.last),
            "held_out_first": progress.first,
            "held_out_last": progress.last,
        },
        "checkpoint": str(checkpoint),
        "mlflow_run": outcome["mlflow_run"],
        "samples": outcome.get("samples", []),
    }


def launch_on_ray(job: Job) -> None:
    """Run the job on Ray Train: in the Ray that is running, else in one started for it in this process."""
    environment.apply_defaults()
    import ray

    started = not ray.is_initialized()
    if started:
        # a submitted job joins its cluster, whose size is not ours to say
        cpus = None if "RAY_ADDRESS" in os.environ else max(os.cpu_count() or 1, job.config.engine.workers)
        ray.init(num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        _fit(job)
    finally:
        if started:
            ray.shutdown()


def _fit(job: Job) -> None:
    import ray
    from ray.train import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def enter(settings: dict[str, bytes]) -> None:
        """Pickled by value, so that Ray's own processes, which need not find our packages, can hand it on."""
        import pickle

        from workflows.worker import work

        work(pickle.loads(settings["job"]))

    engine = job.config.engine
    cpus = ray.cluster_resources().get("CPU", 1.0)
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    TorchTrainer(
        enter,
        train_loop_config={"job": pickle.dumps(job)},
        torch_config=TorchConfig(backend="nccl" if engine.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=engine.workers,
            use_gpu=engine.use_gpu,
            resources_per_worker={"CPU": min(1.0, cpus / engine.workers), **({"GPU": 1} if engine.use_gpu else {})},
        ),
        run_config=RayRunConfig(
            name=f"{job.run_dir.name}-{job.token}",
            storage_path=str(job.run_dir / "ray"),
            failure_config=FailureConfig(max_failures=engine.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": {"PYTHONPATH": path, **environment.DEFAULTS}},
        ),
    ).fit()
