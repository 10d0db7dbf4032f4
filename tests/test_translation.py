"""What a person reads passes through one function, and comes out in the language of the user."""

import ast
import ctypes
import os
import re
import string
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from jinja2 import Environment
from jinja2.ext import extract_from_ast

import cn_clip
from cn_clip import cli, translation
from cn_clip.calibration import read_calibration
from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.translation import _, _n, languages, translate

SOURCE = Path(cn_clip.__file__).parent
DOCS = Path(__file__).parent.parent / "docs"
TREES = {
    path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
}
TEMPLATES = [
    (path.relative_to(SOURCE).as_posix(), path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.html"))
]
MARKERS = {"_", "_n", "N_", "translate"}
ERRORS = {node.name for node in TREES["errors.py"].body if isinstance(node, ast.ClassDef)}
# Other functions whose literal arguments a person reads.
SHOWN = {"print", "warn", "add_column", "add_row", "add_task", "_progress_bar", "_fail", "Finding"}
SHOWN_WORDS = SHOWN - {"print", "Finding"}  # even a single word
NAMES = {"getattr", "get", "replace", "encode"}  # functions whose literal arguments are names
# Literals that are not translated: (file, literal) and why.
ALLOWED = {
    ("cli/doctor.py", "Hugging Face"): "a name",
    ("cli/doctor.py", "{}, Python {}"): "versions",
    ("cli/doctor.py", "float32, float16"): "names of types",
}
HOSTILE = "{0} {path} {{x}} }{ %s %(path)s\n\t\r\x00 \udc80 \u202e"


def called(call):
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def literals(node):
    """Yield the literals in an expression that nothing translates, as texts with {} for values."""
    if isinstance(node, ast.Call) and called(node) in MARKERS:
        for keyword in node.keywords:
            yield from literals(keyword.value)
    elif isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        yield "".join(parts)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Call) and called(node) in NAMES:
        return
    elif isinstance(node, ast.Call | ast.IfExp | ast.BoolOp | ast.BinOp | ast.Starred):
        # of other calls, such as ", ".join(names), only the arguments
        below = [*node.args, *node.keywords] if isinstance(node, ast.Call) else None
        for child in ast.iter_child_nodes(node) if below is None else below:
            yield from literals(child.value if isinstance(child, ast.keyword) else child)


def is_prose(text, *, even_a_word=False):
    """Whether a person reads words in a text; {} stands for values, and names have no spaces."""
    words = text.replace("cn-clip:", "").strip()
    if even_a_word and re.fullmatch("[a-z]{3,}", words):
        return True
    return " " in words and re.search("[a-z]{2,}", words) is not None


def shown_arguments(call):
    """Return the arguments of a call that a person reads."""
    return call.args[2:] if called(call) == "Finding" else call.args


def unmarked(tree):
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        if name in SHOWN or name in ERRORS:
            for argument in shown_arguments(node):
                for text in literals(argument):
                    if is_prose(text, even_a_word=name in SHOWN_WORDS):
                        yield node.lineno, text


@pytest.mark.parametrize("file", TREES)
def test_what_a_person_reads_is_marked(file):
    found = [(line, text) for line, text in unmarked(TREES[file]) if (file, text) not in ALLOWED]
    assert not found, f"write _(...) around these, see CONTRIBUTING.md: {found}"


def test_the_walk_finds_unmarked_texts():
    code = """
raise DataError(f"{path} is bad: {reason}")
raise DataError(_("{path} {more}", path=path, more="not there" if x else ""))
raise UsageError("this" + " is wrong" if x else _("right"))
warnings.warn("this is old", stacklevel=2)
table.add_column("first")
print(f"cn-clip: {message}", file=sys.stderr)
print(_("marked text"), ", ".join(names))
"""
    assert [line for line, _text in unmarked(ast.parse(code))] == [2, 3, 4, 5, 6]


def placeholders(message):
    """Return the names of the values of a message; formats may have values too."""
    names = set()
    for _text, field, form, _conversion in string.Formatter().parse(message):
        if field is not None:
            names |= {field} | (placeholders(form) if form else set())
    return names


