"""Validate every file in cluster/: schema and loader of Ray, API of AWS, CRDs of KubeRay, linters."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.helpers.parsed_command import parse
from workflows.jobs import kuberay, resources
from workflows.jobs.command import check_paths
from workflows.jobs.targets import parse_target

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
RAY_FILES = ("local.yaml", "onprem.yaml", "aws.yaml", "gcp.yaml")
CLOUDS = ("aws.yaml", "gcp.yaml")
RAY_JOBS = sorted(path.name for path in (CLUSTER / "kuberay").glob("rayjob-*.yaml"))
CRDS = ROOT.parent / "shared" / "data" / "kuberay"
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
ELSEWHERE = "no CRDs of KubeRay in ../shared/data/kuberay: only known fields of Ray and Kubernetes were checked"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def prepared(name: str) -> dict[str, Any]:
    """Return the file as `ray up` prepares it: with defaults, old forms translated."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(load(name))


@pytest.mark.parametrize("name", RAY_FILES)
def test_rays_loader_accepts_the_file(name: str) -> None:
    from ray.autoscaler._private.util import validate_config

    jsonschema.validate(load(name), ray_schema())
    config = prepared(name)
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 1 and "--dashboard-host=127.0.0.1" in starts[0], "the job server is on the loopback"
    if name != "local.yaml":
        assert "--autoscaling-config" in starts[0]
        needed = ("RAY_AUTH_MODE=token", "GRPC_ENABLE_FORK_SUPPORT=0", "--disable-usage-stats")
        assert all(text in c for c in commands if "ray start" in c for text in needed)
        assert load(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
        assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    else:
        assert "--node-ip-address=127.0.0.1" in starts[0]


def ray_schema() -> dict[str, Any]:
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.mark.parametrize("name", [name for name in RAY_FILES if name != "local.yaml"])
def test_every_command_is_a_complete_shell_command(name: str) -> None:
    """Ray puts each command into parentheses, so a comment would hide the closing one."""
    config = load(name)
    kinds = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    for command in [c for kind in kinds for c in config.get(kind, [])]:
        done = subprocess.run(["bash", "-n", "-c", f"({command})"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}: {command}: {done.stderr}"


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_start_from_zero_with_a_head_that_is_not_spot(name: str) -> None:
    config = load(name)
    kinds = config["available_node_types"]
    assert config["provider"]["use_internal_ips"] is True
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert "SPOT" not in str(kinds["head"]["node_config"]).upper()
    for kind in ("preprocess", "train"):
        assert kinds[kind]["min_workers"] == 0 < kinds[kind]["max_workers"] <= config["max_workers"]
        assert "SPOT" in str(kinds[kind]["node_config"]).upper()
    assert "GPU" in kinds["train"]["resources"] and "GPU" not in kinds["preprocess"]["resources"]


def test_aws_machines_are_private_encrypted_and_require_metadata_tokens() -> None:
    for kind in load("aws.yaml")["available_node_types"].values():
        node = kind["node_config"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
        assert node["SubnetIds"] and "NetworkInterfaces" not in node
        assert node["SecurityGroupIds"], "Ray would make a group that opens port 22 to the world"


def test_gcp_machines_have_no_external_address() -> None:
    for kind in load("gcp.yaml")["available_node_types"].values():
        assert [list(interface) for interface in kind["node_config"]["networkInterfaces"]] == [["subnetwork"]]


@pytest.mark.slow
def test_ray_starts_every_machine_type_on_simulated_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray's provider runs with the parameter checks of boto; moto simulates AWS without a network."""
    moto = pytest.importorskip("moto")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes its key pair there
    with moto.mock_aws():
        import boto3
        from ray.autoscaler._private.aws import config as amazon
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
        from ray.autoscaler._private.util import validate_config

        for profile in ("mutual-forcing-head", "mutual-forcing-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        ec2 = boto3.client("ec2")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.1.0/24", AvailabilityZone="us-east-1a")["Subnet"][
            "SubnetId"
        ]
        group = ec2.create_security_group(GroupName="mutual-forcing", Description="a", VpcId=vpc)["GroupId"]
        config = with_network(prepared("aws.yaml"), subnet, group)
        validate_config(config)
        resolved = amazon.bootstrap_aws(config)
        provider = AWSNodeProvider(resolved["provider"], "mutual-forcing")
        for name, kind in resolved["available_node_types"].items():
            node = copy.deepcopy(kind["node_config"]) | {
                "ImageId": "ami-12c6146b"
            }  # moto does not support `resolve:ssm:`
            made = provider.create_node(node, {"ray-user-node-type": name, "ray-cluster-name": "mutual-forcing"}, 1)
            assert len(made) == 1, name
        machines = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        rules = [
            (g["GroupName"], rule)
            for g in ec2.describe_security_groups()["SecurityGroups"]
            for rule in g["IpPermissions"]
        ]
    assert len(machines) == 3
    assert all("PublicIpAddress" not in machine for machine in machines)
    assert all([g["GroupId"] for g in machine["SecurityGroups"]] == [group] for machine in machines)
    assert not [(name, rule) for name, rule in rules if rule.get("IpRanges")], "no port is open to an address"
    assert sorted(m.get("InstanceLifecycle", "on demand") for m in machines) == ["on demand", "spot", "spot"]


def with_network(config: dict[str, Any], subnet: str, group: str) -> dict[str, Any]:
    for kind in config["available_node_types"].values():
        kind["node_config"] |= {"SubnetIds": [subnet], "SecurityGroupIds": [group]}
    return config


def test_google_compute_api_has_every_field() -> None:
    """Compare with the API description in Google's client, if it is installed."""
    client = pytest.importorskip("googleapiclient", reason="google-api-python-client is not installed")
    path = Path(client.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    schemas = json.loads(path.read_text())["schemas"]
    for kind in load("gcp.yaml")["available_node_types"].values():
        check_fields(schemas, "Instance", kind["node_config"])


def check_fields(schemas: dict[str, Any], name: str, value: dict[str, Any]) -> None:
    properties = schemas[name]["properties"]
    assert set(value) <= set(properties), f"{name} has no {set(value) - set(properties)}"
    for key, part in value.items():
        kind = properties[key].get("items", properties[key])
        for one in part if isinstance(part, list) else [part]:
            if "$ref" in kind and isinstance(one, dict):
                check_fields(schemas, kind["$ref"], one)
            assert "enum" not in kind or one in kind["enum"], f"{name}.{key} is none of {kind['enum']}"


# ------------------------------------------------------------------------------------------------------------- KubeRay


CRD_FILES = {
    "RayCluster": "ray.io_rayclusters.yaml",
    "RayJob": "ray.io_rayjobs.yaml",
    "RayService": "ray.io_rayservices.yaml",
}


def cluster_spec(name: str) -> dict[str, Any]:
    """Return the cluster that a file of any kind describes."""
    spec = load(f"kuberay/{name}")["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayservice.yaml", *RAY_JOBS])
def test_kuberays_crds_accept_the_file(name: str) -> None:
    if not CRDS.is_dir():
        pytest.skip(ELSEWHERE)
    manifest = load(f"kuberay/{name}")
    crd = CRD_FILES[manifest["kind"]]
    if not (CRDS / crd).is_file():
        pytest.skip(f"no {crd} in ../shared/data/kuberay: only its cluster was checked")
    schema = crd_schema(crd, manifest["apiVersion"].split("/")[1])
    jsonschema.Draft7Validator(schema).validate(manifest)
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["headGroupSpce"] = {}
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpce"):
        jsonschema.Draft7Validator(schema).validate(wrong)


def test_kuberays_crd_accepts_the_cluster_of_the_service() -> None:
    if not CRDS.is_dir():
        pytest.skip(ELSEWHERE)
    schema = crd_schema("ray.io_rayclusters.yaml", "v1")["properties"]["spec"]
    jsonschema.Draft7Validator(schema).validate(cluster_spec("rayservice.yaml"))


def test_ray_serve_accepts_the_application_of_the_service() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray Serve is not installed: the extra serve")
    from workflows.serving import deployment

    spec = load("kuberay/rayservice.yaml")["spec"]
    assert set(spec) == {
        "rayClusterDeletionDelaySeconds",
        "excludeHeadPodFromServeSvc",
        "serveConfigV2",
        "rayClusterConfig",
    }
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{deployment.__name__}:{deployment.application.__name__}"
    arguments = deployment.LiveArguments(**application.args)
    assert not arguments.local and arguments.token is None, "the token is in a Secret"
    (group,) = cluster_spec("rayservice.yaml")["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    assert deployment.TOKEN_VARIABLE in [variable["name"] for variable in container["env"]]
    assert (group["minReplicas"], group["maxReplicas"]) == (arguments.replicas, arguments.max_replicas)
    assert (arguments.device, container["resources"]["limits"]["nvidia.com/gpu"]) == ("cuda", "1")
    assert {"containerPort": config.http_options.port, "name": "serve"} in container["ports"]


@pytest.mark.parametrize("name", RAY_JOBS)
def test_kuberays_crds_accept_the_submitted_manifest(name: str) -> None:
    if not CRDS.is_dir():
        pytest.skip(ELSEWHERE)
    made = kuberay.render_manifest(
        load(f"kuberay/{name}"), ["doctor", "--json"], {"MFCTL_CWD": "/shared", "AWS_PROFILE": "a b"}, {"GPU": 1.0}
    )
    jsonschema.Draft7Validator(crd_schema("ray.io_rayjobs.yaml", "v1")).validate(made)
    assert yaml.safe_load(made["spec"]["runtimeEnvYAML"])["env_vars"]["AWS_PROFILE"] == "a b"


@cache
def crd_schema(name: str, version: str) -> dict[str, Any]:
    definition = yaml.load((CRDS / name).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return strict({v["name"]: v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"]}[version])


def strict(schema: Any) -> Any:
    """Make unknown fields errors; Kubernetes drops them silently."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    free = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not free:
        made["additionalProperties"] = False
    return made


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayservice.yaml", *RAY_JOBS])
def test_kuberay_pods_are_unprivileged_and_share_one_folder(name: str) -> None:
    import ray

    spec = cluster_spec(name)
    assert spec["rayVersion"] == ray.__version__ == pins()["ray"]
    assert spec["authOptions"] == {"mode": "token"}, "KubeRay makes a token and gives it to every container"
    pods = [group["template"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]
    pods += [load(f"kuberay/{name}")["spec"].get("submitterPodTemplate", pods[0])]
    for pod in pods:
        assert pod["metadata"]["labels"] == {"app": "mutual-forcing"}, "the network policy selects it"
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == RESTRICTED
            assert "RAY_AUTH_MODE" not in str(container.get("env")), "KubeRay sets it"
    assert [c["name"] for pod in pods for c in pod["spec"]["containers"] if "envFrom" in c] == [
        "ray-head" if i == 0 else "ray-worker" for i in range(len(spec["workerGroupSpecs"]) + 1)
    ] + ([] if name in RAY_JOBS else ["ray-head"]), "the pod that submits the job has no keys"
    check_kubernetes_token(spec)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        container = group["template"]["spec"]["containers"][0]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert group.get("minReplicas", 0) == (1 if group.get("groupName") == "live" else 0)
    claim = load("kuberay/storage.yaml")
    assert (
        claim["metadata"]["name"]
        == spec["headGroupSpec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    )
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def check_kubernetes_token(spec: dict[str, Any]) -> None:
    """Check that only the container of the autoscaler has access to the API of Kubernetes."""
    assert spec["autoscalerOptions"]["securityContext"] == RESTRICTED
    (mount,) = spec["autoscalerOptions"]["volumeMounts"]
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    head = spec["headGroupSpec"]["template"]["spec"]
    (volume,) = (v for v in head["volumes"] if v["name"] == mount["name"])
    assert [next(iter(source)) for source in volume["projected"]["sources"]] == [
        "serviceAccountToken",
        "configMap",
        "downwardAPI",
    ]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        for container in group["template"]["spec"]["containers"]:
            assert mount["name"] not in {m["name"] for m in container["volumeMounts"]}


def test_the_network_policy_admits_the_pods_and_the_operator_only() -> None:
    policy = load("kuberay/network-policy.yaml")
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    own = {"matchLabels": {"app": "mutual-forcing"}}
    assert policy["spec"]["podSelector"] == own
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    inside, operator = policy["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": own}]}
    (source,) = operator["from"]
    assert source["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]


@pytest.mark.parametrize("name", RAY_JOBS)
def test_entrypoints_are_commands_that_fit_their_pods(name: str) -> None:
    target = parse_target(str(CLUSTER / "kuberay" / name))
    python, module, package, *argv = target.config["spec"]["entrypoint"].split()
    assert (python, module, package) == ("python", "-m", "workflows.cli")
    resources.require_capacity(resources.required_resources(parse(argv, "/shared")), target.machines, name)


# ----------------------------------------------------------------------------------------------------------- placement


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(
    "words",
    [
        "preprocess s3://b/clips s3://b/data",
        *(
            f"train --stage {s} --preset {p}"
            for s in ("video", "joint", "mutual")
            for p in ("tiny", "small", "base", "full")
        ),
    ],
)
def test_every_stage_fits_on_cloud_machines(name: str, words: str) -> None:
    target = parse_target(str(CLUSTER / name))
    need = resources.required_resources(parse(words.split(), "/shared"))
    assert need is not None
    resources.require_capacity(need, target.machines, name)


def submissions() -> list[str]:
    """Return every `mfctl submit` command of the pages."""
    blocks = [
        b for page in sorted(CLUSTER.rglob("*.md")) for b in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.startswith("mfctl submit")]


@pytest.mark.parametrize("line", submissions())
def test_commands_of_the_pages_are_valid_and_fit(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.net:5000")
    monkeypatch.chdir(ROOT)
    given = parse(line.split()[1:]).values  # options of submit, target, command
    target, shared = parse_target(given["target"]), given["shared"]
    command = parse(given["argv"], shared)
    if target.kind != "here":
        check_paths(command, target.name, shared)
    if target.machines:
        resources.require_capacity(resources.required_resources(command), target.machines, target.name)


# ------------------------------------------------------------------------------------------------- images, MLflow, all


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return a Dockerfile as pairs of instruction and arguments; continued lines are joined."""
    text = re.sub(r"\\\n", " ", "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#")))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", ["Dockerfile", "mlflow/Dockerfile"])
def test_images_are_pinned_and_unprivileged(name: str) -> None:
    found = instructions(CLUSTER / name)
    rest = [text for word, text in found if word == "FROM"]
    assert all(re.search(r":[\w${}.-]+$", text) and ":latest" not in text for text in rest)
    assert [text for word, text in found if word == "USER"] == ["1000"]
    assert [word for word, _ in found].index("USER") > max(i for i, (word, _) in enumerate(found) if word == "RUN")
    for text in (text for word, text in found if word == "COPY"):
        assert all((ROOT / source).exists() for source in text.split()[:-1]), text
    installs = [text for word, text in found if word == "RUN" and "pip install" in text]
    assert installs and all(re.search(r"(-r|-c) constraints.txt|--no-deps", text) for text in installs)


def test_the_image_has_no_development_tools(tmp_path: Path) -> None:
    """Run the command of the Dockerfile that lists the packages."""
    (run,) = [text for word, text in instructions(CLUSTER / "Dockerfile") if word == "RUN" and "requirements" in text]
    found = re.search(r'python (-c ".*") > requirements.txt', run)
    assert found is not None
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = f"{sys.executable} {found[1]}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = done.stdout.splitlines()
    assert set(project["dependencies"]) <= set(installed)
    names = {re.split(r"[\[>=<]", line)[0] for line in installed}
    tools = {"pytest", "pytest-timeout", "pytest-xdist", "ruff", "pyright", "import-linter", "moto", "beartype"}
    assert not names & tools
    assert "-c constraints.txt -r requirements.txt" in run and "-r constraints.txt" not in run


def test_the_image_has_all_packages_and_the_build_context_no_more() -> None:
    packages = {
        name.split(".")[0]
        for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    }
    copied = {
        word
        for instruction, text in instructions(CLUSTER / "Dockerfile")
        if instruction == "COPY"
        for word in text.split()[:-1]
    }
    in_context = {
        line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert packages <= copied == in_context


@pytest.mark.parametrize("name", ["Dockerfile", "mlflow/Dockerfile"])
def test_hadolint_finds_nothing(name: str) -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed; the file was parsed and checked above")
    done = subprocess.run([linter, str(CLUSTER / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_mlflow_server_listens_on_loopback_and_reads_passwords_from_files() -> None:
    compose = load("mlflow/compose.yaml")
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        assert "build" in service or re.search(r":\w", service["image"]), f"{name} has no fixed version"
    assert all(secret["file"].startswith("./secrets/") for secret in compose["secrets"].values())
    ignored = (CLUSTER / "mlflow" / ".gitignore").read_text().split()
    assert "secrets/" in ignored
    script = (CLUSTER / "mlflow" / "serve.sh").read_text()
    assert all(f"/run/secrets/{name}" in script for name in compose["secrets"])
    assert set(compose["services"]) == {"postgres", "mlflow"}, "artifacts are in a volume"
    assert "artifacts:/artifacts" in compose["services"]["mlflow"]["volumes"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_kubernetes_server_declares_its_mounts() -> None:
    documents = list(yaml.safe_load_all((CLUSTER / "mlflow" / "kubernetes.yaml").read_text()))
    assert [d["kind"] for d in documents] == ["Namespace", "Deployment", "Service", "NetworkPolicy"]
    (source,) = documents[3]["spec"]["ingress"][0]["from"]
    assert source["podSelector"] == {"matchLabels": {"app": "mutual-forcing"}}
    assert documents[3]["spec"]["podSelector"]["matchLabels"] == documents[2]["spec"]["selector"]
    pod = documents[1]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert documents[1]["spec"]["selector"]["matchLabels"] == documents[2]["spec"]["selector"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    read = set(re.findall(r"\$\{?([A-Z_]+)", (CLUSTER / "mlflow" / "serve.sh").read_text()))
    assert {"ARTIFACTS"} <= read & {variable["name"] for variable in container["env"]}


def test_no_file_contains_a_secret() -> None:
    assigned = r"""(?:password|secret_access_key|token)["']?\s*[:=]\s*["']?(?!disabled)[a-z0-9/+]{8,}["']?\s*[,}\n]"""
    secret = re.compile(rf"AKIA[0-9A-Z]{{16}}|-----BEGIN|(?i:{assigned})")
    files = [path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix != ".md"]
    assert len(files) > 12
    for path in files:
        found = secret.search(path.read_text())
        assert found is None, f"{path}: {found}"


@pytest.mark.parametrize("name", ["bucket-policy.json", "head-policy.json"])
def test_policies_allow_named_actions_on_named_resources(name: str) -> None:
    for statement in json.loads((CLUSTER / "aws" / name).read_text())["Statement"]:
        assert statement["Effect"] == "Allow"
        assert not [action for action in statement["Action"] if "*" in action]
        reads = all(action.split(":")[1].startswith("Describe") for action in statement["Action"])
        assert statement["Resource"] != "*" or reads, "only Describe actions apply to all resources"


def test_the_head_starts_machines_of_this_cluster_only() -> None:
    """Bound by tag, machine type, region, subnet, security group and role."""
    config = load("aws.yaml")
    workers = [kind["node_config"] for name, kind in config["available_node_types"].items() if name != "head"]
    region, cluster = config["provider"]["region"], config["cluster_name"]
    statements = json.loads((CLUSTER / "aws" / "head-policy.json").read_text())["Statement"]
    starts = [statement for statement in statements if "ec2:RunInstances" in statement["Action"]]
    (machines,) = (statement for statement in starts if any(":instance/" in r for r in statement["Resource"]))
    limits = machines["Condition"]["StringEquals"]
    assert limits["aws:RequestTag/ray-cluster-name"] == cluster
    assert set(limits["ec2:InstanceType"]) == {node["InstanceType"] for node in workers}
    resources_of_starts = [resource for statement in starts for resource in statement["Resource"]]
    assert all(resource.startswith(f"arn:aws:ec2:{region}:") for resource in resources_of_starts)
    for kind, key in (("subnet", "SubnetIds"), ("security-group", "SecurityGroupIds")):
        (resource,) = (r for r in resources_of_starts if f":{kind}/" in r)
        assert {resource.rsplit("/", 1)[1]} == {i for node in workers for i in node[key]}
    for statement in statements:
        if {"ec2:CreateTags", "ec2:TerminateInstances"} & set(statement["Action"]):
            assert cluster in statement["Condition"]["StringEquals"].values()
    (role,) = (statement for statement in statements if "iam:PassRole" in statement["Action"])
    assert role["Condition"]["StringEquals"]["iam:PassedToService"] == "ec2.amazonaws.com"


def test_bucket_policy_allows_lookup_of_a_missing_dataset() -> None:
    """s3fs requests the bare name first; without permission the reply is Forbidden instead of missing."""
    granted: dict[str, set[str]] = {}
    for statement in json.loads((CLUSTER / "aws" / "bucket-policy.json").read_text())["Statement"]:
        for action in statement["Action"]:
            granted.setdefault(action, set()).update(r.removeprefix("arn:aws:s3:::") for r in statement["Resource"])
        prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix")
        assert prefixes is None or {"clips", "clips/*", "data", "data/*", "runs", "runs/*"} <= set(prefixes)
    for name in ("clips", "data", "runs"):
        assert {f"BUCKET/{name}", f"BUCKET/{name}/*"} <= granted["s3:GetObject"]
    assert not any(place.startswith("BUCKET/clips") for place in granted["s3:PutObject"] | granted["s3:DeleteObject"])


@pytest.mark.parametrize("name", CLOUDS)
def test_a_job_may_wait_an_hour_for_a_machine(name: str) -> None:
    """The head reads the time limit of jobs with a driver that needs resources."""
    (start,) = [c for c in load(name)["head_start_ray_commands"] if "ray start" in c]
    assert "RAY_JOB_START_TIMEOUT_SECONDS=3600 " in start


@pytest.mark.parametrize("name", ["raycluster.yaml", *RAY_JOBS])
def test_pods_have_the_same_limit(name: str) -> None:
    spec = load(f"kuberay/{name}")["spec"]
    head = spec.get("rayClusterSpec", spec)["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "RAY_JOB_START_TIMEOUT_SECONDS", "value": "3600"} in head["env"]


def test_the_evaluation_job_requests_the_gpu_for_its_driver() -> None:
    target = parse_target(str(CLUSTER / "kuberay" / "rayjob-evaluate.yaml"))
    driver = resources.driver_resources(
        parse(target.config["spec"]["entrypoint"].split()[3:], "/shared"), target.machines
    )
    assert driver == {"GPU": target.config["spec"]["entrypointNumGpus"]}


@pytest.mark.parametrize("name", RAY_JOBS)
def test_the_cluster_of_a_job_ends_with_it(name: str) -> None:
    """`ttlSecondsAfterFinished` keeps the cluster, not the logs, which are in the submitter pod."""
    spec = load(f"kuberay/{name}")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] == 0
