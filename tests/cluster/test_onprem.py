"""The commands of cluster/onprem.md on three machines, which are namespaces with own network, processes and sshd."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.toyworld.world import write_toyworld
from tests.helpers.run_log import logged_steps
from workflows.checkpoints.layout import OUTCOME_FILE
from workflows.data.inspect import inspect_dataset
from workflows.utils.json_io import read_json

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_a_cluster_over_ssh_runs_jobs_that_survive_lost_machines(tmp_path: Path) -> None:
    missing = [name for name in ("unshare", "ip", "rsync", "ssh-keygen") if not shutil.which(name)]
    if os.geteuid() != 0 or missing or not Path("/usr/sbin/sshd").exists():
        pytest.skip("needs root, util-linux, iproute2, rsync and openssh-server")
    if subprocess.run([*NAMESPACES, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True).returncode:
        pytest.skip("this machine does not allow namespaces with bridges")
    write_toyworld(tmp_path / "shared" / "clips", clips=12, seconds=3, jobs=1)
    done = subprocess.run(
        [*NAMESPACES, sys.executable, "-m", "tests.helpers.network_namespaces", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "\n".join(f"== {path.name}\n{path.read_text()[-2500:]}" for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    facts = json.loads(done.stdout.splitlines()[-1])
    print(facts)
    codes = {"up": 0, "refused": 2, "never": 2, "preprocess": 0, "without_head": 1, "up_again": 0, "train": 0}
    codes |= {"status": 0, "down": 0}
    assert {name: facts[name] for name in codes} == codes, logs
    assert "has room for 0" in (tmp_path / "never.log").read_text()
    assert facts["raylets_left"] == 0
    found = inspect_dataset(str(tmp_path / "shared" / "data"), verify=True)
    assert (found["sources"], found["accepted"]) == (12, 12)
    assert len(facts["ranks_on"]) == 2, "training ran across two machines"
    assert read_json(tmp_path / "shared/runs/a" / OUTCOME_FILE)["progress"]["step"] == 60
    assert logged_steps(tmp_path / "shared/runs/a") == list(range(61)), "every step exactly once"
    for name in ("train.log", "train_again.log"):
        assert "audio resumes at step" in (tmp_path / name).read_text()
    assert "submit the same command again" in (tmp_path / "train.log").read_text()
    assert facts["left_in_the_folder"] == ["runs"], "only the records of the jobs are in the submitting folder"
