"""Training on Ray Train: workers, their number and restarts, and preemption notices."""

import ipaddress
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from preprocessing.io.processes import scratch_prefix
from preprocessing.io.ray_resources import report_while_waiting
from workflows.checkpoints.model_card import ExportMetadata
from workflows.config.run import EngineConfig
from workflows.training import preemption
from workflows.training.async_samples import SnapshotWriter, spare_resources
from workflows.training.heartbeat import HEARTBEAT_DIR
from workflows.training.worker import TrainingJob
from workflows.utils import distributed
from workflows.utils.ray_runtime import ray_session, train_run_config, worker_runtime_env

T = TypeVar("T")
RESCALE_INTERVAL_S = 30.0  # seconds between checks for more workers in elastic runs


def run_on_ray(job: TrainingJob) -> None:
    """Run the job on Ray Train, on the running Ray cluster or one started in this process.

    After the death of a worker, all restart from the latest checkpoint, up to ``engine.max_failures`` times.
    Preemptions do not count, and their number is not limited. With ``engine.workers = [fewest, most]`` the number of
    workers follows the free resources. Ray Train then restarts all workers from the latest checkpoint.
    """
    # the handler comes after ray.init, which installs another one
    with ray_session(job.config.engine.max_workers), preemption.forward_sigterm(job.run_dir, job.token):
        _fit(job)


def run_with_gpu(work: Callable[[Path], T], run_dir: Path, engine: EngineConfig) -> T:
    """Return ``work(run_dir)``, in a Ray task with a GPU if the run needs one and this machine has none.

    The driver of a run may be on the head of a cluster, without a GPU.
    """
    import torch

    if not engine.use_gpu or torch.cuda.is_available():
        return work(run_dir)
    import ray

    with ray_session(1):
        if "RAY_ADDRESS" not in os.environ and not ray.cluster_resources().get("GPU"):
            return work(run_dir)  # not in a cluster that could add a GPU
        extra = {engine.resource: 1.0} if engine.resource else {}
        task: Any = ray.remote(num_cpus=1, num_gpus=1, resources=extra, runtime_env=worker_runtime_env())(work)
        return ray.get(task.remote(run_dir))


def _fit(job: TrainingJob) -> None:
    import ray
    from ray.train import FailureConfig
    from ray.train.torch import TorchTrainer

    scaling = _scaling_config(job.config.engine)
    spare = spare_resources(job.config.engine, scaling.resources_per_worker, ray.available_resources())
    async_samples = bool(spare) and job.config.sample_every > 0
    trainer = TorchTrainer(
        _worker_function(),
        train_loop_config={"job": pickle.dumps(job), "async_samples": async_samples},
        validation_config=_validation_config(job.run_dir, spare) if async_samples else None,
        torch_config=torch_config("nccl" if job.config.engine.use_gpu else "gloo"),
        scaling_config=scaling,
        run_config=train_run_config(
            job.token,  # Ray's storage accepts ASCII only, a run may have any name
            str(job.run_dir / "ray"),
            failure_config=FailureConfig(max_failures=job.config.engine.max_failures, max_preemption_failures=-1),
        ),
    )
    resources = ", ".join(f"{name} {amount:g}" for name, amount in (scaling.resources_per_worker or {}).items())
    what = f"machines for {job.config.engine.min_workers} workers with {resources} each"
    with report_while_waiting(what, ray.cluster_resources, seen=_heartbeat_detector(job.run_dir / HEARTBEAT_DIR)):
        trainer.fit()


def _heartbeat_detector(beats: Path) -> Callable[[], bool]:
    """Return a function that returns True after the first new heartbeat."""

    def modification_times() -> dict[str, float]:
        return {path.name: path.stat().st_mtime for path in beats.glob("*.json")}

    before = modification_times()
    return lambda: modification_times() != before


def _validation_config(run_dir: Path, spare: Mapping[str, float]) -> Any:
    """Return Ray Train's asynchronous validation: one sample report at a time, each in a separate process."""
    from ray.train import ValidationConfig

    path = str(run_dir)

    def validate(checkpoint: Any, **_: Any) -> dict[str, float]:  # local, so that it is pickled by value
        from pathlib import Path

        from workflows.training.async_samples import evaluate_snapshot

        return evaluate_snapshot(Path(checkpoint.path), Path(path))

    resources = {"num_cpus": spare["CPU"], "num_gpus": spare.get("GPU", 0)}
    return ValidationConfig(validate, ray_remote_kwargs={**resources, "runtime_env": worker_runtime_env()})


def open_snapshot_writer(metadata: ExportMetadata) -> SnapshotWriter:
    """Return the writer of snapshots, in the folder where Ray Train expects checkpoints."""
    from ray.train import Checkpoint, CheckpointUploadMode, get_context, report

    def report_snapshot(folder: Path) -> None:
        snapshot = Checkpoint.from_directory(str(folder)) if distributed.get_rank() == 0 else None
        report({}, snapshot, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD, validation=snapshot is not None)

    storage: Any = get_context().get_storage()
    return SnapshotWriter(Path(storage.experiment_fs_path), metadata, report_snapshot)


