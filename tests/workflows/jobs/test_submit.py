"""Checks of `mfctl submit`, the content of a submission, driver resources, and RayJobs through kubectl."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import yaml

from mfcore.errors import UserInputError
from preprocessing.io.ray_resources import PROMISED_RESOURCES_ENV
from tests.helpers.parsed_command import parse
from workflows.checkpoints.packaged import MAX_BYTES
from workflows.cli.app import app
from workflows.jobs import job_server, kuberay, resources, submit
from workflows.jobs.command import check_paths, check_secrets
from workflows.jobs.job_server import ClusterInfo, check_versions
from workflows.jobs.resources import MachineType, ResourceRequest
from workflows.jobs.targets import parse_target
from workflows.jobs.working_dir import package_working_dir

ROOT = Path(__file__).resolve().parents[3]
AWS, ONPREM = str(ROOT / "cluster" / "aws.yaml"), str(ROOT / "cluster" / "onprem.yaml")
TRAIN_JOB = str(ROOT / "cluster" / "kuberay" / "rayjob-train.yaml")
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLE"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MFCTL_TRACKER", "MFCTL_CWD"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


# ------------------------------------------------------------------------------------------ rejected before submission


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("preprocess clips s3://b/data", "clips .*s3://.*--shared"),
        ("preprocess s3://b/clips data", "data .*--shared"),
        ("train --stage video --data s3://b/data", "train .*--shared /shared"),
        ("train --stage vidio --data s3://b/data", "vidio"),
        ("tarin --stage video", "tarin.*Use mfctl"),
        ("train --stage video --set checkpoint.to=/here/runs", "checkpoint.to=/here/runs .*--shared"),
    ],
)
@pytest.mark.parametrize("target", [AWS, ONPREM, TRAIN_JOB])
def test_commands_that_other_machines_cannot_run_are_rejected(
    here: Path, target: str, words: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        submit.submit_job(target, parse(words.split()))
    assert not list(here.iterdir())


def test_paths_below_the_shared_folder_are_accepted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    words = ["train", "--stage", "video", "--data", "toy", "--from", "runs/v"]
    command = parse(words, "/shared/me")
    assert set(command.paths.values()) == {"/shared/me/toy", "runs/v"} or "/shared/me/toy" in command.paths.values()
    check_paths(parse(words[:5], "/shared/me"), AWS, "/shared/me")
    with pytest.raises(ValueError, match="/elsewhere/toy .*--shared"):
        check_paths(parse([*words[:4], "/elsewhere/toy"], "/shared"), AWS, "/shared")


@pytest.mark.parametrize("uri", [None, "sqlite:////shared/mlflow.db", "file:///shared/mlruns", "runs"])
def test_a_tracking_store_of_one_machine_is_rejected(
    here: Path, monkeypatch: pytest.MonkeyPatch, uri: str | None
) -> None:
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_URI=.*cluster/mlflow"):
        submit.submit_job(AWS, parse(["train", "--stage", "video", "--data", "s3://b/d"], "/shared"), shared="/shared")


@pytest.mark.parametrize(
    ("target", "sets", "message"),
    [
        (AWS, "engine.workers=64", "64 .*CPU 1, GPU 1.*aws.yaml .*32"),
        (TRAIN_JOB, "engine.workers=9", "9 processes .* 8 .*engine.workers"),
        (AWS, "engine.resource=tpu", "tpu 1.* 0 "),
    ],
)
def test_requests_beyond_the_cluster_file_are_rejected(
    here: Path, monkeypatch: pytest.MonkeyPatch, *, target: str, sets: str, message: str
) -> None:
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    words = ["train", "--stage", "joint", "--preset", "base", "--data", "s3://b/d", "--set", sets]
    with pytest.raises(ValueError, match=message):
        submit.submit_job(target, parse(words, "/shared"), shared="/shared")


def test_equal_machines_are_merged() -> None:
    resources_of = {"CPU": 4.0, "memory": 1.0}
    machines = [
        MachineType(name=name, resources=resources_of | {f"node:{name}": 1.0}, max_count=1) for name in ("a", "b")
    ]
    assert resources.merge_equal(machines) == [MachineType(name="a", resources={"CPU": 4.0}, max_count=2)]


def test_capacity_counts_whole_processes() -> None:
    machines = [
        MachineType(name="a", resources={"CPU": 4, "GPU": 2}, max_count=3),
        MachineType(name="b", resources={"CPU": 64}, max_count=9),
    ]
    assert resources.capacity(machines, {"CPU": 1, "GPU": 1}) == 6
    assert resources.capacity(machines, {"CPU": 3}) == 3 + 9 * 21
    assert resources.capacity(machines, {"CPU": 1 / 3}) == 3 * 12 + 9 * 192
    resources.require_capacity(ResourceRequest(description="x", bundle={"GPU": 1}, count=6), machines, "t")
    with pytest.raises(ValueError, match=r"x .* 7 .* 6 .*CPU 4, GPU 2"):
        resources.require_capacity(ResourceRequest(description="x", bundle={"GPU": 1}, count=7), machines, "t")


@pytest.mark.parametrize(
    ("ray", "python", "message"),
    [("2.9.3", None, "Ray 2.9.3"), (None, "3.9.18", "Python 3.9.18.*--python")],
)
def test_version_mismatch_names_both_versions(ray: str | None, python: str | None, message: str) -> None:
    import platform

    import ray as here

    found = ClusterInfo(ray=ray or here.__version__, python=python or platform.python_version(), nodes=[])
    with pytest.raises(ValueError, match=message):
        check_versions(found, "http://host:8265", None)
    if python:
        check_versions(found, "http://host:8265", "/opt/python")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "ray://127.0.0.1:9"])
def test_an_unreachable_job_server_gives_one_message(
    here: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["submit", address, "--", "doctor"])
    errors = capsys.readouterr().err
    assert ended.value.code == 1
    assert f"no Ray job server responds at {address}" in errors and "mfctl status" in errors
    assert "Traceback" not in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"])
def test_a_silent_or_wrong_server_is_rejected_in_time(
    here: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(job_server, "CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.append(listener.accept()[0])
                    connections[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        with pytest.raises(job_server.ClusterUnreachable, match=f"http://127.0.0.1:{port} is not a Ray job server"):
            submit.submit_job(f"http://127.0.0.1:{port}", parse(["doctor"]))
        for connection in connections:
            connection.close()


def test_the_loopback_of_another_machine_is_rejected() -> None:
    with pytest.raises(job_server.ClusterUnreachable, match=r"ssh -L 8265:127.0.0.1:8265 head.example"):
        job_server._check_same_machine("ray://head.example:10001", "http://127.0.0.1:8265")
    job_server._check_same_machine("ray://127.0.0.1:10001", "http://127.0.0.1:8265")
    job_server._check_same_machine("ray://head.example:10001", "http://10.0.0.5:8265")


def test_other_kubernetes_files_are_rejected_by_kind() -> None:
    with pytest.raises(ValueError, match=r"RayCluster.*port-forward"):
        parse_target(str(ROOT / "cluster" / "kuberay" / "raycluster.yaml"))


# ------------------------------------------------------------------------------------------- content of a submission


def checkout(folder: Path) -> Path:
    """Write a small checkout with a changed, a deleted, an ignored and an untracked file."""
    files = {"workflows/a.py": "print()", "deleted.py": "", "runs/x/log": "r", ".gitignore": "runs/\nignored.txt\n"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for words in (("init", "-q"), ("add", ".")):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    (folder / "workflows" / "a.py").write_text("print(1)")
    (folder / "deleted.py").unlink()
    (folder / "ignored.txt").write_text("i")
    (folder / "note.txt").write_text("n")
    return folder


def test_tracked_files_are_packaged_and_others_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = checkout(tmp_path / "tree"), tmp_path / "out"
    out.mkdir()
    with zipfile.ZipFile(package_working_dir(root, out)) as packed:
        assert sorted(packed.namelist()) == [".gitignore", "workflows/a.py"]
        assert packed.read("workflows/a.py") == b"print(1)", "with local changes"
    warning = capsys.readouterr().err
    assert warning.startswith("warning: 1 untracked files are not part of the job, e.g. note.txt. Use `git add` or")
    with zipfile.ZipFile(package_working_dir(root, out, untracked=True)) as packed:
        assert sorted(packed.namelist()) == [".gitignore", "note.txt", "workflows/a.py"]
    assert capsys.readouterr().err == ""


def test_this_tree_is_packaged_completely_and_small(tmp_path: Path) -> None:
    archive = package_working_dir(ROOT, tmp_path)
    with zipfile.ZipFile(archive) as packed:
        names = set(packed.namelist())
        models = sum(file.compress_size for file in packed.infolist() if file.filename.startswith("workflows/models/"))
    assert archive.stat().st_size - models < 5 * 2**20
    assert models < MAX_BYTES
    assert {"workflows/cli/app.py", "mfcore/flow.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith((".git/", "runs/", ".venv"))]


KEY_FILES = [
    "s3.env",
    "prod.env",
    ".env",
    ".env.local",
    ".envrc",
    "kubeconfig",
    ".kube/config",
    "service-account.json",
    "gcp-key.json",
    "id_rsa",
    "id_ecdsa",
    "id_dsa",
    "id_ed25519",
    "cert.p12",
    "my.pfx",
    "my.pem",
    "tls.key",
    ".npmrc",
    ".pypirc",
    ".netrc",
    ".pgpass",
    ".docker/config.json",
    ".aws/config",
    ".ssh/config",
    ".vault-token",
    "token.txt",
    ".huggingface/token",
    "terraform.tfstate",
    "passwords.txt",
    "aws_keys.csv",
    "rootkey.csv",
    ".boto",
    ".s3cfg",
    "secret.yaml",
    "auth_token",
    "aws_credentials.json",
    "cluster/mlflow/secrets/s3",
    "deep/Prod.ENV",
]


@pytest.mark.parametrize("name", KEY_FILES)
def test_a_file_with_the_name_of_a_key_is_rejected(tmp_path: Path, name: str) -> None:
    root = tmp_path / "tree"
    (root / name).parent.mkdir(parents=True)
    (root / name).write_text("x")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    with pytest.raises(UserInputError, match="git tracks no file"):
        package_working_dir(root, tmp_path)
    (root / "a.py").write_text("")
    subprocess.run(["git", "-C", str(root), "add", "a.py"], check=True)
    with zipfile.ZipFile(package_working_dir(root, tmp_path)) as packed:
        assert packed.namelist() == ["a.py"], "untracked files stay here"
    with pytest.raises(UserInputError, match=rf"^{re.escape(name)} has the name .*gitignore"):
        package_working_dir(root, tmp_path, untracked=True)
    subprocess.run(["git", "-C", str(root), "add", "--force", "."], check=True)
    with pytest.raises(UserInputError, match=rf"^{re.escape(name)} has the name .*git rm --cached"):
        package_working_dir(root, tmp_path)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("key = " + "AKIA" + 16 * "Q", "an AWS access key"),
        ("AWS_SECRET_" + "ACCESS_KEY=" + 40 * "b", "an AWS secret key"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "a private key"),
        (f"key = '{SECRET}'", "the value of AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_file_with_the_content_of_a_key_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, kind: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    root = checkout(tmp_path / "tree")
    (root / "workflows" / "a.py").write_text(text)
    with pytest.raises(UserInputError, match=f"^workflows/a.py contains {kind}") as caught:
        package_working_dir(root, tmp_path)
    assert text not in str(caught.value) and SECRET not in str(caught.value)


def test_a_large_tree_and_a_link_out_of_it_are_rejected(tmp_path: Path) -> None:
    root = checkout(tmp_path / "tree")
    (root / "weights.bin").write_bytes(os.urandom(2**20))
    with pytest.raises(UserInputError, match=r"1.0 MB.*weights.bin"):
        package_working_dir(root, tmp_path, untracked=True, max_bytes=2**19)
    (root / "weights.bin").unlink()
    (root / "weights.bin").symlink_to("/etc/hostname")
    with pytest.raises(UserInputError, match="weights.bin is a link to /etc/hostname, outside the checkout"):
        package_working_dir(root, tmp_path, untracked=True)


def test_a_folder_without_git_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserInputError, match=r"is not a usable git checkout: .*Clone the repository, or run `git init"):
        package_working_dir(tmp_path, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserInputError, match="git is not installed"):
        package_working_dir(tmp_path, tmp_path)


def test_credentials_are_forwarded_by_reference_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("AWS_PROFILE", "training")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    variables = submit._environment("/shared", elsewhere=True)
    assert SECRET not in str(variables)
    assert variables["AWS_PROFILE"] == "training"
    assert variables["AWS_ENDPOINT_URL"] == "http://minio:9000"
    assert variables["MFCTL_CWD"] == "/shared"
    assert "MLFLOW_TRACKING_URI" not in variables, "the store of this machine is not used"
    job = kuberay.render_manifest(parse_target(TRAIN_JOB).config, ["doctor"], variables, {})
    assert SECRET not in json.dumps(job)


def test_a_secret_in_an_argument_is_rejected_without_repeating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for words, variables in (
        (["preprocess", f"s3://user:{SECRET}@bucket/x"], {}),
        (["train", "--set", f"x={SECRET}"], {}),
        ([], {"MLFLOW_TRACKING_URI": f"postgresql://mlflow:{SECRET}@host/mlflow"}),
    ):
        with pytest.raises(ValueError, match="password|AWS_SECRET_ACCESS_KEY") as caught:
            check_secrets(words, variables)
        assert SECRET not in str(caught.value)
    check_secrets(["preprocess", "s3://b/x"], {"MLFLOW_TRACKING_URI": "http://mlflow:5000"})


# ------------------------------------------------------------------------------------------------- driver resources


HEAD_ALONE = MachineType(name="head", resources={}, max_count=1)
PLAIN = MachineType(name="plain", resources={"CPU": 16.0}, max_count=32)
WITH_GPUS = MachineType(name="gpus", resources={"CPU": 48.0, "GPU": 4.0}, max_count=8)


@pytest.mark.parametrize(
    ("words", "on_gpus", "on_plain"),
    [
        ("evaluate runs/a --steps 1,2", {"GPU": 1.0}, {"CPU": 1.0}),
        ("evaluate runs/a --steps 1,2 --workers 4", {}, {}),  # Ray workers compute
        ("generate runs/a a.mp4", {"GPU": 1.0}, {"CPU": 1.0}),
        ("study --device cuda", {"GPU": 1.0}, {"CPU": 1.0}),
        ("study", {"CPU": 1.0}, {"CPU": 1.0}),
        ("train --stage video --data s3://b/d", {}, {}),
        ("preprocess s3://b/c s3://b/d", {}, {}),
        ("evaluate --help", {}, {}),
    ],
)
def test_driver_only_commands_do_not_run_on_the_head(
    words: str, on_gpus: dict[str, float], on_plain: dict[str, float]
) -> None:
    command = parse(words.split(), "/shared")
    assert resources.driver_resources(command, [HEAD_ALONE, PLAIN, WITH_GPUS]) == on_gpus
    assert resources.driver_resources(command, [HEAD_ALONE, PLAIN]) == on_plain
    assert resources.driver_resources(command, [HEAD_ALONE]) == {}


def test_a_job_gets_the_total_resources_of_its_cluster_file() -> None:
    """CPUs of GPU machines do not count if there are other machines."""
    assert resources.total_resources([HEAD_ALONE, PLAIN, WITH_GPUS]) == {"CPU": 512.0, "GPU": 32.0}
    assert resources.total_resources([HEAD_ALONE, WITH_GPUS]) == {"CPU": 384.0, "GPU": 32.0}
    assert resources.total_resources([HEAD_ALONE]) == {}
    for target in (AWS, str(ROOT / "cluster" / "gcp.yaml"), TRAIN_JOB):
        promised = json.loads(submit._promised_resources(parse_target(target))[PROMISED_RESOURCES_ENV])
        assert promised == resources.total_resources(parse_target(target).machines)
        assert promised["GPU"] > 0
    assert submit._promised_resources(parse_target(ONPREM)) == {}, "without an autoscaler"


def test_preprocessing_on_gpus_requires_gpus() -> None:
    need = resources.required_resources(parse(["preprocess", "s3://b/c", "s3://b/d", "--set", "encoder.gpus=0.25"]))
    assert need == ResourceRequest(description="preprocess", bundle={"CPU": 1.0, "GPU": 0.25}, count=1)
    with pytest.raises(ValueError, match="room for 0"):
        resources.require_capacity(need, [HEAD_ALONE, PLAIN], "plain.yaml")
    resources.require_capacity(need, [HEAD_ALONE, PLAIN, WITH_GPUS], "both.yaml")


def test_a_job_requests_the_resources_of_its_driver() -> None:
    asked: list[dict[str, object]] = []

    class Client:
        def submit_job(self, **words: object) -> str:
            asked.append(words)
            return "a job"

    for own in ({"GPU": 1.0}, {"CPU": 1.0}, {}):
        assert submit._submit_when_ready(Client(), ["python"], {}, own) == "a job"
    assert [{k: v for k, v in words.items() if "num" in k} for words in asked] == [
        {"entrypoint_num_gpus": 1.0},
        {"entrypoint_num_cpus": 1.0},
        {},
    ]


# ------------------------------------------------------------------------------------------------------------- RayJobs

KUBECTL = """#!{python}
# Replaces kubectl: records its input, replies as KubeRay does.
import json, pathlib, sys
folder = pathlib.Path({folder!r})
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
verb = sys.argv[1]
if verb == "create":
    given = json.load(sys.stdin)
    (folder / "given.json").write_text(json.dumps(given))
    print(json.dumps({{"metadata": {{"name": given["metadata"]["generateName"] + "x7k2p"}}}}))
