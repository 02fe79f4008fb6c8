"""A process exits cleanly although threads of its process groups are still active."""

import subprocess
import sys
from pathlib import Path

import pytest

# gloo's threads are late only on a busy machine: simulate one with another thread of that name
EXIT_SCRIPT = """
import ctypes, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from workflows.utils import distributed

def names():
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]

def late():
    ctypes.CDLL(None).prctl(15, distributed.GLOO_THREAD_NAME.encode(), 0, 0, 0)
    named.set()
    end = time.thread_time() + 0.5
    while time.thread_time() < end:
        pass
    print("the tensors are released", flush=True)
    threading.Event().wait()  # idle until the process ends

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
print(distributed.GLOO_THREAD_NAME in names())
named = threading.Event()
threading.Thread(target=late, daemon=True).start()
named.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the thread states of Linux")
def test_exit_waits_for_threads_that_release_tensors_and_not_for_idle_ones():
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", EXIT_SCRIPT], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == ["True", "the tensors are released", ""]
