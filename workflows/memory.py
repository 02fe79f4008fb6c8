"""Whether something fits into the memory there is, said before any of it is taken."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

GB = 1e9


def free_bytes(device: torch.device) -> int | None:
    """Of a GPU, or of this machine's main memory; None where that cannot be found out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024


def refuse_what_does_not_fit(
    what: str, parts: Mapping[str, int], free: int | None, options: Sequence[tuple[str, Callable[[], int]]]
) -> None:
    """ValueError where the bytes of ``parts`` are more than ``free``, with those of ``options`` that would fit.

    ``options``: what the user may type instead and what that would need, the nearest first.
    """
    needed = sum(parts.values())
    if free is None or needed <= free:
        return
    wanted = ", ".join(f"{n / GB:.1f} GB of {name}" for name, n in parts.items())
    fitting = [f"{typed} ({need / GB:.1f} GB)" for typed, need in ((t, f()) for t, f in options) if need <= free]
    advice = f"what fits: {', or '.join(fitting)}" if fitting else "no smaller setting known here fits either"
    raise ValueError(f"{what} needs {needed / GB:.1f} GB ({wanted}), {free / GB:.1f} GB are free: {advice}")