elif verb == "get":
    message = "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars): ..."
    queue = folder / "states"
    states = json.loads(queue.read_text()) if queue.exists() else [["FAILED", "Failed"]]
    if len(states) > 1:
        queue.write_text(json.dumps(states[1:]))
    word, deployed = states[0]
    print(json.dumps({{"status": {{"jobStatus": word, "jobDeploymentStatus": deployed, "message": message}}}}))
elif verb == "logs":
    print("log of the job")
elif verb == "patch":
    print("patched")
"""


@pytest.fixture
def kubectl(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = here / "kubernetes"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(KUBECTL.format(python=sys.executable, folder=str(folder)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_a_rayjob_runs_the_command_and_returns_its_exit_code(
    kubectl: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.mlflow.svc:5000")
    words = ["train", "--stage", "joint", "--data", "s3://b/d"]
    result = submit.submit_job(TRAIN_JOB, parse(words, "/shared"), shared="/shared")
    assert (result["job"], result["status"], result["exit_code"]) == ("mutual-forcing-train-x7k2p", "FAILED", 2)
    assert "log of the job" in capfd.readouterr().out
    given = json.loads((kubectl / "given.json").read_text())
    assert given["spec"]["entrypoint"] == "python -m workflows.cli train --stage joint --data s3://b/d"
    environment = yaml.safe_load(given["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow.mlflow.svc:5000"
    assert given["spec"]["rayClusterSpec"] == parse_target(TRAIN_JOB).config["spec"]["rayClusterSpec"]

    assert submit.job_status(result["job"])["exit_code"] == 2
    submit.job_logs(result["job"])
    submit.stop_job(result["job"])
    calls = [json.loads(line) for line in (kubectl / "calls").read_text().splitlines()]
    assert ["patch", "rayjob", result["job"], "--type", "merge", "-p", '{"spec": {"suspend": true}}'] in calls


def test_a_rayjob_of_a_driver_only_command_requests_a_gpu(kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.mlflow.svc:5000")
    file = str(ROOT / "cluster" / "kuberay" / "rayjob-evaluate.yaml")
    for words, own in ((["evaluate", "runs/a"], 1.0), (["train", "--stage", "joint", "--data", "s3://b/d"], None)):
        submit.submit_job(file, parse(words, "/shared"), shared="/shared", detach=True)
        spec = json.loads((kubectl / "given.json").read_text())["spec"]
        assert spec.get("entrypointNumGpus") == own
        assert PROMISED_RESOURCES_ENV in yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]


def test_logs_are_followed_over_a_failed_attempt(kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KubeRay reports FAILED and Retrying together, and starts another attempt."""
    monkeypatch.setattr(kuberay, "POLL_S", 0.01)
    states = [["", "Initializing"], ["RUNNING", "Running"], ["FAILED", "Running"], ["FAILED", "Retrying"]]
    states += [["", "Retrying"], ["", ""], ["", "Initializing"], ["RUNNING", "Running"], ["SUCCEEDED", "Running"]]
    (kubectl / "states").write_text(json.dumps([*states, ["SUCCEEDED", "Complete"]]))
    kuberay.follow_logs("mine")
    assert kuberay.job_status("mine")["exit_code"] == 0
    calls = [json.loads(line)[0] for line in (kubectl / "calls").read_text().splitlines()]
    assert calls.count("logs") == 2