@pytest.mark.parametrize("file", TREES)
def test_messages_are_literals_with_exactly_their_values(file):
    if file == "translation.py":
        return
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Call) and called(node) in ("_", "_n", "N_"):
            count = 2 if called(node) == "_n" else 1
            messages = [ast.literal_eval(argument) for argument in node.args[:count]]
            assert all(isinstance(message, str) and message for message in messages)
            values = {keyword.arg for keyword in node.keywords}
            if values or count == 2:
                names = set.union(*map(placeholders, messages))
                assert names == values | ({"count"} if count == 2 else set()), messages
                assert all(name.isidentifier() for name in names), messages
            assert None not in values


@pytest.mark.parametrize(("file", "text"), TEMPLATES)
def test_a_template_has_no_text_outside_of_its_expressions(file, text):
    text = re.sub(r"(?s)\{% block style %\}.*?\{% endblock %\}", "", text)
    text = re.sub(r"(?s)\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\}|<style>.*?</style>|<[^>]*>", "", text)
    assert not text.split()


@pytest.mark.parametrize("file", TREES)
def test_no_message_is_inside_an_f_string_where_extractors_do_not_look(file):
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.JoinedStr):
            inner = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            assert not {"_", "_n", "N_"} & {called(call) for call in inner}, ast.unparse(node)


def write_catalogue(root, entries, *, language="xx", plural_forms="nplurals=2; plural=(n != 1);"):
    """Write an .mo file, as `msgfmt` does; plural messages are ``singular NUL plural``."""
    header = f"Content-Type: text/plain; charset=UTF-8\nPlural-Forms: {plural_forms}\n"
    pairs = [
        (key.encode(), value.encode()) for key, value in sorted({"": header, **entries}.items())
    ]
    tables, content, start = [b"", b""], b"", 28 + 16 * len(pairs)
    for side in (0, 1):
        for pair in pairs:
            tables[side] += struct.pack("<II", len(pair[side]), start + len(content))
            content += pair[side] + b"\0"
    size = 8 * len(pairs)
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + size, 0, 28 + 2 * size)
    folder = root / language / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "cn_clip.mo").write_bytes(head + b"".join(tables) + content)


def all_messages():
    """Every marked message, mapped to itself in brackets."""
    entries = {}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and called(node) in ("_", "N_"):
                message = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                if isinstance(message, str):
                    entries[message] = f"⟦{message}⟧"
            elif isinstance(node, ast.Call) and called(node) == "_n":
                one, many = (argument.value for argument in node.args[:2])
                entries[f"{one}\0{many}"] = f"⟦{one}⟧\0⟦{many}⟧"
    for _file, text in TEMPLATES:
        calls = extract_from_ast(Environment().parse(text), ["_"])
        # a message with values is a tuple, with None for each value
        messages = (m if isinstance(m, str) else m[0] for _line, _name, m in calls if m)
        entries |= {message: f"⟦{message}⟧" for message in messages if message}
    return entries


@pytest.fixture
def use_catalogue(tmp_path, monkeypatch):
    """Return a function that installs a catalogue of the language xx, and makes it the user's."""

    def use(entries, language="xx"):
        write_catalogue(tmp_path / "locale", entries, language=language)
        monkeypatch.setattr(translation, "LOCALES", str(tmp_path / "locale"))
        monkeypatch.setenv("CN_CLIP_LANG", language)
        translation._own_catalogue.cache_clear()

    translation._own_catalogue.cache_clear()
    yield use
    translation._own_catalogue.cache_clear()


@pytest.fixture
def pseudo(use_catalogue):
    use_catalogue(all_messages())


def test_without_a_catalogue_messages_are_english():
    assert _("no such file: {path}", path="a b") == "no such file: a b"
    assert _n("{count:,} file", "{count:,} files", 1) == "1 file"
    assert _n("{count:,} file of {size}", "{count:,} files of {size}", 1200, size=3) == (
        "1,200 files of 3"
    )


