"""The words written for this recipe (data/*.tsv), and the texts that are made of them.

What a word looks like is written down in classes of ImageNet: a giraffe is none of them, but a
classifier that has seen a thousand things would call its picture a leopard or a gazelle. So every
thing in `imagenet.tsv` and `things.tsv` has a distribution over the classes, its look.
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
BELOW = 0.5  # how much a thing outside ImageNet says of its broader words, beside a class

# Parts of speech of jieba's list that can name or describe something.
WORD_TAGS = frozenset(("n", "nz", "ng", "v", "vn", "a", "an", "i", "l", "ns", "s", "b", "z", "nrt"))
NOUN_TAGS = ("n", "nz")
LONGEST_WORD = 8


@dataclass(frozen=True)
class Words:
    """What can be said of a thing: names best first, broader words near to far, captions."""

    names: tuple[str, ...]
    broader: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All of them."""
        return self.names + self.broader + self.captions


@dataclass(frozen=True)
class Thing:
    """Words, and how their pictures look: (1000,) shares of the ImageNet classes, or none."""

    words: Words
    look: np.ndarray | None


def rows(name: str) -> list[list[str]]:
    """The lines of a table in data/, split at tabs; lines that start with # are left out."""
    lines = (DATA / name).read_text("utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def words_of(names: str, broader: str, captions: str) -> Words:
    return Words(*(tuple(filter(None, each.split(","))) for each in (names, broader, captions)))


def classes() -> list[Thing]:
    """The 1,000 classes of ImageNet in their order."""
    looks = np.eye(CLASSES, dtype=np.float32)
    return [Thing(words_of(*row), looks[number]) for number, row in enumerate(rows("imagenet.tsv"))]


def things() -> list[Thing]:
    """Everyday things that are no class of ImageNet."""
    number = {row[0].split(",")[0]: n for n, row in enumerate(rows("imagenet.tsv"))}
    found = []
    for names, broader, captions, looks in rows("things.tsv"):
        look = np.zeros(CLASSES, np.float32)
        for entry in filter(None, looks.split(",")):
            name, _, weight = entry.partition(":")
            look[number[name]] += float(weight)
        known = look / look.sum() if look.any() else None
        found.append(Thing(words_of(names, broader, captions), known))
    return found


def labels(name: str) -> dict[str, Words]:
    """The words of pictures, by their key: `clip_art.tsv` or `games.tsv`."""
    return {key: words_of(*rest) for key, *rest in rows(name)}


def looks(known: Iterable[Thing]) -> tuple[list[str], np.ndarray]:
    """Every text with a look, and the looks (N, 1000): names and captions have their thing's, a
    broader word the mean of all below it, in which a class counts twice."""
    own: dict[str, list[np.ndarray]] = defaultdict(list)
    below: dict[str, list[tuple[float, np.ndarray]]] = defaultdict(list)
    for thing in known:
        if thing.look is None:
            continue
        for text in thing.words.names + thing.words.captions:
            own[text].append(thing.look)
        weight = 1.0 if thing.look.max() == 1 else BELOW
        for text in thing.words.broader:
            below[text].append((weight, thing.look))
    table = {text: np.mean(each, 0) for text, each in own.items()}
    for text, each in below.items():
        if text not in table:
            table[text] = np.average([look for _, look in each], 0, [w for w, _ in each])
    return list(table), np.stack([*table.values()]).astype(np.float32)


def jieba_words(count: int) -> tuple[list[str], list[str]]:
    """The `count` most frequent words (nouns count threefold), and the short nouns among them."""
    path = Path(importlib.util.find_spec("jieba").origin).parent / "dict.txt"
    found = []
    for line in path.read_text("utf-8").splitlines():
        word, frequency, tag = line.split(" ")
        if tag in WORD_TAGS and len(word) <= LONGEST_WORD:
            found.append((int(frequency) * (3 if tag in NOUN_TAGS else 1), word, tag))
    found.sort(key=lambda row: (-row[0], row[1]))
    found = found[:count]
    return (
        [word for _, word, _ in found],
        [word for _, word, tag in found if tag in NOUN_TAGS and len(word) <= 4],
    )


def vocabulary(path: Path) -> list[str]:
    """The tokens of the BERT vocabulary as texts, without its special and empty ones."""
    tokens = (token.strip() for token in path.read_text("utf-8").rstrip("\n").split("\n"))
    plain = (token.removeprefix("##") for token in tokens if not token.startswith("["))
    return [token for token in dict.fromkeys(plain) if token]


def templated(words: Sequence[str], each: int, seed: int) -> dict[str, str]:
    """Every word in `each` sentence patterns, drawn anew for each word: the text to its word."""
    templates = (DATA / "templates.txt").read_text("utf-8").splitlines()
    rng = random.Random(seed)
    return {t.format(word): word for word in words for t in rng.sample(templates, each)}


def captions(nouns: Sequence[str], count: int, seed: int) -> list[str]:
    """Short captions drawn from hand-written lists; one in ten is a long one of several parts."""
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

    drawn = list(lists["scene"])
    for i in range(count):
        parts = [draw() for _ in range(rng.randint(2, 5) if i % 10 == 0 else 1)]
        drawn.append("，".join(parts) + rng.choice(("", "。")))
    return drawn
