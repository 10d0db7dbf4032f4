"""The words written for this recipe (data/*.tsv), and the texts made of them.

A thing in `imagenet.tsv` or `things.tsv` has a look: a distribution over the ImageNet classes. For
example, a giraffe is not a class, but a classifier would predict leopard or gazelle for its image.
"""

import importlib.util
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent / "data"
CLASSES = 1000
BROADER_WEIGHT = 0.5  # of a thing outside ImageNet in the look of a broader word; a class has 1

# Part-of-speech tags of jieba for words that can name or describe something.
WORD_TAGS = frozenset(("n", "nz", "ng", "v", "vn", "a", "an", "i", "l", "ns", "s", "b", "z", "nrt"))
NOUN_TAGS = ("n", "nz")
MAX_WORD_LENGTH = 8


@dataclass(frozen=True)
class Words:
    """Texts of a thing: names, the best first; broader words, the nearest first; captions."""

    names: tuple[str, ...]
    broader: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts."""
        return self.names + self.broader + self.captions


@dataclass(frozen=True)
class Thing:
    """Words and their look: probabilities (1000,) of the ImageNet classes, or None."""

    words: Words
    look: np.ndarray | None


def rows(name: str) -> list[list[str]]:
    """Return the rows of a table in data/, split at tabs; lines that start with # are comments."""
    lines = (DATA / name).read_text("utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def parse_words(names: str, broader: str, captions: str) -> Words:
    return Words(*(tuple(filter(None, field.split(","))) for field in (names, broader, captions)))


def classes() -> list[Thing]:
    """Return the 1,000 classes of ImageNet in order."""
    looks = np.eye(CLASSES, dtype=np.float32)
    return [
        Thing(parse_words(*row), looks[number]) for number, row in enumerate(rows("imagenet.tsv"))
    ]


def things() -> list[Thing]:
    """Return everyday things that are not classes of ImageNet."""
    number = {row[0].split(",")[0]: n for n, row in enumerate(rows("imagenet.tsv"))}
    result = []
    for names, broader, captions, looks in rows("things.tsv"):
        look = np.zeros(CLASSES, np.float32)
        for entry in filter(None, looks.split(",")):
            name, _, weight = entry.partition(":")
            look[number[name]] += float(weight)
        known = look / look.sum() if look.any() else None
        result.append(Thing(parse_words(names, broader, captions), known))
    return result


def labels(name: str) -> dict[str, Words]:
    """Return the words of images by key, from `clip_art.tsv` or `games.tsv`."""
    return {key: parse_words(*rest) for key, *rest in rows(name)}


def looks(known: Iterable[Thing]) -> tuple[list[str], np.ndarray]:
    """Return texts and their looks (N, 1000): names and captions have the look of their thing, a
    broader word the weighted mean of all things below it."""
    own: dict[str, list[np.ndarray]] = defaultdict(list)
    below: dict[str, list[tuple[float, np.ndarray]]] = defaultdict(list)
    for thing in known:
        if thing.look is None:
            continue
        for text in thing.words.names + thing.words.captions:
            own[text].append(thing.look)
        weight = 1.0 if thing.look.max() == 1 else BROADER_WEIGHT
        for text in thing.words.broader:
            below[text].append((weight, thing.look))
    table = {text: np.mean(values, 0) for text, values in own.items()}
    for text, values in below.items():
        if text not in table:
            table[text] = np.average([look for _, look in values], 0, [w for w, _ in values])
    return list(table), np.stack([*table.values()]).astype(np.float32)


def jieba_words(count: int) -> tuple[list[str], list[str]]:
    """Return the `count` most frequent words (nouns weigh threefold), and their short nouns."""
    path = Path(importlib.util.find_spec("jieba").origin).parent / "dict.txt"
    entries = []
    for line in path.read_text("utf-8").splitlines():
        word, frequency, tag = line.split(" ")
        if tag in WORD_TAGS and len(word) <= MAX_WORD_LENGTH:
            entries.append((int(frequency) * (3 if tag in NOUN_TAGS else 1), word, tag))
    entries.sort(key=lambda row: (-row[0], row[1]))
    entries = entries[:count]
    return (
        [word for _, word, _ in entries],
        [word for _, word, tag in entries if tag in NOUN_TAGS and len(word) <= 4],
    )


def vocabulary(path: Path) -> list[str]:
    """Return the tokens of the BERT vocabulary as texts, without special and empty tokens."""
    tokens = (token.strip() for token in path.read_text("utf-8").rstrip("\n").split("\n"))
    plain = (token.removeprefix("##") for token in tokens if not token.startswith("["))
    return [token for token in dict.fromkeys(plain) if token]


def fill_templates(words: Sequence[str], count: int, seed: int) -> dict[str, str]:
    """Fill every word into `count` random templates; return the word by text."""
    templates = (DATA / "templates.txt").read_text("utf-8").splitlines()
    rng = random.Random(seed)
    return {t.format(word): word for word in words for t in rng.sample(templates, count)}


def captions(nouns: Sequence[str], count: int, seed: int) -> list[str]:
    """Return random captions from hand-written lists; one in ten is a long one of several parts."""
    lists: dict[str, list[str]] = {}
    for line in (DATA / "captions.txt").read_text("utf-8").splitlines():
        if line.startswith("["):
            current = lists.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            current.append(line)
    forms = lists.pop("form")
    lists["thing"] = [*nouns]
    rng = random.Random(seed)

    def draw() -> str:
        form = rng.choice(forms).split()
        return "".join(rng.choice(lists[part]) if part in lists else part for part in form)

    sentences = list(lists["scene"])
    for i in range(count):
        parts = [draw() for _ in range(rng.randint(2, 5) if i % 10 == 0 else 1)]
        sentences.append("，".join(parts) + rng.choice(("", "。")))
    return sentences
