"""Resources that a command requires, and the check that a cluster can provide them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcore.errors import UserInputError
from workflows.jobs.command import ParsedCommand

if TYPE_CHECKING:
    from workflows.config.run import EngineConfig

Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MachineType:
    """Machines with equal resources."""

    name: str
    resources: Resources  # of one machine
    max_count: int  # maximum number


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """Processes that must run at the same time."""

    description: str
    bundle: Resources  # of one process
    count: int


def required_resources(command: ParsedCommand) -> ResourceRequest | None:
    """Return the minimum request of a command; None if it runs in the process of the job."""
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
    written = load_config_file(file) if file and Path(file).exists() else {}  # it may exist on the cluster only
    for values in (written, parse_overrides(command.sets)):
        config = apply_overrides(
            config, {name: value for name, value in values.items() if name in ("workers", "encoder")}
        )
    if config.workers == 0:
        return None
    return ResourceRequest(description="preprocess", bundle=config.worker_resources, count=1)


def driver_resources(command: ParsedCommand, machines: Sequence[MachineType]) -> dict[str, float]:
    """Return the resources of a command's own process; {} if it does not compute and may run on the head.

    Ray starts a job's driver on the head node unless resources are requested; our head nodes must not compute.
    """
    if not command.driver_only or not command.values:
        return {}
    if command.verb == "evaluate" and command.values.get("workers", 1) > 1:  # Ray workers compute
        return {}
    gpu = command.verb != "study" or str(command.values.get("device", "")).startswith("cuda")
    if gpu and capacity(machines, {"GPU": 1.0}):
        return {"GPU": 1.0}
    return {"CPU": 1.0} if capacity(machines, {"CPU": 1.0}) else {}


def total_resources(machines: Sequence[MachineType]) -> dict[str, float]:
    """Return CPUs and GPUs of all machines; CPUs of GPU machines count only if there are no other machines."""
    plain = [kind for kind in machines if not kind.resources.get("GPU")]
    totals = {"CPU": _sum(plain, "CPU") or _sum(machines, "CPU"), "GPU": _sum(machines, "GPU")}
    return {name: amount for name, amount in totals.items() if amount}


def _sum(machines: Sequence[MachineType], resource: str) -> float:
    return sum(kind.max_count * kind.resources.get(resource, 0.0) for kind in machines)


def _engine(command: ParsedCommand) -> "EngineConfig":
    """Return the configuration of the engine; it does not depend on the latent shapes."""
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
    """Return the number of processes with this bundle that fit on all machines."""
    return sum(kind.max_count * _capacity_of_one(kind, bundle) for kind in machines)


def _capacity_of_one(kind: MachineType, bundle: Resources) -> int:
    ratios = [kind.resources.get(name, 0.0) / amount + 1e-9 for name, amount in bundle.items() if amount > 0]
    return floor(min(ratios, default=inf))


def require_capacity(need: ResourceRequest | None, machines: Sequence[MachineType], target: str) -> None:
    """Raise ValueError if the request does not fit on the cluster, even with all its machines."""
    if need is None:
        return
    found = capacity(machines, need.bundle)
    if found >= need.count:
        return
    has = (
        "; ".join(f"{kind.name}: up to {kind.max_count} with {_format(kind.resources)}" for kind in machines) or "none"
    )
    raise UserInputError(
        f"{need.description} needs {need.count} processes with {_format(need.bundle)} each, and {target} has room for "
        f"{found} (machines: {has}). Request less (--set engine.workers=N), or add machines to the cluster file"
    )


def _format(resources: Resources) -> str:
    amounts = [f"{name} {amount:g}" for name, amount in sorted(resources.items()) if _countable(name)]
    return ", ".join(amounts) or "nothing"


def _countable(name: str) -> bool:
    """Return False for the resources that Ray adds: memory, and one name per node."""
    return "memory" not in name and not name.startswith(("node:", "accelerator_type:"))


def machine_types_of_cluster_file(config: Mapping[str, Any]) -> list[MachineType]:
    """Return the machine types of a Ray cluster file with the head's; [] for the provider ``local``."""
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
    """Return the groups of a KubeRay cluster, head first; resources are pod limits unless rayStartParams override."""
    head = spec["headGroupSpec"]
    found = [MachineType(name="head", resources=_pod_resources(head), max_count=1)]
    for group in spec.get("workerGroupSpecs", []):
        most = group.get("maxReplicas", group.get("replicas", 1))
        found.append(MachineType(name=group["groupName"], resources=_pod_resources(group), max_count=most))
    return found


def _pod_resources(group: Mapping[str, Any]) -> dict[str, float]:
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    amounts = {"CPU": _quantity(limits.get("cpu", 0)), "GPU": _quantity(limits.get("nvidia.com/gpu", 0))}
    for key, name in (("num-cpus", "CPU"), ("num-gpus", "GPU")):
        if key in group.get("rayStartParams", {}):
            amounts[name] = float(group["rayStartParams"][key])
    return {name: amount for name, amount in amounts.items() if amount}


def _quantity(text: object) -> float:
    """Parse a Kubernetes CPU quantity: 2, "2" or "500m"."""
    value = str(text)
    return float(value[:-1]) / 1000 if value.endswith("m") else float(value)


def merge_equal(machines: Sequence[MachineType]) -> list[MachineType]:
    """Merge machines with equal resources into one type."""
    kinds: dict[tuple[tuple[str, float], ...], MachineType] = {}
    for one in machines:
        plain = {name: amount for name, amount in one.resources.items() if _countable(name)}
        key = tuple(sorted(plain.items()))
        before = kinds[key].max_count if key in kinds else 0
        kinds[key] = replace(kinds.get(key, one), resources=plain, max_count=before + one.max_count)
    return list(kinds.values())