@pytest.mark.parametrize(
    ("word", "deployed", "status", "code"),
    [
        ("", "Suspended", "STOPPED", 2),  # by `mfctl stop`
        ("STOPPED", "Complete", "STOPPED", 2),
        ("FAILED", "Complete", "FAILED", 2),
        ("FAILED", "Retrying", "Retrying", None),
        ("", "Failed", "FAILED", 2),
        ("RUNNING", "Running", "RUNNING", None),
        ("", "", "PENDING", None),
        ("RUNNING", "Suspending", "RUNNING", None),
    ],
)
def test_status_of_a_rayjob(kubectl: Path, *, word: str, deployed: str, status: str, code: int | None) -> None:
    (kubectl / "states").write_text(json.dumps([[word, deployed]]))
    found = kuberay.job_status("mine")
    assert (found["status"], found["exit_code"]) == (status, code)


def test_a_kubectl_failure_gives_one_message(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "kubectl").write_text("#!/bin/sh\necho 'The connection to the server was refused' >&2\nexit 1\n")
    (here / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="kubectl create .*refused.*current-context"):
        submit.submit_job(
            TRAIN_JOB, parse(["preprocess", "s3://b/c", "s3://b/d", "--set", "workers=0"], "/shared"), shared="/shared"
        )


@pytest.mark.slow
def test_an_unreachable_head_gives_one_message_with_its_start_command(here: Path) -> None:
    file = here / "mine.yaml"
    text = (
        Path(ONPREM).read_text().replace("10.0.0.10", "127.0.0.9").replace("file_mounts:", "file_mounts: {}\nmetadata:")
    )
    file.write_text(text)
    command = [sys.executable, "-m", "workflows.cli", "submit", str(file), "--", "doctor"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "no head of" in done.stderr and "ray up -y" in done.stderr
