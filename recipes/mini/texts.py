"""The texts that the text tower learns: words, names, templates, short captions."""

import random
from collections.abc import Sequence
from pathlib import Path

# Parts of speech of jieba's list that can name or describe something.
WORD_TAGS = frozenset(("n", "nz", "ng", "v", "vn", "a", "an", "i", "l", "ns", "s", "b", "z", "nrt"))
NOUN_TAGS = ("n", "nz")
LONGEST_WORD = 8


def class_names(path: Path) -> list[tuple[list[str], list[str]]]:
    """For each ImageNet class in order: its Chinese names, and broader words."""
    rows = [line.split("|") for line in path.read_text("utf-8").splitlines()]
    return [(names.split(","), broader.split(",")) for names, broader in rows]


def jieba_words(path: Path, count: int) -> tuple[list[str], list[str]]:
    """The `count` most frequent words (nouns count threefold), and the short nouns among them."""
    rows = []
    for line in path.read_text("utf-8").splitlines():
        word, frequency, tag = line.split(" ")
        if tag in WORD_TAGS and len(word) <= LONGEST_WORD:
            rows.append((int(frequency) * (3 if tag in NOUN_TAGS else 1), word, tag))
    rows.sort(key=lambda row: (-row[0], row[1]))
    rows = rows[:count]
    return (
        [word for _, word, _ in rows],
        [word for _, word, tag in rows if tag in NOUN_TAGS and len(word) <= 4],
    )


def vocabulary(path: Path) -> list[str]:
    """The tokens of the BERT vocabulary as texts, without its special and empty ones."""
    tokens = (token.strip() for token in path.read_text("utf-8").rstrip("\n").split("\n"))
    plain = (token.removeprefix("##") for token in tokens if not token.startswith("["))
    return [token for token in dict.fromkeys(plain) if token]


def templated(words: Sequence[str], templates: Sequence[str], each: int, seed: int) -> list[str]:
    """Every word in `each` templates, drawn anew for each word."""
    rng = random.Random(seed)
    return [t.format(word) for word in words for t in rng.sample(templates, each)]


def captions(path: Path, things: Sequence[str], count: int, seed: int) -> list[str]:
    """Short captions drawn from hand-written lists; one in ten is a long one of several parts."""
    lists: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("["):
            current = lists.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            current.append(line)
    rng = random.Random(seed)

    def draw() -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(lists["who"]) + rng.choice(lists["where"]) + rng.choice(lists["does"])
        if kind < 0.5:
            return rng.choice(lists["who"]) + rng.choice(lists["does"])
        if kind < 0.85:
            return rng.choice(lists["look"]) + rng.choice(things)
        return rng.choice(things) + rng.choice(("和", "与", "，还有")) + rng.choice(things)

    drawn = list(lists["scene"])
    for i in range(count):
        parts = [draw() for _ in range(rng.randint(2, 5) if i % 10 == 0 else 1)]
        drawn.append("，".join(parts) + rng.choice(("", "。")))
    return drawn
