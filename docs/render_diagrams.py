"""Render the Mermaid blocks of the documentation into docs/assets/diagrams, in Chromium.

    python docs/render_diagrams.py path/to/mermaid.min.js      # from: npm pack mermaid

Pictures of blocks that no page contains are removed. Needs the extras ``browser`` and ``docs``, and Chromium.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from playwright.sync_api import sync_playwright
from site_hooks import DOCS, MERMAID, diagram_name


def main() -> None:
    """Render all blocks."""
    folder = DOCS / "assets" / "diagrams"
    folder.mkdir(parents=True, exist_ok=True)
    blocks = {diagram_name(m[1]): m[1] for page in DOCS.rglob("*.md") for m in MERMAID.finditer(page.read_text())}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content("<body></body>")
        page.add_script_tag(path=sys.argv[1])
        page.evaluate(
            "mermaid.initialize({startOnLoad: false, theme: 'neutral', htmlLabels: false,"
            " flowchart: {htmlLabels: false}})"
        )
        for name, source in blocks.items():
            svg = page.evaluate("async s => (await mermaid.render('d', s)).svg", source)
            (folder / name).write_text(svg.encode("ascii", "xmlcharrefreplace").decode() + "\n")
        browser.close()
    for old in folder.glob("*.svg"):
        if old.name not in blocks:
            old.unlink()


if __name__ == "__main__":
    main()
