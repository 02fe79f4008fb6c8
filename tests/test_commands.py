"""Check the commands of the pages: all of them parse, those of the first tutorials run, the site has its diagrams."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from workflows.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "docs" / "getting-started.md", *TUTORIALS, *GUIDES]
SERVERS = {"serve", "mlflow"}  # run until a signal; tests/workflows/serving covers them
OTHERS = (
    *(
        ".",
        "make",
        "pip",
        "pytest",
        "python",
        "git",
        "sudo",
        "mkdir",
        "tar",
        "curl",
        "docker",
        "kubectl",
        "aws",
        "gcloud",
    ),
    *("apt-get", "echo", "nvidia-cuda-mps-control", "ray", "ssh"),
)


def commands(page: Path) -> list[str]:
    """Return the lines of the shell blocks of a page, continuations joined and comments removed."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.join(shlex.split(line, comments=True)))]


def parse(words: list[str]) -> None:
    """Parse the arguments of `mfctl` without running the command."""
    command: Any = get_command(app)
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            assert any(words[0] in p.opts for p in command.params), f"no option {words[0]}"
            return
        command = command.commands[words[0]]
        words = words[1:]
    command.make_context(command.name, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_parse(page: Path) -> None:
    for line in commands(page):
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        if words[:1] == ["mfctl"] and "..." not in words:
            parse(words[1:])
            if "--" in words:
                parse(words[words.index("--") + 1 :])
        else:
            assert words[0] in ("mfctl", *OTHERS), f"{page.name}: unknown program in {line!r}"


def test_a_wrong_option_does_not_parse() -> None:
    with pytest.raises(Exception, match="--no-such-option"):
        parse(["train", "--no-such-option"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_tutorials_run(tmp_path: Path) -> None:
    """Run all commands and programs of the first two tutorials in one empty folder, in their order."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*words: str) -> None:
        done = subprocess.run(
            [sys.executable, "-P", *words], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"

    for name in ("first-clip.md", "own-videos.md"):
        page = ROOT / "docs" / "tutorials" / name
        for line in commands(page):
            words = shlex.split(line)
            if words[0] == "mfctl" and words[1] not in SERVERS:
                run("-m", "workflows.cli", *words[1:])
        for program in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            run("-c", program)
    assert all((tmp_path / name).stat().st_size > 0 for name in ("clip.mp4", "other.mp4", "sheet.png"))


def test_version_is_that_of_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workflows.cli", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f'version = "{done.stdout.split()[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_every_mermaid_block_of_the_site_has_its_picture() -> None:
    """The site shows stored SVG files, so that it loads nothing from other hosts."""
    blocks = [
        block
        for page in (ROOT / "docs").rglob("*.md")
        for block in re.findall(r"^```mermaid\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    names = {f"{hashlib.sha256(block.encode()).hexdigest()[:12]}.svg" for block in blocks}
    assert names == {path.name for path in (ROOT / "docs" / "assets" / "diagrams").glob("*.svg")}


def test_pages_are_in_the_navigation_and_in_llms_txt() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [p for p in (ROOT / "docs").rglob("*.md") if not {"design", "lab-notes"} & set(p.parts)]
    assert [p for p in pages if str(p.relative_to(ROOT / "docs")) not in navigation] == []
    links = re.findall(r"\]\(([\w./-]+)\)", (ROOT / "llms.txt").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_environment_variable_of_mfctl_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "environment-variables.md").read_text()
    sources = [p.read_text() for top in ("mfcore", "preprocessing", "workflows") for p in (ROOT / top).rglob("*.py")]
    names = {name for text in sources for name in re.findall(r"\bMFCTL_[A-Z_]+\b", text)}
    assert names
    assert {name for name in names if f"`{name}`" not in page} == set()