def test_values_are_never_formatted_themselves(use_catalogue):
    for entries in ({}, {"no such file: {path}": "{path} fehlt"}):
        before, after = ("", " fehlt") if entries else ("no such file: ", "")
        if entries:
            use_catalogue(entries)
        assert _("no such file: {path}", path=HOSTILE) == before + HOSTILE + after


def test_braces_are_literal_without_values_and_doubled_with_them(use_catalogue):
    message = "use ['{}'] for 100 % of {labels}"
    assert _(message) == message
    assert _('{path}: expected {{"id": 1}}', path="x") == 'x: expected {"id": 1}'
    use_catalogue({message: "nimm ['{}'] für 100 % von {labels}"})
    assert _(message) == "nimm ['{}'] für 100 % von {labels}"


@pytest.mark.parametrize(
    "wrong",
    ["{pfad} fehlt", "{path", "{path:d}", "{} fehlt", "{0}", "{path.name}", "{path[0][1]}}"],
)
def test_a_translation_with_wrong_placeholders_is_ignored(use_catalogue, wrong):
    use_catalogue({"no such file: {path}": wrong})
    assert _("no such file: {path}", path="x") == "no such file: x"


def test_plurals_follow_the_catalogue(use_catalogue):
    use_catalogue({"{count} file\0{count} files": "{count} Datei\0{count} Dateien"})
    assert [_n("{count} file", "{count} files", n) for n in (1, 2)] == ["1 Datei", "2 Dateien"]


def test_an_empty_text_is_not_the_header_of_the_catalogue(pseudo):
    assert translate("") == ""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, []),
        ({"LANG": "zh_CN.UTF-8"}, ["zh_CN"]),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, []),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_GB.UTF-8"}, []),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "zh_CN:en:de"}, ["zh_CN"]),
        ({"LANGUAGE": "en:zh"}, []),
        ({"LANG": "", "LC_ALL": "C.UTF-8"}, []),
        ({"LANG": "de_DE@euro"}, ["de_DE"]),
        ({"LANG": "zh_CN.UTF-8", "CN_CLIP_LANG": "en"}, []),
        ({"LANG": "C", "CN_CLIP_LANG": "zh-CN"}, ["zh_CN"]),
        ({"CN_CLIP_LANG": "zh"}, ["zh"]),
    ],
)
def test_the_language_is_the_override_else_that_of_the_locale(monkeypatch, variables, expected):
    for name in ("CN_CLIP_LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert languages() == expected


def test_windows_tells_its_language_itself(monkeypatch):
    for name in ("CN_CLIP_LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    kernel = SimpleNamespace(GetUserDefaultUILanguage=lambda: 0x0804)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert languages() == ["zh_CN"]
    monkeypatch.setenv("CN_CLIP_LANG", "en")
    assert languages() == []


def test_a_reason_of_the_system_is_translated_with_its_message(use_catalogue):
    message = "{path} cannot be read: {reason}"
    use_catalogue({message: "无法读取 {path}：{reason}", "Permission denied": "权限不足"})
    assert _(message, path="x", reason="Permission denied") == "无法读取 x：权限不足"
    assert _(message, path="Permission denied", reason="") == "无法读取 Permission denied："


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("模型", "未知的模型，共 3 个"),
        ("--backend", "未知的 --backend，共 3 个"),
        ("'a'", "未知的 'a'，共 3 个"),
        ("（空）", "未知的（空），共 3 个"),
        ("", "未知的，共 3 个"),
    ],
)
def test_chinese_and_latin_have_a_space_where_a_value_joins_them(use_catalogue, value, expected):
    use_catalogue({"unknown {kind}, {count} in all": "未知的{kind}，共{count}个"})
    assert _("unknown {kind}, {count} in all", kind=value, count=3) == expected


def test_a_locale_with_a_country_uses_the_catalogue_of_its_language(use_catalogue, monkeypatch):
    use_catalogue({"a text": "文本"}, language="zh")
    monkeypatch.setenv("CN_CLIP_LANG", "zh_CN.UTF-8")
    assert _("a text") == "文本"


