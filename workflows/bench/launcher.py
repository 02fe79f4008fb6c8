"""Run one function on all ranks of a bench, under Ray Train or as plain processes, and bring back what rank 0 says."""

import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from workflows.config.run import EngineConfig
from workflows.utils.ray_runtime import ray_session, worker_runtime_env

A = TypeVar("A")
R = TypeVar("R")


def run_on_ranks(function: Callable[[A], R], argument: A, engine: EngineConfig, *, on_ray: bool) -> R:
    """``function(argument)`` on ``engine.most`` ranks; both must be importable by name."""
    if on_ray:
        return _on_ray(function, argument, engine)
    if engine.max_workers == 1:
        return function(argument)
    return _on_processes(function, argument, engine)


def _on_ray(function: Callable[[A], R], argument: A, engine: EngineConfig) -> R:
    with ray_session(engine.max_workers), tempfile.TemporaryDirectory() as folder:
        return _fit(pickle.dumps((function, argument)), engine, folder)


def _fit(call: bytes, engine: EngineConfig, folder: str) -> Any:
    import ray
    from ray.train import LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def enter(settings: dict[str, bytes]) -> bytes:
        """Pickled by value, so that Ray's own processes, which need not find our packages, can hand it on."""
        import pickle

        function, argument = pickle.loads(settings["call"])
        return pickle.dumps(function(argument))

    cpus = ray.cluster_resources().get("CPU", 1.0)
    result = TorchTrainer(
        enter,
        train_loop_config={"call": call},
        torch_config=TorchConfig(backend="nccl" if engine.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=engine.max_workers,
            use_gpu=engine.use_gpu,
            resources_per_worker={"CPU": min(1.0, cpus / engine.max_workers), **({"GPU": 1} if engine.use_gpu else {})},
        ),
        run_config=RunConfig(
            name="bench",
            storage_path=folder,
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env=worker_runtime_env(),
        ),
    ).fit()
    assert result.return_value is not None, "Ray Train gave nothing back"
    return pickle.loads(result.return_value)


def _on_processes(function: Callable[[A], R], argument: A, engine: EngineConfig) -> R:
    from torch.multiprocessing.spawn import spawn

    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        spawn(_enter, (engine, port, folder, function, argument), nprocs=engine.max_workers, join=True)
        return pickle.loads((Path(folder) / "result").read_bytes())


def _enter(rank: int, engine: EngineConfig, port: int, folder: str, function: Callable[[A], R], argument: A) -> None:
    import torch
    import torch.distributed as dist

    if engine.use_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if engine.use_gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=engine.max_workers,
    )
    result = function(argument)
    if rank == 0:
        (Path(folder) / "result").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
