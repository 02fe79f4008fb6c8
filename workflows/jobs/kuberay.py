"""RayJobs of Kubernetes through kubectl: the user's manifest with the command as entrypoint."""

import json
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import yaml

TERMINAL_STATES = {"Complete": "SUCCEEDED", "Failed": "FAILED", "Suspended": "STOPPED"}
"""By jobDeploymentStatus. jobStatus is the result of one attempt, and KubeRay may start another."""
PENDING_STATES = ("", "PENDING", "Initializing", "Waiting", "Retrying")
POLL_S = 2.0
UNKNOWN_EXIT = 1


def render_manifest(
    manifest: Mapping[str, Any], argv: Sequence[str], variables: Mapping[str, str], driver: Mapping[str, float]
) -> dict[str, Any]:
    """Return the manifest with entrypoint, environment and the resources of the driver.

    Secrets stay references in the pods of the manifest.
    """
    job = deepcopy(dict(manifest))
    for resource in ("CPU", "GPU"):
        field = f"entrypointNum{resource.capitalize()}s"
        job["spec"].pop(field, None)
        if driver.get(resource):
            job["spec"][field] = driver[resource]
    job["spec"]["entrypoint"] = shlex.join(["python", "-m", "workflows.cli", *argv])
    environment = yaml.safe_load(job["spec"].get("runtimeEnvYAML") or "{}")
    environment["env_vars"] = environment.get("env_vars", {}) | dict(variables)
    job["spec"]["runtimeEnvYAML"] = yaml.safe_dump(environment)
    name = job["metadata"].pop("name", None)
    if name:  # a name can be used once, and each submission is a new job
        job["metadata"]["generateName"] = f"{name}-"
    return job


def submit_rayjob(manifest: Mapping[str, Any]) -> str:
    """Create the job on the current kubectl cluster; return its name."""
    return json.loads(_kubectl("create", "-f", "-", "-o", "json", stdin=json.dumps(manifest)))["metadata"]["name"]


def job_status(name: str) -> dict[str, Any]:
    """Return status, exit code (None while the job runs) and message."""
    status = json.loads(_kubectl("get", "rayjob", name, "-o", "json")).get("status", {})
    attempt = status.get("jobStatus") or ""
    deployment = status.get("jobDeploymentStatus") or ""
    message = status.get("message") or ""
    ended = TERMINAL_STATES.get(deployment)
    if ended and attempt in TERMINAL_STATES.values() and deployment != "Suspended":
        ended = attempt
    code = None
    if ended:
        found = re.search(r"exit code (\d+)", message)
        code = 0 if ended == "SUCCEEDED" else int(found.group(1)) if found else UNKNOWN_EXIT
    running = deployment if deployment in PENDING_STATES else attempt or deployment
    return {
        "status": ended or running or "PENDING",
        "exit_code": code,
        "message": message.split(", last available logs")[0],
    }


def follow_logs(name: str) -> None:
    """Print the logs of all attempts until the job has ended."""
    while True:
        while job_status(name)["status"] in PENDING_STATES:
            time.sleep(POLL_S)
        subprocess.run(["kubectl", "logs", "--follow", f"job/{name}"], check=False)
        while (now := job_status(name))["exit_code"] is None and now["status"] not in PENDING_STATES:
            time.sleep(POLL_S)
        if now["exit_code"] is not None:
            return


def print_logs(name: str) -> str:
    """Return the logs of the current attempt."""
    return _kubectl("logs", f"job/{name}")


def suspend_job(name: str) -> None:
    """Suspend the job: its pods are deleted, its record stays."""
    _kubectl("patch", "rayjob", name, "--type", "merge", "-p", json.dumps({"spec": {"suspend": True}}))


def _kubectl(*arguments: str, stdin: str | None = None) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError("kubectl is not installed. Install it to submit a RayJob") from error
    if done.returncode != 0:
        raise RuntimeError(
            f"kubectl {arguments[0]} failed: {done.stderr.strip()}. Check the context (kubectl config "
            "current-context) and that KubeRay is installed (cluster/kuberay/README.md)"
        )
    return done.stdout
