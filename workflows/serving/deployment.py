"""Replicas of the server on Ray Serve: ``mfctl serve --ray``, and the application of a KubeRay RayService.

A WebSocket lives on its replica, so its sessions do too. The state of every session is stored regularly where all
replicas read it: if a replica is lost, its clients resume on another one.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from pydantic import BaseModel, Field
from ray import serve

from mfcore.errors import UserInputError, check_range
from preprocessing.io.processes import scratch_dir
from workflows.checkpoints.load import find_export, load_metadata
from workflows.inference.sampling import MAX_STEPS
from workflows.serving.access import AccessPolicy
from workflows.serving.app import create_app
from workflows.serving.engine import EngineLimits, ServingEngine
from workflows.serving.server import (
    DRAIN_SECONDS,
    SEND_SECONDS,
    ServerOptions,
    claim_port,
    free_memory,
    is_loopback,
    load_talker,
    page_url,
    stop_signals,
)
from workflows.serving.service import SessionService
from workflows.serving.snapshots import SnapshotStore
from workflows.serving.talker import Talker
from workflows.utils.ray_runtime import ray_session, worker_runtime_env

APPLICATION = "live"
TOKEN_VARIABLE = "MFCTL_SERVE_TOKEN"
MAX_REPLICAS = 1024
_WATCH_S = 0.2
_OTHER_REQUESTS = 64  # besides the sessions of a replica: a full engine refuses by itself, with a retry time
_FILL = 0.75  # share of the sessions of all replicas above which another one starts
_HEALTH_S = 5.0
END_SECONDS = DRAIN_SECONDS + 5  # to drain all replicas, and to stop Ray Serve


class LiveArguments(BaseModel):
    """Arguments of the application; ``args`` in a Serve config file."""

    checkpoint: str
    snapshots: str = ""  # folder or s3:// prefix that all replicas share
    sessions: int = Field(default=4, ge=1)  # of a replica
    replicas: int = 1
    max_replicas: int | None = None  # None: `replicas`
    steps: int | None = None
    device: str | None = None
    token: str | None = None  # None: the variable MFCTL_SERVE_TOKEN of the replica
    local: bool = False  # reachable from this machine only: needs no token
    snapshot_seconds: float = Field(default=2.0, gt=0)  # between two states of a running session


class LiveReplica:
    """One replica: an engine with its application."""

    def __init__(self, arguments: LiveArguments, load: Callable[[], Talker] | None = None) -> None:
        """Load the network and warm up. Raises RuntimeError if the warm-up fails."""
        if arguments.local:
            _use_loopback()
        token = arguments.token or os.environ.get(TOKEN_VARIABLE)
        if not token and not arguments.local:
            raise UserInputError(f"the replica has no token: set {TOKEN_VARIABLE} in its environment")
        talker = load() if load else load_talker(arguments.checkpoint, steps=arguments.steps, device=arguments.device)
        options = ServerOptions()
        limits = EngineLimits(
            sessions=arguments.sessions,
            memory_bytes=free_memory(talker.device),
            snapshot_seconds=arguments.snapshot_seconds,
        )
        self._engine = ServingEngine(talker, limits=limits, snapshots=SnapshotStore(arguments.snapshots))
        self._policy = AccessPolicy(token, messages_per_second=options.messages_per_second)
        self._engine.start()
        self._engine.warmed_up.wait()
        self.check_health()
        threading.Thread(target=self._drain_when_stopped, name="drain", daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application; Serve calls it after the constructor."""
        return create_app(SessionService(self._engine), self._policy)

    def check_health(self) -> None:
        """Raise RuntimeError if the engine does not run: Serve then starts another replica."""
        if not self._engine.ready.is_set() or not self._engine.is_running:
            raise RuntimeError("the engine of the replica does not run")

    async def drain(self) -> None:
        """End all sessions with snapshots, and give their last messages time."""
        await asyncio.to_thread(self._engine.shutdown, DRAIN_SECONDS)
        await asyncio.sleep(SEND_SECONDS)

    def _drain_when_stopped(self) -> None:
        """End the sessions when Serve stops this replica: it waits for open connections and does not notify them."""
        while not _is_stopping():
            time.sleep(_WATCH_S)
        self._engine.shutdown(DRAIN_SECONDS)


def _use_loopback() -> None:
    """Make the gRPC server of this replica, which starts after the constructor, listen on the loopback only."""
    from ray.serve._private import replica as module

    replica: Any = module
    listen = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: listen(server, "127.0.0.1:0")


