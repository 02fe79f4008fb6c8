"""Process work units into files and markers, through Ray Data or in this process.

A worker processes the sources of a unit, writes the files of the unit and its marker last. Only small summaries pass
through Ray; frames stay in the worker.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import floor
from typing import Any

import torch

from mfcore.errors import UserInputError
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.repair import try_marker
from preprocessing.dataset.units import WorkUnit
from preprocessing.encoder_pool import (
    GroupEncoder,
    LoadEncoders,
    UnitAssembler,
    UnitResult,
    decode_units,
    unit_result,
    write_encoded_unit,
)
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.local_ray import start_ray
from preprocessing.io.processes import delete_stale_scratch
from preprocessing.io.ray_resources import max_resources, report_while_waiting, resources_available
from preprocessing.io.storage import Store
from preprocessing.pipeline import StepTimer, build_encoders, process_sources
from preprocessing.steps.caption import load_captioner
from preprocessing.steps.encode import Encoders
from preprocessing.steps.transcribe import load_whisper
from preprocessing.unit_files import unit_row, write_unit

_SHOWN = 5  # warnings about sources
BLOCK_BYTES = 32 << 20  # of decoded clips between the operators; a larger group is one block
MAX_WRITING = 32  # finished units that are being written
NO_MEMORY = 0
"""Memory that a task requests. By default Ray Data requests the size of its result, and an autoscaler that lacks the
memory of its machine types, as on Google Cloud, never starts a machine for such a task."""
OnUnitDone = Callable[[dict[str, Any], Mapping[str, float]], None]
"""Called with the marker of a finished unit and the seconds of each step."""


def process_unit(
    unit: WorkUnit,
    store: Store,
    token: str,
    config: PreprocessConfig,
    *,
    encoders: Encoders,
    timer: StepTimer | None = None,
) -> dict[str, Any]:
    """Process a unit, publish its files and its marker; return the marker.

    Raise LeaseLostError if another driver has the lease, InfrastructureError if storage fails.
    """
    timer = timer or StepTimer()
    found = process_sources(unit.sources, config, encoders, timer)
    rows = (unit_row(source, clip, config, encoders) for source, clip in found)
    return write_unit(unit, rows, store=store, token=token, config=config, encoders=encoders, timer=timer)


# ----------------------------------------------------------------------------------------------------------- all units


class _Worker:
    """Worker that maps a unit to its marker or error. A Ray actor keeps its codecs loaded."""

    def __init__(self, store_uri: str, token: str, config: PreprocessConfig) -> None:
        torch.set_num_threads(1)  # one worker per CPU
        delete_stale_scratch()
        self._store, self._token, self._config = Store(store_uri), token, config
        self._encoders = _cached_encoders(config)

    def __call__(self, row: dict[str, Any]) -> UnitResult:
        unit = WorkUnit.from_json(row["unit"])
        timer = StepTimer()
        try:
            # a block of several units is repeated if its worker dies: finished ones have a marker
            marker = try_marker(self._store, unit.marker) or process_unit(
                unit, self._store, self._token, self._config, encoders=self._encoders, timer=timer
            )
        except (InfrastructureError, OSError) as error:  # a message: Ray would add long tracebacks
            return unit_result(outage=str(error) or repr(error))
        return unit_result(marker, timer)


@lru_cache(maxsize=1)
def _cached_encoders(config: PreprocessConfig) -> Encoders:
    """Load the codecs once per process."""
    encoders = build_encoders(config)
    encoders.load()
    if config.whisper:
        load_whisper(config.whisper, config.device)
    if config.caption and config.caption.weights:
        load_captioner(config.caption, config.device)
    return encoders


@lru_cache(maxsize=1)
def _cached_worker(store_uri: str, token: str, config: PreprocessConfig) -> _Worker:
    return _Worker(store_uri, token, config)


def _run_task(row: dict[str, Any], store_uri: str, token: str, config: PreprocessConfig) -> UnitResult:
    """Process a unit as a Ray task, for codecs without weights."""
    return _cached_worker(store_uri, token, config)(row)


def process_units(
    units: Sequence[WorkUnit], store: Store, token: str, config: PreprocessConfig, *, on_done: OnUnitDone
) -> None:
    """Process all units through Ray Data, or in this process for ``workers=0``.

    Raise the errors of `process_unit`.
    """
    delete_stale_scratch()
    warnings = _SourceWarnings()
    if config.workers == 0:
        encoders = _cached_encoders(config)
        for unit in units:
            timer = StepTimer()
            marker = process_unit(unit, store, token, config, encoders=encoders, timer=timer)
            warnings.add(list(timer.warnings))
            on_done(marker, timer.seconds)
    elif units:
        for marker, spent, texts in _run_on_ray(units, store, token, config):
            warnings.add(texts)
            on_done(marker, spent)
        delete_stale_scratch()  # left by workers that were killed
        store.delete_temporary()
    warnings.report_rest()


class _SourceWarnings:
    """Prints the first warnings about sources and counts the others."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, messages: Sequence[str]) -> None:
        """Print the messages unless there were many."""
        for message in messages:
            self._count += 1
            if self._count <= _SHOWN:
                print(f"warning: {message}", file=sys.stderr, flush=True)

    def report_rest(self) -> None:
        """Print the number of the messages that were not printed."""
        if self._count > _SHOWN:
            print(f"warning: {self._count - _SHOWN} more files next to sources likewise", file=sys.stderr, flush=True)


