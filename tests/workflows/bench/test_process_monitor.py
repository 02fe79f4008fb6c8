"""Check the CPU clock of the preprocessing benchmark."""

import select
import subprocess
import sys

import pytest

from workflows.bench.process_monitor import ProcessTreeCpuClock


@pytest.mark.parametrize("waited_for", [True, False])
def test_cpu_seconds_of_ended_processes_are_kept(waited_for):
    """Run a grandchild for one CPU second; its parent waits for it or, like Ray, never does."""
    burn = "import time\nwhile time.process_time() < 1: pass"
    ignore = "" if waited_for else "signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
    parent = f"import signal, subprocess, sys; {ignore}p = subprocess.Popen([sys.executable, '-c', {burn!r}]); "
    parent += "p.wait(); print(flush=True); sys.stdin.read()"
    clock = ProcessTreeCpuClock()
    started = clock.read()
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        readings = [started]
        while not select.select([child.stdout], [], [], 0.05)[0]:
            readings.append(clock.read())
        readings += [clock.read() for _ in range(3)]
        child.kill()
    assert readings == sorted(readings)
    assert 0.7 < readings[-1] - started < 3
