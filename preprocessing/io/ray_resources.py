"""Resources that a Ray cluster can provide, and reports while a job waits for machines."""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

PROMISED_RESOURCES_ENV = "MFCTL_MOST"
"""Set in a submitted job, as JSON: the sum of each resource over all machines that the cluster file allows.

Ray reports present resources only. An autoscaling cluster may have none when a job starts.
"""
REPORT_INTERVAL_S = 60.0


def max_resources(now: Mapping[str, float]) -> dict[str, float]:
    """Return the larger amount of each resource: present `now`, or allowed by the cluster file."""
    promised: dict[str, float] = json.loads(os.environ.get(PROMISED_RESOURCES_ENV) or "{}")
    return {name: max(now.get(name, 0.0), promised.get(name, 0.0)) for name in {*now, *promised}}


def resources_available(
    required: Mapping[str, float], available: Callable[[], Mapping[str, float]]
) -> Callable[[], bool]:
    """Return a function that is True once the resources of one worker are present."""
    return lambda: all(available().get(name, 0.0) >= amount for name, amount in required.items())


@contextmanager
def report_while_waiting(
    subject: str,
    available: Callable[[], Mapping[str, float]],
    *,
    seen: Callable[[], bool] = lambda: False,
    every: float | None = None,
) -> Iterator[Callable[[], None]]:
    """Report on standard error that `subject` is awaited.

    Reports end when `seen()` is true or the yielded function is called. Ray waits for machines
    silently and without limit, also for those that a quota refuses.

    Args:
        subject: Noun phrase for the message, such as "machines for 4 workers".
        available: Returns the present resources of the cluster.
        seen: Returns True when the wait is over.
        every: Seconds between reports (default: REPORT_INTERVAL_S).
    """
    finished, pause = threading.Event(), REPORT_INTERVAL_S if every is None else every

    def report() -> None:
        waited = 0.0
        while not finished.wait(pause) and not seen():
            waited += pause
            now = available()
            amounts = ", ".join(f"{name} {now.get(name, 0.0):g}" for name in ("CPU", "GPU"))
            print(
                f"waiting for {subject}, {waited:.0f} s so far; Ray has {amounts}. If none come, run `ray status` on "
                "the head node",
                file=sys.stderr,
                flush=True,
            )

    thread = threading.Thread(target=report, name="waiting", daemon=True)
    thread.start()
    try:
        yield finished.set
    finally:
        finished.set()
        thread.join()