def _is_stopping() -> bool:
    """Return True after Serve has begun to stop the replica of this process. Serve has no public way to ask."""
    from ray._private.worker import global_worker

    replicas = [getattr(actor, "_replica_impl", None) for actor in global_worker.actors.values()]
    return any(getattr(replica, "_shutting_down", False) for replica in replicas)


def _check_replicas(arguments: LiveArguments) -> None:
    most = arguments.max_replicas
    check_range("--replicas", arguments.replicas, 1, MAX_REPLICAS)
    check_range("--max-replicas", most, 1, MAX_REPLICAS)
    if most is not None and most < arguments.replicas:
        raise UserInputError(f"--max-replicas {most}: below --replicas {arguments.replicas}. Use at least as many.")


def application(arguments: LiveArguments) -> serve.Application:
    """Return the application: ``import_path`` of a Serve config file."""
    return bind_replicas(arguments)


def bind_replicas(arguments: LiveArguments, load: Callable[[], Talker] | None = None) -> serve.Application:
    """Return the application; ``load`` returns the network in place of that of the checkpoint."""
    _check_replicas(arguments)
    most = arguments.max_replicas or arguments.replicas
    scaling: dict[str, Any] = {"num_replicas": arguments.replicas}
    if most > arguments.replicas:
        target = max(1.0, _FILL * arguments.sessions)
        scaling = {
            "autoscaling_config": {
                "min_replicas": arguments.replicas,
                "max_replicas": most,
                "target_ongoing_requests": target,  # an open session is an ongoing request
                "upscale_delay_s": 5.0,
                "downscale_delay_s": 120.0,
            }
        }
    on_gpu = arguments.device == "cuda"
    deployment: Any = serve.deployment(
        serve.ingress()(LiveReplica),
        name=LiveReplica.__name__,
        **scaling,
        max_ongoing_requests=arguments.sessions + _OTHER_REQUESTS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=END_SECONDS,
        health_check_period_s=_HEALTH_S,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": 1 if on_gpu else 0,
            "runtime_env": worker_runtime_env(),
        },
    )
    return deployment.bind(arguments, load)


def serve_on_ray(
    options: ServerOptions,
    arguments: LiveArguments,
    *,
    on_ready: Callable[[str], None],
    load: Callable[[], Talker] | None = None,
) -> None:
    """Serve with replicas on the Ray of ``RAY_ADDRESS``, or on a new one, until SIGINT or SIGTERM.

    Address, token and snapshots are those of ``options``. ``on_ready`` gets the URL when all replicas are warm.
    ``load`` returns the network in place of that of the checkpoint. Raises UserInputError for wrong input.
    """
    _check_replicas(arguments)
    check_range("--steps", arguments.steps, 1, MAX_STEPS)
    if load is None:
        load_metadata(find_export(arguments.checkpoint))  # a wrong path is refused before Ray starts
    if not options.snapshots and "RAY_ADDRESS" in os.environ:
        raise UserInputError(
            "--snapshots: replicas on several machines need a common place. Add --snapshots with a folder that all "
            "of them mount, or an s3:// prefix."
        )
    port = claim_port(options)
    with ExitStack() as open_:
        folder = options.snapshots or str(open_.enter_context(scratch_dir()))
        open_.enter_context(ray_session(arguments.max_replicas or arguments.replicas))
        open_.enter_context(_serve_instance(options.host, port))
        on_gpu = arguments.device is None and ray.cluster_resources().get("GPU")
        changes = {
            "snapshots": folder,
            "token": options.token,
            "local": is_loopback(options.host),
            "device": "cuda" if on_gpu else arguments.device,
        }
        handle = serve.run(bind_replicas(arguments.model_copy(update=changes), load), name=APPLICATION)
        with stop_signals() as stop:
            on_ready(page_url(options.host, port))
            stop.wait()
            _run_at_most(END_SECONDS, lambda: handle.broadcast("drain").results(return_exceptions=True))


@contextmanager
def _serve_instance(host: str, port: int) -> Generator[None]:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    try:
        yield
    finally:
        _run_at_most(END_SECONDS, serve.shutdown)


def _run_at_most(seconds: float, work: Callable[[], object]) -> None:
    """Run a function, and leave it after some seconds: calls of Ray may never return if one of its processes died."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