def test_a_hostile_list_of_languages_is_read_in_linear_time():
    for accepted in (
        "a" * 30_000 + "!",
        "zh" + "-a" * 30_000 + ";",
        "zh;q=0." + "0" * 30_000 + "!",
    ):
        assert translation._preferred(accepted) is None  # minutes, if it were quadratic


@pytest.mark.parametrize("content", [b"", b"not a catalogue", b"\xde\x12\x04\x95" + b"\xff" * 24])
def test_a_damaged_catalogue_means_english(use_catalogue, tmp_path, content):
    use_catalogue({"a text": "ein Text"})
    (tmp_path / "locale" / "xx" / "LC_MESSAGES" / "cn_clip.mo").write_bytes(content)
    assert _("a text") == "a text"


def test_threads_that_translate_first_at_the_same_time_get_the_same_language(pseudo):
    texts = []
    start = threading.Barrier(8)

    def work():
        start.wait()
        texts.append(_("interrupted"))

    threads = [threading.Thread(target=work) for _number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["⟦interrupted⟧"] * 8


def test_the_catalogue_is_not_read_before_the_first_message():
    code = (
        "import sys, cn_clip.translation as t\n"
        "assert 'gettext' not in sys.modules and not t._own_catalogue.cache_info().currsize"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"CN_CLIP_LANG": "xx"}
    )


def test_errors_come_out_translated(pseudo, tmp_path):
    error = UnknownNameError(_("model"), "ViT-B-61", ["ViT-B-16"])
    assert str(error) == (
        "⟦unknown ⟦model⟧ 'ViT-B-61'; ⟦did you mean ViT-B-16? ⟧available: ViT-B-16⟧"
    )
    path = tmp_path / "{x} %s.json"
    with pytest.raises(UsageError) as caught:
        read_calibration(path)
    text = str(caught.value)
    assert text.startswith(f"⟦{path} cannot be read: ") and "⟦fit one with: cn-clip" in text


def test_usage_errors_of_the_command_line_come_out_translated(pseudo, capsys):
    assert cli.run(["classify", "x.jpg"]) == 2
    error = capsys.readouterr().err
    assert error == "cn-clip: ⟦give either --labels 猫,狗 or --labels-file FILE⟧\n"


def test_tables_come_out_translated(pseudo, capsys):
    assert cli.run(["models"]) == 0
    out = capsys.readouterr().out
    assert "⟦image tower⟧" in out and "⟦in the package⟧" in out


def test_a_data_check_comes_out_translated_but_not_its_json(pseudo, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("image,text\nnone.jpg,猫\n", encoding="utf-8")
    report = tmp_path / "report.html"
    source = f"csv:{tmp_path / 'a.csv'}"
    assert cli.run(["data", "check", source, "--workers", "0", "--report", str(report)]) == 1
    out = capsys.readouterr().out
    assert "⟦images missing or damaged⟧" in out and "⟦captions in ⟦Chinese⟧⟧" in out
    html = report.read_text(encoding="utf-8")
    assert "<h2>⟦Random pairs⟧</h2>" in html and "⟦images missing or damaged⟧" in html
    assert cli.run(["data", "check", source, "--workers", "0", "--json"]) == 1
    assert '"Chinese": 1' in capsys.readouterr().out


def help_messages():
    code = "import help_messages as h; print(*map(repr, h.help_messages()), sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=DOCS, capture_output=True, text=True, check=True
    )
    return [ast.literal_eval(line) for line in run.stdout.splitlines()]


def test_every_text_of_the_help_comes_out_translated(use_catalogue, capsys):
    messages = help_messages()
    assert "Labels to print per image." in messages and "Parameters" in messages
    use_catalogue({message: f"⟦{number}⟧" for number, message in enumerate(messages)})
    for command in ([], ["classify"], ["data"], ["data", "pack"], ["eval", "retrieval"]):
        assert cli.run([*command, "--help"]) == 0
        out = capsys.readouterr().out
        shown = re.findall(r"⟦\d+⟧", out)
        assert len(shown) >= 4
        # names, defaults and choices apart, no sentence is left
        assert not re.search(r"[a-z]+ [a-z]+ [a-z]+", out.replace("cn-clip", "")), out
