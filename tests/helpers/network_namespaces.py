"""Simulate machines with namespaces: each has own network, processes, /tmp, home and sshd, but not this working tree.

`python -m tests.helpers.network_namespaces FOLDER` runs in separate namespaces (see ``test_onprem.py``). It runs the
commands of cluster/onprem.md, kills a machine during preprocessing and during training, and prints the facts as JSON.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.run_log import logged_steps
from workflows.jobs.job_server import connect, query_cluster
from workflows.jobs.targets import connect_target, parse_target

ROOT = Path(__file__).resolve().parents[2]
HEAD, WORKERS = "10.0.0.10", ("10.0.0.11", "10.0.0.12")
SHARED = "/mnt/shared"  # mounted on every machine
FILE = "/mnt/onprem.yaml"
SUBMIT = ("submit", "--json", "--shared", SHARED, FILE, "--")
SSHD = """
HostKey /mnt/host_key
PermitRootLogin yes
StrictModes no
UsePAM no
PasswordAuthentication no
"""


def sh(command: str) -> None:
    subprocess.run(["bash", "-euc", command], check=True, stdout=sys.stderr)


def mount_home_commands(name: str) -> str:
    """Return commands that mount a new home, /tmp and /run and keep the interpreter."""
    home, base = Path.home(), Path(sys.base_prefix)
    keep = ""
    if base.is_relative_to(home):
        top = base.relative_to(home).parts[0]
        keep = f"mkdir -p /mnt/{name}/{top}; mount --bind {home}/{top} /mnt/{name}/{top};"
    venv = f"/mnt/{name}/mutual-forcing/.venv"
    return (
        f"mkdir -p {venv}; mount --bind {sys.prefix} {venv}; {keep} mount --rbind /mnt/{name} {home};"
        "mount -t tmpfs none /tmp; mount -t tmpfs none /run; mkdir /run/sshd;"
    )


def boot_machine(number: int, address: str) -> subprocess.Popen[bytes]:
    """Boot a machine: namespaces, address, home without the working tree, sshd."""
    name = f"m{number}"
    ssh = Path("/mnt", name, ".ssh")
    ssh.mkdir(parents=True, exist_ok=True)  # its disk survives a reboot
    (ssh / "authorized_keys").write_text(Path("/mnt/operator/.ssh/id_ed25519.pub").read_text())
    hide = "" if Path(sys.prefix).resolve().is_relative_to(ROOT) else f"mount -t tmpfs none {ROOT};"
    script = (
        f"until ip link show e{number} >/dev/null 2>&1; do sleep 0.1; done; ip link set lo up;"
        f"ip addr add {address}/24 dev e{number}; ip link set e{number} up; ip route add default via 10.0.0.1;"
        f"hostname {name}; cd /;"
        f"{mount_home_commands(name)} {hide} exec /usr/sbin/sshd -D -e -f /mnt/sshd_config"
    )
    flags = ["--net", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child"]
    with Path("/mnt", f"{name}.log").open("wb") as log:
        machine = subprocess.Popen(["unshare", *flags, "bash", "-euc", script], stdout=log, stderr=log)
    time.sleep(1)
    sh(f"ip link add v{number} type veth peer name e{number}; ip link set e{number} netns {machine.pid}")
    sh(f"ip link set v{number} master br0; ip link set v{number} up")
    return machine


def prepare(folder: Path) -> None:
    """Prepare the operator: a bridge, keys, the edited cluster file."""
    sh(f"mount --bind {folder} /mnt; mkdir -p /mnt/shared /mnt/operator/.ssh")
    for key in ("/mnt/operator/.ssh/id_ed25519", "/mnt/host_key"):
        sh(f"ssh-keygen -q -t ed25519 -N '' -f {key}")
    sh("ip link set lo up; ip link add br0 type bridge; ip link set br0 up; ip addr add 10.0.0.1/24 dev br0")
    Path("/mnt/sshd_config").write_text(SSHD)
    sh(mount_home_commands("operator"))
    sh("umask 077; mkdir -p ~/.ray; openssl rand -hex 32 > ~/.ray/auth_token")
    text = (ROOT / "cluster" / "onprem.yaml").read_text()
    for old, new in (("ssh_user: ubuntu", "ssh_user: root"), ("/shared", SHARED)):
        assert old in text
        text = text.replace(old, new)
    # every namespace sees all CPUs: limit each to one, so that work spreads
    text = text.replace("ray start ", "ray start --num-cpus=1 ")
    Path(FILE).write_text(text)


def run(*words: str, log: str) -> int:
    with Path("/mnt", log).open("wb") as output:
        return subprocess.call(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def mfctl(*words: str, log: str) -> subprocess.Popen[bytes]:
    """Run a command in a folder that no machine has."""
    typed = Path("/tmp/typed")
    typed.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MFCTL_TRACKER": "json"}
    return subprocess.Popen(
        [sys.executable, "-m", "workflows.cli", *words],
        cwd=typed,
        env=environment,
        stdout=Path("/mnt", log).open("wb"),
        stderr=subprocess.STDOUT,
    )


def nodes() -> dict[str, str]:
    """Return the living machines of the cluster: name -> address."""
    with connect_target(parse_target(FILE), Path("/tmp")) as address:
        return {node["node_name"]: node["node_ip"] for node in query_cluster(connect(address)).nodes}


def wait_for(count: int) -> None:
    began = time.monotonic()
    while True:
        found = nodes()
        if len(found) == count:
            return
        if time.monotonic() - began > 400:
            raise TimeoutError(f"{found}, not {count} machines")
        time.sleep(1)


def kill_machine(machines: dict[str, subprocess.Popen[bytes]], address: str) -> None:
    """Kill the first process of a machine; its namespaces end with it."""
    os.kill(machines[address].pid, signal.SIGKILL)
    machines.pop(address).wait()


def trainers() -> set[str]:
    """Return the machines of the ranks of a run."""
    beats = [json.loads(path.read_text()) for path in Path(SHARED, "runs/a/ranks").glob("0*.json")]
    return {beat["host"] for beat in beats}


def raylets() -> int:
    """Return the number of raylets on all machines; other tests use other namespaces."""
    return sum(process.info["name"] == "raylet" for process in psutil.process_iter(["name"]))


def preprocess(machines: dict[str, subprocess.Popen[bytes]]) -> int:
    """Preprocess on all machines and kill one of them; return the exit code."""
    sets = ("--set", "window_seconds=3", "--set", "sources_per_unit=1", "--set", "workers=3")
    job = mfctl(*SUBMIT, "preprocess", "clips", "data", *sets, log="preprocess.log")
    while job.poll() is None and len(list(Path(SHARED, "data/_done").glob("*.json"))) < 2:
        time.sleep(0.1)
    kill_machine(machines, WORKERS[1])
    return job.wait()


def train(machines: dict[str, subprocess.Popen[bytes]]) -> dict[str, Any]:
    """Train on two machines; kill a worker, then the head, boot it and submit again."""
    short = ("steps=60", "data.batch=4", "data.held_out=0.25", "eval_every=1000", "log_every=1", "checkpoint.every=5")
    words = [word for value in (*short, "engine.kind=torch", "engine.workers=2") for word in ("--set", value)]
    words = [*SUBMIT, "train", "--stage", "audio", "--data", "data", "--run", "a", *words]
    job = mfctl(*words, log="train.log")
    wait_for_step(job, 8)
    on = trainers()
    kill_machine(
        machines, next(address for i, address in enumerate((HEAD, *WORKERS)) if f"m{i}" in on and address != HEAD)
    )
    wait_for_step(job, 20)
    kill_machine(machines, HEAD)
    facts: dict[str, Any] = {"ranks_on": sorted(on), "without_head": job.wait()}
    machines[HEAD] = boot_machine(0, HEAD)
    time.sleep(3)
    facts["up_again"] = run("ray", "up", "-y", FILE, log="up_again.log")
    return facts | {"train": mfctl(*words, log="train_again.log").wait()}


def wait_for_step(job: subprocess.Popen[bytes], step: int) -> None:
    while job.poll() is None and max(logged_steps(Path(SHARED, "runs/a")), default=0) < step:
        time.sleep(0.1)
    assert job.poll() is None, f"training ended before step {step}"


def run_scenario() -> dict[str, Any]:
    """Run the commands of cluster/onprem.md with lost machines; return exit codes and durations."""
    started = time.monotonic()
    machines = {address: boot_machine(i, address) for i, address in enumerate((HEAD, *WORKERS))}
    time.sleep(3)
    facts: dict[str, Any] = {"up": run("ray", "up", "-y", FILE, log="up.log")}
    facts["refused"] = mfctl("submit", FILE, "--", "preprocess", "clips", "x", log="refused.log").wait()
    wait_for(3)
    facts["up_s"] = round(time.monotonic() - started)
    never = ("train", "--stage", "audio", "--data", "data", "--set", "engine.resource=tpu")
    facts["never"] = mfctl(*SUBMIT, *never, log="never.log").wait()
    facts["preprocess"] = preprocess(machines)
    wait_for(2)
    machines[WORKERS[1]] = boot_machine(2, WORKERS[1])  # rebooted: the head starts Ray on it again
    wait_for(3)
    facts["back_s"] = round(time.monotonic() - started)
    facts |= train(machines)
    facts["status"] = run("ray", "exec", FILE, "ray status", log="status.log")
    down = time.monotonic()
    facts["down"] = run("ray", "down", "-y", FILE, log="down.log")
    while raylets() and time.monotonic() - down < 300:
        time.sleep(1)
    facts["raylets_left"], facts["down_s"] = raylets(), round(time.monotonic() - down)
    facts["seconds"] = round(time.monotonic() - started)
    facts["left_in_the_folder"] = sorted(path.name for path in Path("/tmp/typed").glob("*"))
    return facts


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"
    os.environ["OMP_NUM_THREADS"] = "1"
    prepare(Path(sys.argv[1]))
    print(json.dumps(run_scenario()))
