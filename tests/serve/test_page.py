"""The page: every word in both languages, nothing inline, nothing from elsewhere."""

import re

import pytest

from cn_clip.serve.page_routes import page_files

FILES = {path: content.decode() for path, (content, _kind) in page_files().items()}
HTML = FILES["/"]
SCRIPTS = {path: text for path, text in FILES.items() if path.endswith(".js")}


def words(language):
    """Return the names of the words of a language in words.js."""
    text = FILES["/static/words.js"]
    block = text[text.index(f"  {language}: {{") :]
    block = block[: block.index("\n  },\n")]
    block = re.sub(r'"(?:[^"\\]|\\.)*"|`[^`]*`', '""', block)
    return re.findall(r"(\w+): (?=\"|\(|\[)", block.partition("\n")[2])


def test_both_languages_have_the_same_words_once():
    chinese, english = words("zh"), words("en")
    assert len(chinese) > 60 and len(set(chinese)) == len(chinese)
    assert sorted(chinese) == sorted(english)


def test_every_word_that_the_page_shows_exists_and_every_word_is_shown():
    used = set(re.findall(r'data-(?:t|label|title|placeholder)="(\w+)"', HTML))
    for text in SCRIPTS.values():
        used |= set(re.findall(r'\bt\("(\w+)"', text))
    facts = re.findall(r'^    \["(\w+)", hit', FILES["/static/search.js"], re.MULTILINE)
    reasons = {"whyImage", "whyText", "whyCaption"}  # made from `why` of a result
    facts += ["probability", "why", "size"]
    assert used | reasons | set(facts) == set(words("zh"))


def test_every_element_that_a_script_names_is_on_the_page():
    ids = re.findall(r'\bid="([\w-]+)"', HTML)
    assert len(ids) == len(set(ids))
    for path, text in SCRIPTS.items():
        for name in re.findall(r'byId\("([\w-]+)"\)', text):
            assert name in ids, f"{path} names {name}"


def test_nothing_is_inline_and_nothing_comes_from_elsewhere():
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|javascript:", HTML)
    for path, text in FILES.items():
        text = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w+\.|\beval\(|innerHTML|document\.write", text), path


def test_every_file_that_the_page_names_is_served():
    named = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', HTML))
    for text in SCRIPTS.values():
        named |= {f"/static/{name}" for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named == set(FILES) - {"/"}


@pytest.mark.parametrize(
    "name", ["query", "folder", "after", "before", "min-side", "labels", "key"]
)
def test_every_field_has_a_label(name):
    (field,) = re.findall(rf'<(?:input|select|textarea)[^>]*id="{name}"[^>]*>', HTML)
    inside = re.search(rf'<label><span data-t="\w+"></span><\w+[^>]*id="{name}"', HTML)
    assert "data-label" in field or f'<label for="{name}"' in HTML or inside
