"""Whether something fits into the memory there is, said before any of it is taken."""

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
    """More memory is asked for than there is."""


def available_memory(device: torch.device) -> int | None:
    """Of a GPU, or of this machine's main memory; None where that cannot be found out."""
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
    """DoesNotFit where the bytes of ``parts`` are more than ``free``, with those of ``options`` that would fit.

    ``options``: what the user may type instead and what that would need, the nearest first.
    """
    needed = sum(parts.values())
    if free is None or needed <= free:
        return
    wanted = ", ".join(f"{n / GB:.1f} GB of {name}" for name, n in parts.items())
    fitting = [f"{typed} ({need / GB:.1f} GB)" for typed, need in ((t, f()) for t, f in options) if need <= free]
    advice = f"what fits: {', or '.join(fitting)}" if fitting else "no smaller setting known here fits either"
    raise InsufficientMemoryError(
        f"{what} needs {needed / GB:.1f} GB ({wanted}), {free / GB:.1f} GB are free: {advice}"
    )


def require_training_memory(config: RunConfig, device: str) -> None:
    """DoesNotFit where weights, gradients, moments and the average of a rank are more; activations are not counted.

    Processes on a CPU share its memory.
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
    require_memory(
        what, {"weights, gradients, moments and average": _state(weights, count, stage, sharing)}, free, options
    )


def require_training_memory_on_all_ranks(config: RunConfig) -> None:
    """The same, called by all ranks before they build anything: DoesNotFit on all of them where it is so for one."""
    said = None
    try:
        require_training_memory(config, distributed.local_device().type)
    except InsufficientMemoryError as error:
        said = str(error)
    if found := [text for text in distributed.all_gather_object(said) if text]:
        raise InsufficientMemoryError(found[0])


def _total(model: ModelConfig) -> int:
    return count_parameters(model)["total"]


def _state(weights: int, count: int, stage: int, sharing: int) -> int:
    """Bytes of training state of the ranks that share a memory."""
    return sharing * training_state_bytes(weights, count, stage)