def _run_on_ray(
    units: Sequence[WorkUnit], store: Store, token: str, config: PreprocessConfig
) -> Iterator[tuple[dict[str, Any], dict[str, float], list[str]]]:
    """Yield the marker, the seconds of each step and the warnings of each finished unit."""
    start_ray()
    import ray

    available = ray.cluster_resources
    config = replace(config, workers=worker_count(len(units), config, max_resources(available())))
    seen = resources_available(config.worker_resources, available)
    run = run_encoder_pool if config.encoder.gpus > 0 and config.uses_models else _run_workers
    with report_while_waiting(f"machines for {config.workers} workers", available, seen=seen):
        for row in run(units, store, token, config):
            if row["outage"]:
                raise InfrastructureError(row["outage"])
            yield json.loads(row["marker"]), json.loads(row["spent"]), json.loads(row["warnings"])


def _run_workers(
    units: Sequence[WorkUnit], store: Store, token: str, config: PreprocessConfig
) -> Iterator[Mapping[str, Any]]:
    """Process each unit in one worker: decode, encode and write. Yield the results of `_Worker`."""
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    arguments = (store.uri, token, config)
    options: dict[str, Any] = {"num_cpus": 1, "memory": NO_MEMORY}
    actor: Any = _Worker  # one instance per worker
    if config.uses_models:
        compute = ActorPoolStrategy(min_size=1, max_size=config.workers)
        results = _unit_rows(units).map(actor, fn_constructor_args=arguments, compute=compute, **options)
    else:
        task: Any = _run_task  # fn_args follow the row
        results = _unit_rows(units).map(task, fn_args=arguments, compute=TaskPoolStrategy(config.workers), **options)
    yield from results.iter_rows()


def run_encoder_pool(
    units: Sequence[WorkUnit], store: Store, token: str, config: PreprocessConfig, *, load: LoadEncoders | None = None
) -> Iterator[Mapping[str, Any]]:
    """Decode units on CPU workers, encode them in a pool of GPU actors, and write finished units in tasks.

    Args:
        units: Units to process.
        store: Dataset.
        token: Token of the lease.
        config: Configuration with ``workers`` decoders, and encoders with ``encoder.gpus`` of a GPU each.
        load: Returns the encoders of an actor (default: the codecs of the configuration).
    """
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    encoders = encoder_count(len(units), config, max_resources(ray.cluster_resources()))
    ray.data.DataContext.get_current().target_max_block_size = min(config.encoder.ahead_bytes, BLOCK_BYTES)
    options: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "memory": NO_MEMORY}
    decoded = _unit_rows(units).map_batches(
        decode_units, fn_args=(config,), compute=TaskPoolStrategy(config.workers), num_cpus=1, **options
    )
    encoder: Any = GroupEncoder
    encoded = decoded.map_batches(
        encoder,
        fn_constructor_args=(config, load or _cached_encoders),
        compute=ActorPoolStrategy(min_size=1, max_size=encoders),
        num_cpus=0,
        num_gpus=config.encoder.gpus,
        zero_copy_batch=True,
        **options,
    )
    write_task: Any = write_encoded_unit
    write = ray.remote(num_cpus=0)(write_task)
    assembler, running = UnitAssembler(units), list[Any]()
    for table in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in table.drop_columns(["arrays"]).to_pylist():
            if finished := assembler.add(row):
                running.append(write.remote(finished, store_uri=store.uri, token=token, config=config))
        done, running = _finished(running, limit=MAX_WRITING)
        yield from done
    yield from ray.get(running)


def _finished(running: list[Any], limit: int) -> tuple[list[Mapping[str, Any]], list[Any]]:
    """Return the results of finished tasks and the other tasks; wait while more than `limit` are running."""
    import ray

    if not running:
        return [], []
    wanted = max(0, len(running) - limit)
    done, rest = ray.wait(running, num_returns=max(1, wanted), timeout=None if wanted else 0)
    return ray.get(done), rest


def _unit_rows(units: Sequence[WorkUnit]) -> Any:
    """Return a Ray dataset with a block per unit, up to a limit of Ray: the unit of scheduling and retries."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is reported by on_done
    return ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=min(len(units), 4096))


def worker_count(units: int, config: PreprocessConfig, limits: Mapping[str, float]) -> int:
    """Return the number of workers, or of decoders in front of an encoder pool, within the CPUs of `limits`.

    Raise ValueError if neither the CPUs nor ``workers`` are known.
    """
    cpus = limits.get("CPU", 0.0)
    if config.workers is None and cpus < 1:
        raise UserInputError("this cluster has no CPU yet, and its limit is unknown: set workers=N")
    return int(min(units, config.workers or cpus))


def encoder_count(units: int, config: PreprocessConfig, limits: Mapping[str, float]) -> int:
    """Return the largest size of the encoder pool, within the GPUs of `limits`.

    Raise ValueError if they do not fit a single encoder.
    """
    gpus = config.encoder.gpus
    if not limits.get("CPU") and not limits.get("GPU"):  # a head node without CPUs does not report limits
        return units
    count = floor(min(float(units), limits.get("GPU", 0.0) / gpus + 1e-9))
    if not count:
        raise UserInputError(f"encoder.gpus={gpus}: Ray sees no such share of a GPU. Set encoder.gpus=0 to use the CPU")
    return count
