"""The documentation as a site: every page is in its menu, and it builds without a warning."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
PAGES = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def menu():
    """Return the pages that the menu names."""
    return re.findall(r"[\w/.-]+\.md", CONFIG[CONFIG.index("\nnav:") :])


def test_only_groups_of_the_menu_have_entries():
    lines = CONFIG[CONFIG.index("\nnav:") :].strip().splitlines()
    depths = [len(line) - len(line.lstrip()) for line in lines]
    for line, depth, next_depth in zip(lines, depths, depths[1:], strict=False):
        assert next_depth <= depth or line.endswith(":"), line


def test_every_page_is_in_the_menu_once():
    assert sorted(menu()) == sorted(PAGES)


def test_every_chinese_page_is_the_twin_of_an_english_one_and_links_to_it():
    english = PAGES - {"api.md", "cli.md", "recipe.md"}  # of code
    english = {page for page in english if not page.startswith(("zh/", "adr/"))}
    chinese = {page.removeprefix("zh/") for page in PAGES if page.startswith("zh/")}
    assert english == chinese - {"glossary.md"}
    for page in sorted(english):
        up = "../" * page.count("/")
        head = (DOCS / page).read_text(encoding="utf-8")[:300]
        twin = (DOCS / "zh" / page).read_text(encoding="utf-8")[:300]
        assert f"[中文]({up}zh/{page})" in head, page
        assert f"[English](../{up}{page})" in twin, page


def test_the_names_of_the_api_page_exist():
    from importlib import import_module

    for name in re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE):
        if find_spec(name.rpartition(".")[0]).submodule_search_locations and find_spec(name):
            continue  # a module
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


@pytest.mark.full
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs pip install -e '.[docs]'")
def test_the_site_builds_offline_without_a_warning_and_is_searched_in_chinese(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site/search/search_index.json").read_text(encoding="utf-8")
    assert '"zh"' in index and "\\u200b" in index.encode("unicode_escape").decode()
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        language = "zh" if "/zh/" in page.as_posix() else "en"
        assert f'<html lang="{language}"' in text, page
        assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', text), page
