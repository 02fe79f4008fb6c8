"""Ray sessions, and the settings of Ray Train and Ray workers that all commands share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preprocessing.io.local_ray import start_ray
from workflows.utils import environment


@contextmanager
def ray_session(workers: int, *, gpus: int | None = None) -> Iterator[None]:
    """Use the Ray of this process, or start one for the context, with a CPU for each of ``workers``.

    A submitted job joins its cluster, which has a fixed size. ``gpus``: logical GPUs of a new Ray (default: the GPUs of
    this machine).
    """
    environment.apply_defaults()
    import ray

    started = not ray.is_initialized()
    start_ray(num_cpus=max(os.cpu_count() or 1, workers), num_gpus=gpus)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def train_run_config(name: str, storage_path: str, **options: Any) -> Any:
    """Return a ``ray.train.RunConfig`` with quiet logs and our worker environment."""
    from ray.train import LoggingConfig, RunConfig

    return RunConfig(
        name=name,
        storage_path=storage_path,
        logging_config=LoggingConfig(log_level="WARNING"),
        worker_runtime_env=worker_runtime_env(),
        **options,
    )


def worker_runtime_env() -> dict[str, dict[str, str]]:
    """Return a runtime environment in which Ray workers find our packages, without telemetry."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"env_vars": {"PYTHONPATH": path, **environment.DEFAULT_ENV}}
