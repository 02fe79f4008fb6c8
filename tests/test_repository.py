"""Check the repository: packages listed, versions pinned, dependencies declared, pages correct."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mfcore", "preprocessing", "workflows")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEVER_IMPORTED_BY_NAME = {"s3fs", "python-multipart"}  # fsspec loads it for s3:// URIs, starlette for uploads
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ""}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def repository_files() -> Iterator[Path]:
    tops = (*PACKAGES, "tests", "docs", "cluster", ".ci")
    for path in [*ROOT.glob("*"), *(p for top in tops for p in (ROOT / top).rglob("*"))]:
        own = path.name != ".git" and "__pycache__" not in path.parts  # .git is a file in a linked work tree
        if own and path.is_file() and path.suffix in TEXT:
            yield path


def requirements(*groups: str) -> list[Requirement]:
    project = PROJECT["project"]
    extras = [line for group in groups for line in project["optional-dependencies"][group]]
    return [Requirement(line) for line in project["dependencies"] + extras]


def test_every_package_is_listed() -> None:
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in sources(*PACKAGES) if p.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_package_files_stay_empty() -> None:
    assert [p for p in sources(*PACKAGES) if p.name == "__init__.py" and p.read_text().strip()] == []


def test_every_import_is_declared_and_every_dependency_imported() -> None:
    imported = {name for path in sources(*PACKAGES) for name in top_level_imports(path)}
    foreign = imported - set(sys.stdlib_module_names) - set(PACKAGES)
    owners = packages_distributions()
    providers = {name: {canonicalize_name(owner) for owner in owners.get(name, [name])} for name in foreign}
    declared = {canonicalize_name(r.name) for r in requirements("pretrained", "speech", "hub", "people")}
    assert {name for name, owner in providers.items() if not owner & declared} == set(), "imported and not declared"
    runtime = {canonicalize_name(r.name) for r in requirements()}
    assert runtime - set().union(*providers.values()) - NEVER_IMPORTED_BY_NAME == set(), "declared and not imported"


def top_level_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


def test_constraints_are_exact_public_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    assert len({pin.split("==")[0].lower() for pin in pins}) == len(pins)


def test_constraints_pin_every_installed_dependency() -> None:
    """All requirements of installed packages have a pin, extras included; CUDA packages of torch have none."""
    text = (ROOT / "constraints.txt").read_text()
    pinned = {canonicalize_name(name): pin for name, pin in re.findall(r"^([^#\s=]+)==(\S+)$", text, re.MULTILINE)}
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(r.name), extra) for r in requirements("dev") for extra in {"", *r.extras}]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            installed = version(name).split("+")[0]
        except PackageNotFoundError:
            continue  # for another platform
        assert pinned.get(name) is not None or name.startswith(("cuda-", "nvidia-", "triton")), (
            f"{name}=={installed} has no pin"
        )
        for line in requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), e) for e in {"", *needed.extras}]
    assert len(seen) > 100


def test_text_is_plain_ascii_without_paths_of_a_machine() -> None:
    private = re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/")
    own = Path(__file__)
    for path in repository_files():
        text = path.read_text()
        assert text.isascii(), f"{path}: {[c for c in text if not c.isascii()][:5]}"
        assert path == own or not private.search(text), f"{path}: {private.search(text)}"


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "cluster/onprem.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("cluster/**/README.md")),
]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_existing_commands_options_and_files(page: str) -> None:
    from typer.main import get_command

    from workflows.cli.app import app

    verbs = get_command(app).commands
    text = (ROOT / page).read_text()
    for verb, rest in re.findall(r"^ *mfctl ([a-z]+)([^\n#]*)", text, re.MULTILINE):
        assert verb in verbs, f"{page} names mfctl {verb}"
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        options = re.findall(r"(?<=\s)--[a-z][a-z-]*", rest.split(" -- ")[0])
        assert set(options) <= known, f"{page}: mfctl {verb} has no {set(options) - known}"
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"{page} names make {target}"
    for path in re.findall(r"`((?:mfcore|preprocessing|workflows|docs|cluster|tests)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{page} names {path}"


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("exit 0", 0, "no known vulnerabilities"),
        ("echo 'Found 1 known vulnerability in 1 package' >&2; exit 1", 2, "pins versions with known vulnerabilities"),
        ("echo 'ConnectionError: no route' >&2; exit 1", 2, "vulnerability database of PyPI cannot be read"),
    ],
)
def test_the_audit_fails_without_its_database(tmp_path, program, code, message):
    """Replace pip-audit: the target must not pass when it has looked up nothing."""
    auditor = tmp_path / "audit" / "bin" / "pip-audit"
    auditor.parent.mkdir(parents=True)
    auditor.write_text(f"#!/bin/sh\n{program}\n")
    auditor.chmod(0o755)
    done = subprocess.run(
        ["make", "audit", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
