"""Parts of ``mfctl bench gpu``, their time limits, and the cases that are still missing. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mfcore.errors import UserInputError

GRACE_SECONDS = 5.0  # between the deadline of a part and the end of its process
START_SECONDS = 3.0  # no process is started with less time
LEAST_SECONDS = 20.0  # of a part, as long as there is time


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part: its process, and its share of the time."""

    name: str
    module: str  # run with python -m
    arguments: tuple[str, ...] = ()
    share: float  # of the time of all parts
    needs_device: bool = True  # without the device the part is skipped


WORKER = "workflows.bench.gpu.worker"
PARTS = (
    Part(name="facts", module=WORKER, arguments=("facts",), share=5, needs_device=False),
    Part(name="parity", module=WORKER, arguments=("parity",), share=22),
    Part(name="stream", module=WORKER, arguments=("stream",), share=31),
    Part(name="train", module=WORKER, arguments=("train",), share=22),
    Part(name="study", module="workflows.study.step_times", share=8),
    Part(name="profile", module=WORKER, arguments=("profile",), share=12),
)
"""By value: a command that is cut short has done the first ones."""


def select_parts(names: Sequence[str] | None) -> tuple[Part, ...]:
    """Return the parts with these names in the order of ``PARTS``; all for None. Raises UserInputError."""
    if names is None:
        return PARTS
    known = [part.name for part in PARTS]
    if odd := [name for name in names if name not in known]:
        raise UserInputError(f"--parts {','.join(names)}: unknown part {odd[0]!r}. Choose from {', '.join(known)}")
    return tuple(part for part in PARTS if part.name in names)


def time_limit(parts: Sequence[Part], seconds_left: float) -> float:
    """Return the seconds of the first of ``parts``: its share of the time that is left, at least ``LEAST_SECONDS``.

    Time that a part leaves over is thus shared by the later ones.
    """
    usable = max(0.0, seconds_left - GRACE_SECONDS)
    share = parts[0].share / sum(part.share for part in parts)
    return min(usable, max(LEAST_SECONDS, usable * share))


def finished_cases(records: Sequence[Mapping[str, object]], part: str) -> tuple[str, ...]:
    """Return the names of the finished cases of a part, the only ones that are not run again."""
    done = [str(r["case"]) for r in records if r.get("part") == part and r.get("status") == "done"]
    return tuple(dict.fromkeys(done))
