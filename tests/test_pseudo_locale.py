"""In a language that puts marks around every message, nothing that a person reads is without."""

import io
import re
from html import unescape

import generate_catalogue as generate
import numpy as np
import pytest
from conftest import TINY, make_model
from generate_cli import commands
from PIL import Image
from rich.console import Console

from cn_clip import cli, translation, weights
from cn_clip.cli.official import parser_of
from cn_clip.errors import UsageError
from cn_clip.eval.protocols import protocols

MARKED = re.compile(r"⟦[^⟦⟧]*⟧")
COMMANDS = [tuple(words) for words in commands(cli.app)]


@pytest.fixture(scope="module")
def pseudo_mo():
    """Return a compiled catalogue that maps every message to itself in brackets."""
    catalogue = generate.template()
    for message in catalogue:
        if isinstance(message.id, tuple):
            message.string = tuple(f"⟦{text}⟧" for text in message.id)
        elif message.id:
            message.string = f"⟦{message.id}⟧"
    return generate.mo_bytes(catalogue)


@pytest.fixture
def pseudo(pseudo_mo, tmp_path, monkeypatch):
    folder = tmp_path / "locale" / "xx" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "cn_clip.mo").write_bytes(pseudo_mo)
    monkeypatch.setattr(translation, "LOCALES", str(tmp_path / "locale"))
    monkeypatch.setenv("CN_CLIP_LANG", "xx")
    monkeypatch.setenv("COLUMNS", "4000")  # lines do not break
    translation._own_catalogue.cache_clear()
    yield
    translation._own_catalogue.cache_clear()


def outside(text):
    """Return the parts of a text that are in no message."""
    while MARKED.search(text):
        text = MARKED.sub(" ", text)
    return text


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "cn-clip")
def test_every_text_of_the_help_is_translated(pseudo, words):
    cli.load_commands()
    stream = io.StringIO()
    cli.app.help_print(list(words), console=Console(file=stream, width=4000, color_system=None))
    text = stream.getvalue()
    assert "⟦" in text
    names = {"cn-clip", "on", *words, *(name for command in COMMANDS for name in command)}
    left = outside(text).translate(str.maketrans("", "", "│╭╮╰╯─*(),[]⟦⟧")).split()
    # options, and names of values such as STR...
    unknown = [
        word for word in left if word not in names and not re.fullmatch(r"-.*|[A-Z_.]+", word)
    ]
    assert not unknown, text


