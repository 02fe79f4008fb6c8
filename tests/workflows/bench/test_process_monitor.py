"""What the preprocessing bench measures with."""

import select
import subprocess
import sys

import pytest

from workflows.bench.process_monitor import ProcessTreeCpuClock


@pytest.mark.parametrize("asked_for", [True, False])
def test_cpu_seconds_of_processes_that_ended_are_kept(asked_for):
    """A child burns a second and ends; its parent, our child, asks for it or (as Ray's) never does."""
    burn = "import time\nwhile time.process_time() < 1: pass"
    care = "" if asked_for else "signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
    parent = f"import signal, subprocess, sys; {care}p = subprocess.Popen([sys.executable, '-c', {burn!r}]); "
    parent += "p.wait(); print(flush=True); sys.stdin.read()"
    clock = ProcessTreeCpuClock()
    began = clock.read()
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        seen = [began]
        while not select.select([child.stdout], [], [], 0.05)[0]:
            seen.append(clock.read())
        seen += [clock.read() for _ in range(3)]
        child.kill()
    assert seen == sorted(seen)
    assert 0.7 < seen[-1] - began < 3
