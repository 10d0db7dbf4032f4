"""Hooks of the documentation site (mkdocs.yml): links out of it, and the language of a page."""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace links to files that the site does not have by their paths."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target.partition("#")[0]))
        if re.match(r"[a-z]+:|#", target) or _is_in_site(path, files):
            return match[0]
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})"
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return _LINK.sub(replaced, markdown)


def _is_in_site(path: str, files: Any) -> bool:
    """Return whether a file of the repository is in the site: in docs/, and not excluded."""
    file = (
        files.get_file_from_path(path.removeprefix("docs/")) if path.startswith("docs/") else None
    )
    return file is not None and not file.inclusion.is_excluded()


def on_page_context(context: Any, page: Any, config: Any, nav: Any) -> Any:
    """Set the language of the page, of the site's own words too."""
    config.theme["language"] = "zh" if page.file.src_uri.startswith("zh/") else "en"
    return context