WRONG = """
nonsense
--nonsense
classify
classify a.jpg
classify a.jpg --labels 猫
classify a.jpg --labels
classify missing.jpg --labels 猫,狗
classify a.jpg --lables 猫,狗
classify a.jpg --labels 猫,狗 --top 0
classify a.jpg --labels 猫,狗 --top many
classify a.jpg --labels 猫,狗 --backend cuda
classify a.jpg --labels 猫,狗 --device warp
classify a.jpg --labels 猫,狗 --precision int3
classify a.jpg --labels 猫,狗 --model ViT-B-61
classify a.jpg --labels-file missing.txt
classify a.jpg --labels 猫,狗 --calibration missing.json
classify a.jpg --labels 猫,狗 --template 没有
classify a.jpg --labels 猫,狗 --download-root missing
embed
embed sounds
embed images
embed images missing
embed images . --out
embed images a.txt --out x.pdf
embed texts a.jpg --out x.npz
embed texts empty.txt --out x.npz
index missing
index a.txt
search 猫
search
library verify
library remove nothing
library export --to npz --out x.pdf
convert missing out
convert a.txt out --to official
convert a.txt out --to gguf
export --to onnx --precision int3
data pack a.jpg
data pack missing.csv --out x
data pack bad.csv --out x --workers 0
data pack csv: --out x
data pack nonsense:x --out x
data check nonsense
data check folder:missing
data check tar:a.tar --workers -1
data decontaminate bad.csv --against missing.csv --out x.jsonl
train
train --recipe nonsense
train --recipe a.txt
train --recipe mini --nonsense 1
train --recipe mini --epochs many
train --recipe finetune-small --train-data nonsense:x --output.folder run
eval retrieval
eval retrieval --data missing.csv
eval retrieval --images missing.npz --texts missing.npz
eval zeroshot
eval zeroshot --data missing
eval protocol nonsense
eval predictions missing.jsonl --truth missing.jsonl
eval calibrate --data missing.csv --out c.json
eval robustness --data missing.csv
eval diagnose --data missing.csv --report x.pdf
bench --rounds 0
bench --model nonsense/nonsense/nonsense
serve --port many
serve --keys missing
serve --host 0.0.0.0
serve --no-auth --keys a.txt
models --download-root a.txt extra
""".strip().splitlines()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with a few files, without a network."""
    for name, text in {
        "a.jpg": "no image",
        "a.txt": "猫",
        "a.tar": "no archive",
        "bad.csv": "image,text\nnone.jpg,猫\n",
        "empty.txt": "",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for variable in ("CN_CLIP_LIBRARIES", "CN_CLIP_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", WRONG)
def test_every_error_is_translated(pseudo, folder, capsys, line):
    assert cli.run(line.split()) in (1, 2)
    error = capsys.readouterr().err
    for shown in error.splitlines():
        assert not re.search("[A-Za-z]", outside(shown).replace("cn-clip:", "")), shown


OUTPUT = """
models
data check csv:pairs.csv --workers 0 --report check.html
data decontaminate csv:pairs.csv --against pairs.csv --workers 0 --out x.jsonl --report x.html
data pack csv:pairs.csv --workers 0 --out shards
embed images csv:pairs.csv --model tiny.pt --out images.npz
classify 0.png --model tiny.pt --labels 猫,狗
eval retrieval --model tiny.pt --data csv:pairs.csv
eval robustness --model tiny.pt --data csv:pairs.csv
eval diagnose --model tiny.pt --data csv:pairs.csv --compare tiny.pt --report diagnosis.html
eval zeroshot --model tiny.pt --data kinds
eval protocol --list
index csv:pairs.csv --model tiny.pt
search 猫 --out sheet.html
library info
library list
library verify
library duplicates
train --recipe finetune-small --train-data pairs.csv --val-data pairs.csv --show cost
""".strip().splitlines()
# Names and formats of output, which are the same in every language.
NAMES = {"mini", "tiny-vit", "vit", "default", "wal", "delete", "finetune", "tiny", "cat", "px"}
NAMES |= {"torch", "cn-clip", "shards", "kinds", "jpeg", *protocols()}


def random_image(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain_words(text):
    """Return the words outside of all messages that are no names, paths, ids or formats."""
    words = re.findall(r"(?<![\w./:#-])[A-Za-z][a-z-]{2,}(?![\w./:#-])", outside(text))
    return sorted(set(words) - NAMES)


def shown_text(html):
    """Return what a page shows, with what is read out instead of images."""
    html = re.sub(r"(?s)<style.*?</style>|<script.*?</script>", "", html)
    attributes = re.findall(r' (?:alt|title|aria-label)="([^"]*)"', html)
    return unescape("\n".join([re.sub("<[^>]*>", "\n", html), *attributes]))


def test_every_text_of_the_output_and_of_the_pages_is_translated(pseudo, folder, capsys):
    weights.save_official(make_model(TINY["vit"]), folder / "tiny.pt")
    rows = ["image,text"]
    for n, name in enumerate(["猫", "一只狗", "红色的车", "海边的日落", "cat", "花"]):
        random_image(n).save(folder / f"{n}.png")
        rows.append(f"{n}.png,{name}")
    (folder / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    for n in (0, 1):
        (folder / "kinds" / "test" / str(n)).mkdir(parents=True)
        random_image(n).save(folder / "kinds" / "test" / str(n) / "a.png")
    (folder / "kinds" / "label_cn.txt").write_text("猫\n狗\n", encoding="utf-8")
    found = {}
    for line in OUTPUT:
        assert cli.run(line.split()) in (0, 1), capsys.readouterr().err
        out = capsys.readouterr()
        found[line] = plain_words(out.out + out.err)
    pages = sorted(folder.glob("*.html"))
    assert len(pages) == 4
    for page in pages:
        found[page.name] = plain_words(shown_text(page.read_text(encoding="utf-8")))
    assert not {name: words for name, words in found.items() if words}


def test_the_arguments_of_the_official_scripts_are_explained_in_the_language_of_the_user(pseudo):
    parser = parser_of("script.py", "cn-clip train")
    parser.add_argument("--size", type=int, required=True)
    text = outside(parser.format_help())
    assert set(text.split()) == {"[-h]", "--size", "SIZE", "-h,", "--help", ":", "script.py"}
    for arguments in (["--nonsense"], [], ["--size"], ["--size", "x"], ["--size", "1", "more"]):
        with pytest.raises(UsageError) as error:
            parser.parse_args(arguments)
        assert not outside(str(error.value)).strip(), arguments
