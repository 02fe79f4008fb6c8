"""Check the installation on this machine and return the fix for each missing part."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from workflows.utils.environment import hide_passwords, tracking_uri

GIB = 2**30
DISK_FOR_DEMO = 3 * GIB
SHARED_MEMORY = 1 * GIB
IMPORT_LIMIT_S = 120
INSTALL = "python -m pip install -c constraints.txt -e '.[dev]'   (or: make venv)"


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Result of one check."""

    name: str
    state: Literal["ok", "missing", "optional"]  # optional: absent, not needed by the commands of the README
    detail: str
    remedy: str = ""  # command to type


def run_checks() -> dict:
    """Run all checks in threads; ``ok`` is True if no required part is missing."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        checks = list(pool.map(lambda check: check(), CHECKS))
    return {"ok": all(c.state != "missing" for c in checks), "checks": [vars(c) for c in checks]}


def format_report(report: dict) -> str:
    """Format the report as text: one line per check, and the fix below a missing part."""
    lines = []
    for check in report["checks"]:
        lines.append(f"{check['state']:<9}{check['name']:<15}{check['detail']}")
        if check["remedy"]:
            lines.append(f"{'':<24}-> {check['remedy']}")
    lines.append(
        "all required parts work" if report["ok"] else "required parts are missing: see the lines marked missing"
    )
    return "\n".join(lines)


def python_version() -> CheckResult:
    """Report the Python version; tested are 3.11 and 3.12."""
    tested = (3, 11) <= sys.version_info[:2] <= (3, 12)
    detail = f"{platform.python_version()} at {sys.executable}" + ("" if tested else " (tested: 3.11 and 3.12)")
    return CheckResult(name="python", state="ok", detail=detail)


def torch_and_gpus() -> CheckResult:
    """Check torch; report CUDA and the names of the GPUs."""
    probe = (
        "import torch; n = torch.cuda.device_count(); "
        "print(torch.__version__, f'CUDA {torch.version.cuda}' if n else 'CPU only', "
        "*[torch.cuda.get_device_name(i) for i in range(n)], sep=', ')"
    )
    return _imported("torch", probe)


def ray() -> CheckResult:
    """Check Ray with its data and train libraries."""
    return _imported("ray", "import ray, ray.data, ray.train; print(ray.__version__)")


def deepspeed() -> CheckResult:
    """Check DeepSpeed; its import prints log lines."""
    return _imported("deepspeed", "import deepspeed; print(); print(deepspeed.__version__)")


def mlflow() -> CheckResult:
    """Check MLflow."""
    return _imported("mlflow", "import mlflow; print(mlflow.__version__)")


def parquet() -> CheckResult:
    """Check pyarrow with Parquet."""
    return _imported("pyarrow", "import pyarrow.parquet, pyarrow; print(pyarrow.__version__)")


def s3() -> CheckResult:
    """Check s3fs; report the endpoint if one is set."""
    check = _imported("s3fs", "import s3fs; print(s3fs.__version__)")
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    return replace(check, detail=f"{check.detail}, endpoint {endpoint}") if endpoint else check


def pretrained() -> CheckResult:
    """Check the optional libraries of pretrained codecs and models."""
    absent = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]
    if not absent:
        return CheckResult(name="pretrained", state="ok", detail="diffusers and transformers are installed")
    remedy = "python -m pip install -c constraints.txt -e '.[pretrained]'"
    return CheckResult(name="pretrained", state="optional", detail=f"without {', '.join(absent)}", remedy=remedy)


def ffmpeg() -> CheckResult:
    """Check the programs ffmpeg and ffprobe and the encoders of mp4 files."""
    remedy = "sudo apt-get install ffmpeg" if shutil.which("apt-get") else "brew install ffmpeg"
    absent = [name for name in ("ffmpeg", "ffprobe") if shutil.which(name) is None]
    if absent:
        return CheckResult(
            name="ffmpeg", state="missing", detail=f"no {' and no '.join(absent)} on PATH", remedy=remedy
        )
    version = _output(["ffmpeg", "-version"]).split("\n")[0].split(" Copyright")[0]
    rows = [line.split() for line in _output(["ffmpeg", "-hide_banner", "-encoders"]).splitlines()]
    encoders = {row[1] for row in rows if len(row) > 1}
    lacking = [name for name in ("libx264", "aac") if name not in encoders]
    if lacking:
        detail = f"{version} has no encoder {' and '.join(lacking)}"
        return CheckResult(
            name="ffmpeg", state="missing", detail=detail, remedy=f"{remedy}   (a build with these encoders)"
        )
    return CheckResult(name="ffmpeg", state="ok", detail=f"{version}, encoders libx264 and aac")


def flite() -> CheckResult:
    """Check the program flite, which speaks the English of the toy world; generation works without it."""
    path = shutil.which("flite")
    if path:
        return CheckResult(name="flite", state="ok", detail=path)
    remedy = "sudo apt-get install flite" if shutil.which("apt-get") else "brew install flite"
    return CheckResult(name="flite", state="optional", detail="not on PATH: no toyworld --voice english", remedy=remedy)


def mlflow_store() -> CheckResult:
    """Check that the tracking store is writable; nothing is created."""
    uri = tracking_uri()
    name = "mlflow store"
    if not uri.startswith("sqlite:///"):
        return CheckResult(name=name, state="ok", detail=f"{hide_passwords(uri)} (a server: not contacted)")
    database = Path(uri.removeprefix("sqlite:///"))
    path = database if database.exists() else next(p for p in database.parents if p.exists())
    if os.access(path, os.W_OK):
        return CheckResult(name=name, state="ok", detail=uri)
    remedy = "export MLFLOW_TRACKING_URI=sqlite:////a/folder/you/may/write/mlflow.db"
    return CheckResult(name=name, state="missing", detail=f"{path} cannot be written", remedy=remedy)


def disk() -> CheckResult:
    """Check the free space below the current directory."""
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / GIB:.1f} GiB free under {Path.cwd()}"
    if free >= DISK_FOR_DEMO:
        return CheckResult(name="disk", state="ok", detail=detail)
    remedy = f"free space, or use another folder: the demo needs {DISK_FOR_DEMO // GIB} GiB"
    return CheckResult(name="disk", state="missing", detail=detail, remedy=remedy)


def shared_memory() -> CheckResult:
    """Check the shared memory of Ray's object store; with too little Ray uses files, which are slow."""
    if not Path("/dev/shm").is_dir():
        return CheckResult(name="shared memory", state="ok", detail="no /dev/shm: Ray uses files")
    free = shutil.disk_usage("/dev/shm").free
    detail = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free >= SHARED_MEMORY:
        return CheckResult(name="shared memory", state="ok", detail=detail)
    remedy = "in a container: docker run --shm-size=2g ..., else: sudo mount -o remount,size=2g /dev/shm"
    return CheckResult(name="shared memory", state="optional", detail=f"{detail}: Ray uses files", remedy=remedy)


CHECKS: tuple[Callable[[], CheckResult], ...] = (
    python_version,
    torch_and_gpus,
    ffmpeg,
    flite,
    ray,
    deepspeed,
    mlflow,
    mlflow_store,
    parquet,
    s3,
    pretrained,
    disk,
    shared_memory,
)


def _imported(name: str, program: str) -> CheckResult:
    """Run ``program`` in a new interpreter, isolated from broken imports and their output."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=IMPORT_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return CheckResult(name=name, state="missing", detail=f"import took over {IMPORT_LIMIT_S} s", remedy=INSTALL)
    if done.returncode == 0:
        return CheckResult(name=name, state="ok", detail=done.stdout.strip().splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return CheckResult(name=name, state="missing", detail=reason, remedy=INSTALL)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
