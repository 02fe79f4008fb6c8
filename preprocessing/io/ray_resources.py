"""What machines a cluster can bring, and a word while a job waits for them."""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

PROMISED_RESOURCES_ENV = "MFCTL_MOST"
"""Set in a submitted job, as JSON: how much of each resource all machines of its cluster's file have together.

Ray tells a job what is there now: on a cluster that starts machines when they are asked for, nothing.
"""
REPORT_INTERVAL_S = 60.0


def max_resources(now: Mapping[str, float]) -> dict[str, float]:
    """The greatest amount of each resource: what is there ``now``, or what the cluster's file promises."""
    promised: dict[str, float] = json.loads(os.environ.get(PROMISED_RESOURCES_ENV) or "{}")
    return {name: max(now.get(name, 0.0), promised.get(name, 0.0)) for name in {*now, *promised}}


def resources_available(asked: Mapping[str, float], there: Callable[[], Mapping[str, float]]) -> Callable[[], bool]:
    """Whether a machine for one worker is there: from then on slow work is work, and no waiting."""
    return lambda: all(there().get(name, 0.0) >= amount for name, amount in asked.items())


@contextmanager
def report_while_waiting(
    what: str,
    there: Callable[[], Mapping[str, float]],
    *,
    seen: Callable[[], bool] = lambda: False,
    every: float | None = None,
) -> Iterator[Callable[[], None]]:
    """Every so many seconds say on standard error that ``what`` is waited for, and what is there, until ``seen`` is
    true or the function that this gives is called.

    Ray waits for machines without a word, and for ever: for those that a quota refuses, too.
    """
    begun, pause = threading.Event(), REPORT_INTERVAL_S if every is None else every

    def tell() -> None:
        waited = 0.0
        while not begun.wait(pause) and not seen():
            waited += pause
            now = there()
            has = ", ".join(f"{name} {now.get(name, 0.0):g}" for name in ("CPU", "GPU"))
            print(
                f"waiting for {what}, {waited:.0f} s so far; Ray has {has}. If none come, `ray status` on the head "
                "says why",
                file=sys.stderr,
                flush=True,
            )

    thread = threading.Thread(target=tell, name="waiting", daemon=True)
    thread.start()
    try:
        yield begun.set
    finally:
        begun.set()
        thread.join()
