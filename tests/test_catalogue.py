"""The Chinese catalogue is complete, fits the English messages, and keeps to the glossary."""

import gettext
import re
import string
from pathlib import Path

import generate_catalogue as generate
import pytest

ROOT = Path(__file__).parent.parent
CHINESE = "\u4e00-\u9fff"
# Parts of the command line, which keep Latin punctuation.
SYNTAX = ("猫,狗,火箭", "猫,狗", "2:猫")
GLOSSARY = ROOT / "docs" / "zh" / "glossary.md"
PAGES = sorted([*(ROOT / "docs" / "zh").glob("*.md"), ROOT / "README.zh.md"])


@pytest.fixture(scope="module")
def catalogue():
    return generate.read_catalogue()


@pytest.fixture(scope="module")
def pairs(catalogue):
    """Return each English message with its translations: one, or one of each plural form."""
    return [
        (message.id, text)
        for message in catalogue
        if message.id
        for text in (message.string if isinstance(message.string, tuple) else (message.string,))
    ]


def english(message_id):
    """Return the message whose placeholders a translation may use: the plural, if it has one."""
    return message_id if isinstance(message_id, str) else message_id[1]


def test_every_message_has_a_translation(catalogue):
    wanted = {message.id: message for message in generate.template() if message.id}
    done = {message.id for message in catalogue if generate.is_done(message)}
    missing = [f"{english(i)!r} ({wanted[i].locations})" for i in wanted.keys() - done]
    assert not missing, (
        f"run `make catalogue`, fill in the translations in {generate.PO.relative_to(ROOT)}, "
        f"run it again: {missing}"
    )
    old = [english(message.id) for message in catalogue if message.id and message.id not in wanted]
    assert not old, f"no code has these messages; run `make catalogue`: {old}"


def test_the_compiled_catalogue_is_that_of_the_text(pairs):
    with generate.MO.open("rb") as stream:
        compiled = gettext.GNUTranslations(stream)
    for message_id, text in pairs:
        shown = (
            compiled.gettext(message_id)
            if isinstance(message_id, str)
            else compiled.ngettext(*message_id, 2)
        )
        assert shown == text, "run `make catalogue`"


def placeholders(message):
    """Return the values of a message with their formats, as in {count:,}."""
    found = set()
    for _text, name, form, conversion in string.Formatter().parse(message):
        if name is not None:
            found |= {(name, form, conversion)}
    return found


def test_translations_have_the_values_and_formats_of_their_messages(pairs):
    for message_id, text in pairs:
        assert placeholders(text) == placeholders(english(message_id)), (message_id, text)


@pytest.mark.parametrize(
    "pattern",
    [
        r"`[^`]*`",
        r"--[a-z][\w.-]*\w",
        r"\n",
        r"\[/?(?:red)?\]",
        r"https?://\w+",
        r"pip install ['\w\[\]{}.-]+",
    ],
)
def test_code_options_and_commands_are_not_translated(pairs, pattern):
    for message_id, text in pairs:
        wanted = sorted(set(re.findall(pattern, english(message_id))))
        assert sorted(set(re.findall(pattern, text))) == wanted, text


@pytest.mark.parametrize(
    ("mistake", "pattern"),
    [
        ("Latin punctuation", rf"[{CHINESE}][,;:?!()]|[,;!?()][{CHINESE}]|[{CHINESE}]\.(?!\w)"),
        ("no space beside Latin letters", rf"[{CHINESE}][A-Za-z0-9]|[A-Za-z0-9%][{CHINESE}]"),
        ("a space beside Chinese punctuation", r"\S[，；：。、（）？] +\S|\S +[，；：。、（）？]"),
    ],
)
def test_punctuation_and_spaces_are_chinese(pairs, mistake, pattern):
    found = []
    for _message_id, text in pairs:
        for part in SYNTAX:
            text = text.replace(part, "")
        text = re.sub(r"\{[^{}]*\}", "{}", text)
        if re.search(pattern, text):
            found.append(text)
    assert not found, mistake


def forbidden():
    """Yield (English term, Chinese term, a variant that is not used) of the glossary."""
    for line in GLOSSARY.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[2] and cells[2] != "不用" and not cells[2].startswith("--"):
            for variant in cells[2].split("、"):
                yield cells[0], cells[1], variant


def test_the_catalogue_keeps_to_the_glossary(pairs):
    terms = list(forbidden())
    assert len(terms) >= 40
    for _message_id, text in pairs:
        wrong = [(variant, "->", term) for _en, term, variant in terms if variant in text]
        assert not wrong, (text, wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_chinese_pages_keep_to_the_glossary(page):
    if page == GLOSSARY:
        return
    text = page.read_text(encoding="utf-8")
    wrong = [(variant, "->", term) for _en, term, variant in forbidden() if variant in text]
    assert not wrong
