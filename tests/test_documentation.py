"""Check links, paths and words of the documentation and the words of the code."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mfcore", "preprocessing", "workflows")
PAGES = sorted(
    p for top in (".", "docs", "cluster", "mfcore") for p in (ROOT / top).glob("*.md" if top == "." else "**/*.md")
)
HISTORY = ROOT / "docs" / "dev" / "lab-notes"  # notes name files at the commit of the note
GUIDE = ROOT / "docs" / "dev" / "writing-guide.md"  # lists the banned words
GLOSSARY = ROOT / "docs" / "concepts.md"  # lists former terms

BANNED = (
    r"anew|aside|whoever|whose|tells?|told|says?|said|beside|lets? go|let go",
    r"goes on|go on|going on|went on|made of|in words|as it is",
    r"(?<!there )is no [a-z]+|of ours|of (?:its|their) own|stands",
)
PATTERN = re.compile(rf"\b(?:{'|'.join(BANNED)})\b", re.IGNORECASE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    assert [t for t in local if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", [p for p in PAGES if HISTORY not in p.parents], ids=name_of)
def test_files_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:mfcore|preprocessing|workflows|docs|cluster|tests)/[\w./-]*)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line numbers and texts of the docstrings, messages and comments of one Python file."""
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def banned_words(path: Path) -> list[str]:
    if path.suffix == ".py":
        parts = list(prose_of(path))
    else:
        parts = list(enumerate(path.read_text().splitlines(), 1))
    return [f"{name_of(path)}:{line}: {m.group(0)}" for line, text in parts for m in PATTERN.finditer(text)]


def test_the_scan_finds_banned_words(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text('"""Nothing is no cycle."""\n\nx = 1  # told\n')
    assert [PATTERN.findall(text) for _, text in prose_of(file)] == [["told"], ["is no cycle"]]


@pytest.mark.parametrize("page", [p for p in PAGES if p not in (GUIDE, GLOSSARY)], ids=name_of)
def test_pages_use_plain_words(page: Path) -> None:
    assert banned_words(page) == []


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_code_uses_plain_words(package: str) -> None:
    files = [p for p in sorted((ROOT / package).rglob("*.py")) if p != Path(__file__)]
    assert [found for path in files for found in banned_words(path)] == []
