"""What a command asks of a cluster, and whether the cluster can ever give it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.jobs.command import ParsedCommand

if TYPE_CHECKING:
    from workflows.config.run import EngineConfig

Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MachineType:
    """Machines of one kind."""

    name: str
    resources: Resources  # of one of them
    max_count: int  # how many there can be


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """Processes that must run at the same time."""

    description: str
    bundle: Resources  # of one process
    count: int


def required_resources(command: ParsedCommand) -> ResourceRequest | None:
    """The least with which a command runs; None when it runs in the job's own process."""
    if command.verb == "preprocess":
        return _preprocess(command)
    if command.verb != "train" or not command.values:
        return None
    engine = _engine(command)
    return ResourceRequest(
        description=f"train with engine.workers={engine.workers}",
        bundle=engine.worker_resources(inf if engine.use_gpu else 1.0),
        count=engine.min_workers,
    )


def _preprocess(command: ParsedCommand) -> ResourceRequest | None:
    from preprocessing.config import PreprocessConfig
    from workflows.config.serialization import apply_overrides, load_config_file, parse_overrides

    config = PreprocessConfig()
    file = command.values.get("config")
    written = load_config_file(file) if file and Path(file).exists() else {}  # it may be there alone
    for values in (written, parse_overrides(command.sets)):
        config = apply_overrides(
            config, {name: value for name, value in values.items() if name in ("workers", "encoder")}
        )
    bundle = {"CPU": 1.0} | ({"GPU": config.encoder.gpus} if config.encoder.gpus else {})
    return None if config.workers == 0 else ResourceRequest(description="preprocess", bundle=bundle, count=1)


def driver_resources(command: ParsedCommand, machines: Sequence[MachineType]) -> dict[str, float]:
    """What the process of a command must be given that computes by itself; {} where it only leads, and the head may.

    Ray runs the process of a job on the head unless it is told what it needs, and heads here lead only.
    """
    if not command.driver_only or not command.values:
        return {}
    if command.verb == "evaluate" and command.values.get("workers", 1) > 1:  # these are Ray's
        return {}
    gpu = command.verb != "study" or str(command.values.get("device", "")).startswith("cuda")
    if gpu and capacity(machines, {"GPU": 1.0}):
        return {"GPU": 1.0}
    return {"CPU": 1.0} if capacity(machines, {"CPU": 1.0}) else {}


def total_resources(machines: Sequence[MachineType]) -> dict[str, float]:
    """GPUs and CPUs of all machines together; of those with GPUs the CPUs count only where there are no others."""
    plain = [kind for kind in machines if not kind.resources.get("GPU")]
    cpus, gpus = (
        sum(k.max_count * k.resources.get(name, 0.0) for k in some)
        for name, some in (("CPU", plain), ("GPU", machines))
    )
    cpus = cpus or sum(k.max_count * k.resources.get("CPU", 0.0) for k in machines)
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def _engine(command: ParsedCommand) -> "EngineConfig":
    """The engine's configuration, whatever the latents: presets of one name have the same for all."""
    from mfcore.types import AUDIO, VIDEO
    from workflows.config import latent_shapes, presets, serialization

    shapes = latent_shapes.LatentShapes(
        channels={VIDEO: 48, AUDIO: 64},
        size={VIDEO: (8, 8), AUDIO: (1, 1)},
        static_channels={VIDEO: 0, AUDIO: 0},
        text_dim=64,
        chunk_seconds=0.5,
        chunks=20,
    )
    engine = presets.build_preset(command.values["preset"], command.values["stage"], shapes).engine
    written = serialization.load_config_file(command.values["config"]) if command.values.get("config") else {}
    for values in (written, serialization.parse_overrides(command.sets)):
        engine = serialization.apply_overrides(engine, values.get("engine", {}))
    return engine


def capacity(machines: Sequence[MachineType], bundle: Resources) -> int:
    """How many processes of one bundle fit on all machines together."""
    wanted = {name: amount for name, amount in bundle.items() if amount > 0}
    return sum(
        kind.max_count * floor(min((kind.resources.get(r, 0.0) / n + 1e-9 for r, n in wanted.items()), default=inf))
        for kind in machines
    )


def require_capacity(need: ResourceRequest | None, machines: Sequence[MachineType], target: str) -> None:
    """ValueError with the remedy when the cluster could not run it even with all its machines."""
    if need is None or (found := capacity(machines, need.bundle)) >= need.count:
        return
    has = "; ".join(f"{kind.name}: up to {kind.max_count} with {_show(kind.resources)}" for kind in machines) or "none"
    raise ValueError(
        f"{need.description} needs room for {need.count} processes with {_show(need.bundle)} each, "
        f"and {target} has room for {found} "
        f"(machines: {has}): ask for less (--set engine.workers=N), or add machines to the cluster's file"
    )


def _show(resources: Resources) -> str:
    amounts = [f"{name} {amount:g}" for name, amount in sorted(resources.items()) if _countable(name)]
    return ", ".join(amounts) or "nothing"


def _countable(name: str) -> bool:
    """Not what Ray adds for itself: memory, and one name per node."""
    return "memory" not in name and not name.startswith(("node:", "accelerator_type:"))


def machine_types_of_cluster_file(config: Mapping[str, Any]) -> list[MachineType]:
    """The kinds of a Ray cluster file, the head's among them; [] where the file does not say (provider ``local``)."""
    total = config.get("max_workers", inf)
    kinds = [
        MachineType(
            name=name,
            resources=kind.get("resources", {}),
            max_count=1 if name == config["head_node_type"] else min(total, kind.get("max_workers", total)),
        )
        for name, kind in config.get("available_node_types", {}).items()
    ]
    return [kind for kind in kinds if kind.max_count > 0]


def machine_types_of_ray_cluster(spec: Mapping[str, Any]) -> list[MachineType]:
    """The groups of a KubeRay cluster, its head first. Ray counts a pod's limits unless told otherwise."""
    head = spec["headGroupSpec"]
    found = [MachineType(name="head", resources=_pod(head), max_count=1)]
    for group in spec.get("workerGroupSpecs", []):
        most = group.get("maxReplicas", group.get("replicas", 1))
        found.append(MachineType(name=group["groupName"], resources=_pod(group), max_count=most))
    return found


def _pod(group: Mapping[str, Any]) -> dict[str, float]:
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    asked = {"CPU": _quantity(limits.get("cpu", 0)), "GPU": _quantity(limits.get("nvidia.com/gpu", 0))}
    for key, name in (("num-cpus", "CPU"), ("num-gpus", "GPU")):
        if key in group.get("rayStartParams", {}):
            asked[name] = float(group["rayStartParams"][key])
    return {name: amount for name, amount in asked.items() if amount}


def _quantity(text: object) -> float:
    """Kubernetes' way to write processors: 2, "2" or "500m"."""
    word = str(text)
    return float(word[:-1]) / 1000 if word.endswith("m") else float(word)


def merge_equal(machines: Sequence[MachineType]) -> list[MachineType]:
    """Machines with equal resources as one kind."""
    kinds: dict[tuple[tuple[str, float], ...], MachineType] = {}
    for one in machines:
        plain = {name: amount for name, amount in one.resources.items() if _countable(name)}
        key = tuple(sorted(plain.items()))
        kinds[key] = (
            replace(kinds[key], max_count=kinds[key].max_count + one.max_count)
            if key in kinds
            else replace(one, resources=plain)
        )
    return list(kinds.values())
