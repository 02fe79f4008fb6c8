"""Memory requirements, checked before allocation."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from mfcore.model.config import ModelConfig
from mfcore.model.flops import count_parameters, training_state_bytes
from workflows.config import presets
from workflows.config.latent_shapes import default_size, geometry_for_preset
from workflows.config.run import RunConfig
from workflows.utils import distributed

GB = 1e9


class InsufficientMemoryError(ValueError):
    """More memory is needed than is available."""


def available_memory(device: torch.device) -> int | None:
    """Return the free bytes of a GPU, or of main memory; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024


def require_memory(
    what: str, parts: Mapping[str, int], free: int | None, options: Sequence[tuple[str, Callable[[], int]]]
) -> None:
    """Raise InsufficientMemoryError if the bytes of ``parts`` exceed ``free``; the message has the options that fit.

    Args:
        what: Subject of the message.
        parts: Bytes by name.
        free: Available bytes; None skips the check.
        options: Alternative command options with the bytes that they need, nearest first.
    """
    needed = sum(parts.values())
    if free is None or needed <= free:
        return
    wanted = ", ".join(f"{n / GB:.1f} GB of {name}" for name, n in parts.items())
    required = {option: bytes_of_option() for option, bytes_of_option in options}
    fitting = [f"{option} ({size / GB:.1f} GB)" for option, size in required.items() if size <= free]
    advice = f"Use {', or '.join(fitting)}" if fitting else "No smaller known setting fits"
    raise InsufficientMemoryError(
        f"{what} needs {needed / GB:.1f} GB ({wanted}), {free / GB:.1f} GB are free. {advice}"
    )


def require_training_memory(config: RunConfig, device: str) -> None:
    """Raise InsufficientMemoryError if the training state of a rank exceeds the free memory.

    Activations are not counted. Ranks on a CPU share its memory.
    """
    free, count = available_memory(torch.device(device)), config.engine.max_workers
    sharing = 1 if config.engine.use_gpu else count
    weights = _total(config.model)
    stage = config.engine.zero_stage if config.engine.kind == "deepspeed" else 0
    options: list[tuple[str, Callable[[], int]]] = [
        (f"--set engine.zero_stage={other}", partial(_state, weights, count, other, sharing))
        for other in range(stage + 1, 4)
        if count > 1
    ]
    for name in reversed(presets.PRESETS):
        model = presets.build_preset(name, config.stage, geometry_for_preset(name).shapes(default_size(name))).model
        options.append((f"--preset {name}", lambda model=model: _state(_total(model), count, stage, sharing)))
    what = f"training {weights / 1e9:.1f}B parameters on {count} rank(s) at ZeRO stage {stage}"
    require_memory(what, {"weights, gradients, moments and EMA": _state(weights, count, stage, sharing)}, free, options)


def require_training_memory_on_all_ranks(config: RunConfig) -> None:
    """Check on all ranks before the networks are built; raise on all ranks if one rank has too little memory."""
    message = None
    try:
        require_training_memory(config, distributed.local_device().type)
    except InsufficientMemoryError as error:
        message = str(error)
    if found := [text for text in distributed.all_gather_object(message) if text]:
        raise InsufficientMemoryError(found[0])


def _total(model: ModelConfig) -> int:
    return count_parameters(model)["total"]


def _state(weights: int, count: int, stage: int, sharing: int) -> int:
    """Return the bytes of training state of the ranks that share a memory."""
    return sharing * training_state_bytes(weights, count, stage)
