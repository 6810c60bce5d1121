"""A hook of mkdocs: pages at the root of the repository are pages of the site too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, with links as they are from within `docs`."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_LINK.sub(_as_in_docs, text)))
    return files


def _as_in_docs(link: re.Match[str]) -> str:
    """A link from within `docs`; its text alone where it leads to what the site does not have."""
    text, target, anchor = link[1], link[2], link[3] or ""
    target = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
    return f"[{text}]({target}{anchor})" if target else text
