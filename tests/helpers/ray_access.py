"""Clients of another Ray: each function returns "" or the error of one way to read or run code there.

``python -m tests.helpers.ray_access GCS_ADDRESS DASHBOARD_URL CLIENT_ADDRESS`` prints the results as JSON; "" as an
argument skips a way.
"""

import json
import sys
from collections.abc import Callable

import psutil

KEY = b"planted"
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def describe(work: Callable[[], object]) -> str:
    """Return "" if ``work`` succeeds, else its error."""
    try:
        work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def read_and_write_kv(gcs: str) -> None:
    """Write a key into the store of the GCS and read it."""
    from ray._raylet import GcsClient

    client = GcsClient(address=gcs)
    client.internal_kv_put(KEY, b"x", True, b"fun", timeout=10)
    assert client.internal_kv_get(KEY, b"fun", timeout=10) == b"x"


def submit_job(dashboard: str) -> None:
    """Submit a job."""
    from ray.job_submission import JobSubmissionClient

    JobSubmissionClient(dashboard).submit_job(entrypoint="true")


def connect_client(address: str) -> None:
    """Connect as a Ray client and run a task."""
    import ray

    ray.init(f"ray://{address}", logging_level="ERROR")
    assert ray.get(ray.remote(num_cpus=0)(lambda: 1).remote()) == 1
    ray.shutdown()


def listening_addresses(pids: list[int]) -> set[str]:
    """Return the addresses on which processes accept connections."""
    found = set[str]()
    for pid in pids:
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.ip)
    return found


if __name__ == "__main__":
    ways = zip((read_and_write_kv, submit_job, connect_client), sys.argv[1:], strict=True)
    print(json.dumps({way.__name__: describe(lambda w=way, a=where: w(a)) for way, where in ways if where}))
