"""A command as a RayJob of Kubernetes, through kubectl: the manifest is the user's, the entrypoint ours."""

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
"""By jobDeploymentStatus; jobStatus says how one attempt ended, and KubeRay may begin another."""
PENDING_STATES = ("", "PENDING", "Initializing", "Waiting", "Retrying")
POLL_S = 2.0
UNKNOWN_EXIT = 1


def render_manifest(
    manifest: Mapping[str, Any], argv: Sequence[str], variables: Mapping[str, str], own: Mapping[str, float]
) -> dict[str, Any]:
    """The manifest with our command, what its own process needs, and the variables in it; secrets stay references in
    the manifest's own pods."""
    job = deepcopy(dict(manifest))
    for resource in ("CPU", "GPU"):
        field = f"entrypointNum{resource.capitalize()}s"
        job["spec"].pop(field, None)
        if own.get(resource):
            job["spec"][field] = own[resource]
    job["spec"]["entrypoint"] = shlex.join(["python", "-m", "workflows.cli", *argv])
    environment = yaml.safe_load(job["spec"].get("runtimeEnvYAML") or "{}")
    environment["env_vars"] = environment.get("env_vars", {}) | dict(variables)
    job["spec"]["runtimeEnvYAML"] = yaml.safe_dump(environment)
    name = job["metadata"].pop("name", None)
    if name:  # a name can be used once; the same command again must be another job
        job["metadata"]["generateName"] = f"{name}-"
    return job


def submit_rayjob(manifest: Mapping[str, Any]) -> str:
    """Hand the job to the cluster that kubectl talks to; the job's name."""
    return json.loads(_kubectl("create", "-f", "-", "-o", "json", given=json.dumps(manifest)))["metadata"]["name"]


def job_status(name: str) -> dict[str, Any]:
    """Status and exit code; the code is None while the job runs."""
    status = json.loads(_kubectl("get", "rayjob", name, "-o", "json")).get("status", {})
    word, deployed = status.get("jobStatus") or "", status.get("jobDeploymentStatus") or ""
    message = status.get("message") or ""
    ended = TERMINAL_STATES.get(deployed)
    if ended and word in TERMINAL_STATES.values() and deployed != "Suspended":
        ended = word
    code = None
    if ended:
        found = re.search(r"exit code (\d+)", message)
        code = 0 if ended == "SUCCEEDED" else int(found.group(1)) if found else UNKNOWN_EXIT
    said = message.split(", last available logs")[0]
    return {
        "status": ended or (deployed if deployed in PENDING_STATES else word or deployed) or "PENDING",
        "exit_code": code,
        "message": said,
    }


def follow_logs(name: str) -> None:
    """Print the job's logs until it has ended, those of a second attempt too."""
    while True:
        while job_status(name)["status"] in PENDING_STATES:
            time.sleep(POLL_S)
        subprocess.run(["kubectl", "logs", "--follow", f"job/{name}"], check=False)
        while (now := job_status(name))["exit_code"] is None and now["status"] not in PENDING_STATES:
            time.sleep(POLL_S)
        if now["exit_code"] is not None:
            return


def print_logs(name: str) -> str:
    return _kubectl("logs", f"job/{name}")


def suspend_job(name: str) -> None:
    """Suspend it: its machines go, its record stays."""
    _kubectl("patch", "rayjob", name, "--type", "merge", "-p", json.dumps({"spec": {"suspend": True}}))


def _kubectl(*words: str, given: str | None = None) -> str:
    try:
        done = subprocess.run(["kubectl", *words], input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError("kubectl is not installed: a RayJob is submitted through it") from error
    if done.returncode != 0:
        raise RuntimeError(
            f"kubectl {words[0]} failed: {done.stderr.strip()} (is the context right? kubectl config current-context; "
            f"is KubeRay "
            "installed? see cluster/kuberay/README.md)"
        )
    return done.stdout
