"""A process of a run ends as Python ends, whatever the threads of its process groups are still at."""

import subprocess
import sys
from pathlib import Path

import pytest

# gloo's own threads are late only on a busy machine: another one under their name is late here
ENDING = """
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
    print("the tensors are let go", flush=True)
    threading.Event().wait()  # for more work, without end

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
print(distributed.GLOO_THREAD_NAME in names())
named = threading.Event()
threading.Thread(target=late, daemon=True).start()
named.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells what a thread is at")
def test_the_end_waits_for_threads_that_let_go_of_tensors_and_not_for_those_that_wait_for_work():
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", ENDING], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == ["True", "the tensors are let go", ""]
