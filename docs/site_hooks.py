"""Hooks of the site: pages outside docs/, links between the two, and diagrams that render without network.

GitHub renders Mermaid blocks. The site replaces each block by the SVG file that ``docs/render_diagrams.py`` wrote
for it, so that no page loads a script from another host.
"""

import hashlib
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXTRA = ("CONTRIBUTING.md", "CHANGELOG.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("cluster/**/*.md"))))
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`(?!\])", re.DOTALL | re.MULTILINE)


def diagram_name(source: str) -> str:
    """Return the file name of the SVG of a Mermaid block."""
    return f"{hashlib.sha256(source.encode()).hexdigest()[:12]}.svg"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/."""
    for name in EXTRA:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    navigated = re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text())
    for file in files.documentation_pages():
        if file.src_uri not in navigated:
            file.inclusion = type(file.inclusion).NOT_IN_NAV
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace Mermaid blocks by pictures and rewrite links that leave docs/."""
    source = page.file.src_uri
    place = source if source in EXTRA else f"docs/{source}"

    def picture(match: re.Match[str]) -> str:
        name = diagram_name(match[1])
        if not (DOCS / "assets" / "diagrams" / name).exists():
            raise PluginError(f"{place}: a Mermaid block has no picture. Run python docs/render_diagrams.py.")
        up = posixpath.relpath(f"assets/diagrams/{name}", posixpath.dirname(source) or ".")
        return f"![Diagram]({up}){{ .diagram }}"

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        site = path.removeprefix("docs/") if path.startswith("docs/") else path if path in EXTRA else None
        if site is None:
            return f"{text} (`{os.fspath(path)}`)"
        return f"[{text}]({posixpath.relpath(site, posixpath.dirname(source) or '.')}{anchor})"

    parts, last = [], 0
    markdown = MERMAID.sub(picture, markdown)
    for code in _CODE.finditer(markdown):
        parts += [_LINK.sub(link, markdown[last : code.start()]), code[0]]
        last = code.end()
    return "".join([*parts, _LINK.sub(link, markdown[last:])])
