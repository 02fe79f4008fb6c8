"""Discrete-event simulation of the checkpoint interval of a run that fails.

Run it with `python -m tests.helpers.checkpoint_interval_simulation`.

All times are in seconds. Training stops for ``pause`` at each save, the copy to memory. A checkpoint is complete after
``written`` seconds in the background. Failures have exponential distances. A failure costs ``restart`` and all work
since the latest complete checkpoint, and may also happen during a restart.
"""

import math
import random
from dataclasses import dataclass

HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A run on machines that fail."""

    mtbf: float  # mean time between failures of the whole run
    pause: float
    written: float  # after the pause
    restart: float


def simulate(fleet: Fleet, interval: float, work: float, seed: int) -> float:
    """Return the time for ``work`` with a save after every ``interval`` of work (without pauses)."""
    draw = random.Random(seed)
    now, failure = 0.0, draw.expovariate(1 / fleet.mtbf)
    counted = 0.0  # work in complete checkpoints
    done = 0.0  # work since the start
    coming: tuple[float, float] | None = None  # when the save in progress is complete, and its work
    while done < work:
        chunk = min(interval, work - done)
        end = now + chunk + (fleet.pause if done + chunk < work else 0.0)
        if coming and coming[0] <= min(end, failure):
            counted, coming = coming[1], None
        if failure < end:
            now, done, coming = failure, counted, None
            failure = now + draw.expovariate(1 / fleet.mtbf)
            while failure < now + fleet.restart:
                now, failure = failure, failure + draw.expovariate(1 / fleet.mtbf)
            now += fleet.restart
            continue
        now, done = end, done + chunk
        if done >= work:
            break
        if coming is None or coming[0] <= now:  # one save at a time: the next one waits for it
            counted = coming[1] if coming else counted
            coming = (now + fleet.written, done)
        else:
            now = min(coming[0], failure)
            if now == coming[0]:
                counted, coming = coming[1], (now + fleet.written, done)
    return now


def lost(fleet: Fleet, interval: float, *, work: float | None = None, runs: int = 20) -> float:
    """Return the share of lost time, a mean over ``runs`` runs of about 200 failures each."""
    work = work or 200 * fleet.mtbf
    return 1 - work * runs / sum(simulate(fleet, interval, work, seed) for seed in range(runs))


def expected(fleet: Fleet, interval: float, work: float) -> float:
    """Return Daly's exact mean time (FGCS 2006, equation 20) for saves that are complete at once."""
    m = fleet.mtbf
    return m * math.exp(fleet.restart / m) * (math.exp((interval + fleet.pause) / m) - 1) * work / interval


def daly(pause: float, mtbf: float) -> float:
    """Return Daly's best interval (equation 37); its first term is Young's (CACM 1974)."""
    if pause >= 2 * mtbf:
        return mtbf
    root = math.sqrt(pause / (2 * mtbf))
    return math.sqrt(2 * pause * mtbf) * (1 + root / 3 + root * root / 9) - pause


def best(fleet: Fleet, *, runs: int = 20) -> float:
    """Return the interval with the least loss on a grid around Daly's; not shorter than a save."""
    start = daly(fleet.pause, fleet.mtbf)
    grid = [start * 1.2**k for k in range(-8, 12)]
    return min((i for i in grid if i >= fleet.written), key=lambda i: lost(fleet, i, runs=runs), default=fleet.written)


def main() -> None:
    """Print the best intervals as a Markdown table.

    State: float32 weights, two moments and EMA, 16 bytes per parameter over all ranks. Exports: raw and EMA weights, 8
    bytes per parameter, on rank 0. The rates per rank are measured (lab notes on recovery).
    """
    copied, stored = 0.98e9, 0.117e9
    print("| parameters | GPUs | exports | MTBF, h | pause, s | written, s | best interval, s | Daly, s | time lost |")
    print("|-|-|-|-|-|-|-|-|-|")
    for parameters, gpus, mtbf, spread in (
        (1.3e9, 64, 790.0, False),
        (14e9, 64, 790.0, False),
        (14e9, 1024, 49.0, False),
        (14e9, 1024, 49.0, True),
        (14e9, 1024, 2.0, False),
        (14e9, 1024, 2.0, True),
    ):
        share = 16 * parameters / gpus + 8 * parameters / (gpus if spread else 1)
        fleet = Fleet(mtbf=mtbf * HOUR, pause=share / copied, written=share / stored, restart=180.0)
        found = best(fleet, runs=3)
        row = [f"{parameters / 1e9:g}B", gpus, "all ranks" if spread else "rank 0", f"{mtbf:g}", f"{fleet.pause:.1f}"]
        row += [f"{fleet.written:.0f}", f"{found:.0f}", f"{daly(fleet.pause, fleet.mtbf):.0f}"]
        print(
            "| " + " | ".join(str(cell) for cell in [*row, f"{100 * lost(fleet, found, runs=3):.1f}%"]) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