def _scaling_config(engine: EngineConfig) -> Any:
    import ray
    from ray.train import ScalingConfig

    fixed = engine.min_workers == engine.max_workers
    return ScalingConfig(
        num_workers=engine.max_workers if fixed else (engine.min_workers, engine.max_workers),
        use_gpu=engine.use_gpu,
        resources_per_worker=engine.worker_resources(ray.cluster_resources().get("CPU", 1.0)),
        elastic_resize_monitor_interval_s=RESCALE_INTERVAL_S,
    )


def set_worker_threads() -> None:
    """Set the intra-op thread count to cores / workers; Ray sets it to the CPUs reserved per worker.

    The number of cores comes from Ray: the operating system's count ignores the limit of a container.
    """
    import ray
    import torch
    from ray.train import get_context

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    cores = min(os.cpu_count() or 1, int(node["Resources"].get("CPU", 1)))
    torch.set_num_threads(max(1, cores // get_context().get_local_world_size()))


def bind_to_ray_interface() -> None:
    """Set GLOO_SOCKET_IFNAME, unless set, to the interface of this machine's address in the cluster.

    The default is the address of the host name: 127.0.1.1 on Debian, or the loopback. Other machines cannot connect to
    it, and all ranks would wait. NCCL chooses well in a cluster, but never the loopback of a Ray on one machine.
    """
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if address in {entry.address for entry in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            if ipaddress.ip_address(address).is_loopback:
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def create_store_dir() -> str:
    """Create a folder of this user for the rendezvous of the ranks on one machine; return "" in a cluster.

    In a cluster the ranks meet at a ``TCPStore``, which listens on all interfaces and serves every client.
    """
    import ray

    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        return ""
    return tempfile.mkdtemp(prefix=scratch_prefix())  # mode 0700


def _worker_function() -> Callable[[dict[str, Any]], None]:
    """Return the function of each worker.

    It is local, so that it is pickled by value: the Ray processes in between may lack this package.
    """

    def train(settings: dict[str, Any]) -> None:
        import pickle

        from ray.train.v2._internal.execution.context import get_train_context

        from workflows.training.loop import TrainingInterrupted
        from workflows.training.ray_launcher import open_snapshot_writer, preemption_error, set_worker_threads
        from workflows.training.worker import run_worker

        def preemption_reason() -> str:
            # ray.train.get_preemption_info() is a barrier through an actor; the ranks synchronize themselves
            info = get_train_context().preemption_context.preemption_info
            return f"a machine of ranks {info.preempted_ranks} is about to be reclaimed" if info else ""

        set_worker_threads()
        job = pickle.loads(settings["job"])
        snapshots = open_snapshot_writer(job.metadata) if settings["async_samples"] else None
        try:
            run_worker(job, preemption_reason, snapshots)
        except TrainingInterrupted as error:
            raise preemption_error(error) from None

    return train


def preemption_error(error: Exception) -> Exception:
    """Return the error with which Ray Train restarts a run without counting a failure.

    Ray Train counts an error of a worker as a failure, also after a preemption notice, unless it is of this kind.
    """
    from ray.exceptions import RayActorError

    return RayActorError(error_msg=str(error), preempted=True)


def torch_config(backend: str) -> Any:
    """Return the setup of torch.distributed on the network of Ray, with the SIGTERM handler in each worker.

    A worker trains in a thread, where no handler can be installed. A backend executes in the main thread. On one
    machine the ranks meet at a file: only this user can read or write it.
    """
    import ray
    from ray.train.torch import TorchConfig
    from ray.train.torch import config as ray_torch

    def install_handler() -> None:
        from workflows.training import preemption

        preemption.install_sigterm_handler()

    def bind() -> None:
        from workflows.training.ray_launcher import bind_to_ray_interface

        bind_to_ray_interface()

    def create_dir() -> str:
        from workflows.training.ray_launcher import create_store_dir

        return create_store_dir()

    class Backend(ray_torch._TorchBackend):
        def __init__(self) -> None:
            self._folder = ""

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(bind)
            self._folder = worker_group.execute_single(0, create_dir)
            if not self._folder:
                super().on_start(worker_group, backend_config)
                return
            worker_group.execute(ray_torch._set_torch_distributed_env_vars)
            ranks = [
                worker_group.execute_single_async(
                    rank,
                    ray_torch._setup_torch_process_group,
                    backend=backend,
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=f"file://{self._folder}/store",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
            ray.get(ranks)

        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(install_handler)

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            try:
                super().on_shutdown(worker_group, backend_config)
            finally:
                if self._folder:
                    shutil.rmtree(self._folder, ignore_errors=True)

    class RayTorchConfig(TorchConfig):
        @property
        def backend_cls(self):
            return Backend

    return RayTorchConfig(backend=backend)
