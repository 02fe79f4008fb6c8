"""Run one function on all ranks, under Ray Train or as plain processes."""

import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from workflows.config.run import EngineConfig
from workflows.utils.ray_runtime import ray_session, train_run_config

A = TypeVar("A")
R = TypeVar("R")


def run_on_ranks(function: Callable[[A], R], argument: A, engine: EngineConfig, *, on_ray: bool) -> R:
    """Run picklable ``function(argument)`` on all ranks of ``engine``; return rank 0's result."""
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
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from workflows.training.ray_launcher import torch_config

    def run_rank(settings: dict[str, bytes]) -> bytes:
        """Run the call. Pickled by value: Ray's own processes need not find our packages."""
        import pickle

        function, argument = pickle.loads(settings["call"])
        return pickle.dumps(function(argument))

    result = TorchTrainer(
        run_rank,
        train_loop_config={"call": call},
        torch_config=torch_config("nccl" if engine.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=engine.max_workers,
            use_gpu=engine.use_gpu,
            resources_per_worker=engine.worker_resources(ray.cluster_resources().get("CPU", 1.0)),
        ),
        run_config=train_run_config("bench", folder),
    ).fit()
    assert result.return_value is not None, "Ray Train returned no result"
    return pickle.loads(result.return_value)


def _on_processes(function: Callable[[A], R], argument: A, engine: EngineConfig) -> R:
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder:
        call = _RankCall(function=function, argument=argument, engine=engine, result=Path(folder) / "result")
        spawn(_run_rank, (call,), nprocs=engine.max_workers, join=True)
        return pickle.loads(call.result.read_bytes())


@dataclass(frozen=True, kw_only=True)
class _RankCall(Generic[A, R]):
    function: Callable[[A], R]
    argument: A
    engine: EngineConfig
    result: Path  # written by rank 0; the file next to it is the rendezvous of the ranks


def _run_rank(rank: int, call: _RankCall[A, R]) -> None:
    import torch
    import torch.distributed as dist

    use_gpu = call.engine.use_gpu
    if use_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if use_gpu else "gloo",
        init_method=f"file://{call.result.with_name('store')}",
        rank=rank,
        world_size=call.engine.max_workers,
    )
    result = call.function(call.argument)
    if rank == 0:
        call.result.write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
