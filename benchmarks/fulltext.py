"""Chinese text in SQLite FTS5: trigrams, jieba's words, single characters, and our bigrams.

    python benchmarks/fulltext.py --stamps DIR --words jieba/dict.txt   # pip install rjieba jieba
    python benchmarks/fulltext.py --stamps DIR --recognised texts.jsonl # of text_in_images.py

Recall and false hits: the queries are substrings of 1, 2 and 4 Chinese characters of the captions
of the 468 things (see things468.py), at most 1,000 of each length, and then the words of jieba in
them; a caption is to be found if it contains the query, else it is a false hit. "Inside words" is
the share of hits in which the query begins or ends inside a word of jieba, as 京都 in 东京都: a
person may not mean them. With --recognised, the queries are drawn from the true texts, and what was
recognised is searched. "Traditional" rewrites the captions by OpenCC (s2t) and leaves the queries.

Size and speed: --rows texts of 4 to 12 words, drawn from jieba's dictionary by frequency. Queries
are words of 1, 2 and 4 characters from the same distribution, 50 of each, for all row numbers and
for the 100 best by bm25; and two words of 4 characters, of which any part counts: two neighbouring
characters, a trigram, a word of jieba. Times are of the CPU, in one thread. Every method has a file
of its own; its index size is without the copy of the text that FTS5 keeps.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from things468 import fetch, things

from cn_clip.normalize import opencc_converter
from cn_clip.processes import cpu_info
from cn_clip.search.fulltext import TOKENIZER, fold, match_expression, tokens

LENGTHS = (1, 2, 4)
HAN = re.compile(r"[\u4e00-\u9fff]+")
# options, tokens, expression of a query, expression of any part of a query
Method = tuple[str, Callable[[str], str], Callable[[str], str], Callable[[str], str]]


def quoted(words: list[str]) -> str:
    return " AND ".join('"' + word.replace('"', '""') + '"' for word in words) or '""'


def any_of(words: list[str]) -> str:
    return quoted(list(dict.fromkeys(words))).replace('" AND "', '" OR "')


def runs(text: str, length: int) -> list[str]:
    return [text[start : start + length] for start in range(len(text) - length + 1)]


def any_bigram(query: str) -> str:
    return match_expression(query, partial=True)


def jieba_words(text: str) -> list[str]:
    import rjieba

    return [word for word in rjieba.cut_for_search(fold(text)) if word.strip()]


def cut(text: str) -> list[str]:
    import rjieba

    return list(rjieba.cut(text))


def characters(text: str) -> list[str]:
    return re.findall(r"[\u3400-\u9fff]|\w", fold(text))


def methods(with_jieba: bool) -> dict[str, Method]:
    plain = f"tokenize = '{TOKENIZER}'"
    table: dict[str, Method] = {
        "trigram": (
            "tokenize = 'trigram'",
            fold,
            lambda q: quoted([fold(q)]),
            lambda q: any_of(runs(fold(q), 3)),
        ),
        "characters": (
            "tokenize = 'unicode61'",
            lambda text: " ".join(characters(text)),
            lambda q: f'"{" ".join(characters(q))}"',
            lambda q: any_of([" ".join(pair) for pair in runs("".join(characters(q)), 2)]),
        ),
        "bigrams": (plain, tokens, match_expression, any_bigram),
        "bigrams, prefix index": (f"{plain}, prefix = '1'", tokens, match_expression, any_bigram),
    }
    if with_jieba:
        table["jieba"] = (
            "tokenize = 'unicode61'",
            lambda text: " ".join(jieba_words(text)),
            lambda q: quoted(jieba_words(q)),
            lambda q: any_of(jieba_words(q)),
        )
    return table


def create(db: sqlite3.Connection, name: str, options: str) -> None:
    db.execute(f'CREATE VIRTUAL TABLE "{name}" USING fts5(text, {options})')


def substrings(texts: list[str], length: int) -> list[str]:
    """Return distinct substrings of Chinese characters, in random order."""
    every = {
        run[start : start + length]
        for text in texts
        for run in HAN.findall(text)
        for start in range(len(run) - length + 1)
    }
    return random.Random(length).sample(sorted(every), min(1000, len(every)))


def words_of(texts: list[str], length: int) -> list[str]:
    """Return the distinct words of jieba of Chinese characters."""
    every = {word for text in texts for word in cut(text)}
    return sorted(word for word in every if len(word) == length and HAN.fullmatch(word))


def inside_word(text: str, query: str) -> bool:
    """Return whether the query begins or ends inside a word of jieba wherever it stands."""
    borders = {0, *accumulate(map(len, cut(text)))}
    starts = [match.start() for match in re.finditer(f"(?={re.escape(query)})", text)]
    return all(start not in borders or start + len(query) not in borders for start in starts)


def accuracy(
    truth: list[str], stored: list[str], table: dict[str, Method], with_jieba: bool
) -> dict[str, dict[str, float]]:
    """Return the percentages of each method."""
    result: dict[str, dict[str, float]] = {}
    db = sqlite3.connect(":memory:")
    for name, (options, to_tokens, expression, _any) in table.items():
        create(db, name, options)
        db.executemany(
            f'INSERT INTO "{name}"(rowid, text) VALUES (?, ?)',
            enumerate(to_tokens(text) for text in stored),
        )
        figures = {}
        for length, by_word in [(n, w) for w in (False, True)[: 1 + with_jieba] for n in LENGTHS]:
            correct = found = hits = inside = 0
            for query in (words_of if by_word else substrings)(truth, length):
                expected = {n for n, text in enumerate(truth) if query in text}
                sql = f'SELECT rowid FROM "{name}" WHERE "{name}" MATCH ?'
                got = {row for (row,) in db.execute(sql, (expression(query),))}
                correct, hits = correct + len(expected), hits + len(got)
                found += len(expected & got)
                if by_word:
                    inside += sum(inside_word(truth[n], query) for n in expected & got)
            kind = f"{length}-character {'words' if by_word else 'substrings'}"
            figures[f"{kind}: recall"] = 100 * found / max(1, correct)
            figures[f"{kind}: false hits"] = 100 * (hits - found) / max(1, hits)
            if by_word:
                figures[f"{kind}: inside words"] = 100 * inside / max(1, found)
        result[name] = figures
    return result


def synthetic(words: Path, rows: int) -> tuple[list[str], dict[int, list[str]]]:
    """Return texts drawn from a dictionary by frequency, and 50 queries of each length."""
    rng = random.Random(0)
    lines = [line.split(" ") for line in words.read_text("utf-8").splitlines()]
    names = [line[0] for line in lines]
    weights = list(accumulate(int(line[1]) for line in lines))
    counts = rng.choices(range(4, 13), k=rows)
    drawn = iter(rng.choices(names, cum_weights=weights, k=sum(counts)))
    texts = ["".join(next(drawn) for _ in range(count)) for count in counts]
    some = rng.choices(names, cum_weights=weights, k=100_000)
    queries = {
        length: [w for w in some if len(w) == length and HAN.fullmatch(w)][:50]
        for length in LENGTHS
    }
    return texts, queries


def speed(
    texts: list[str], queries: dict[int, list[str]], table: dict[str, Method], folder: Path
) -> dict[str, dict[str, float]]:
    """Return per method: seconds to insert, sizes in MB, milliseconds of queries."""
    result = {}
    for name, (options, to_tokens, expression, any_part) in table.items():
        db = sqlite3.connect(folder / f"{len(result)}.db")
        db.execute("PRAGMA journal_mode = WAL")
        create(db, name, options)
        start = time.process_time()
        rows = [(to_tokens(text),) for text in texts]
        made = time.process_time() - start
        with db:
            db.executemany(f'INSERT INTO "{name}"(text) VALUES (?)', rows)
        figures = {"tokens, s": made, "insert, s": time.process_time() - start - made}
        (size,) = db.execute(f'SELECT sum(length(block)) FROM "{name}_data"').fetchone()
        stored = f'SELECT sum(length(CAST(c0 AS BLOB))) FROM "{name}_content"'
        (copy,) = db.execute(stored).fetchone()
        figures |= {"index, MB": size / 1e6, "copy, MB": copy / 1e6}
        for length in LENGTHS:
            sql = f'SELECT rowid FROM "{name}" WHERE "{name}" MATCH ?'
            for label, order in (("all", ""), ("best 100", " ORDER BY rank LIMIT 100")):
                times = []
                for query in queries[length]:
                    begun = time.process_time()
                    db.execute(sql + order, (expression(query),)).fetchall()
                    times.append(1000 * (time.process_time() - begun))
                kind = f"{length} characters, {label}, ms"
                figures[f"{kind}: median"] = statistics.median(times)
                figures[f"{kind}: max"] = max(times)
        pairs = [a + b for a, b in zip(queries[4], queries[4][1:], strict=False)]
        times = []
        for query in pairs:
            begun = time.process_time()
            sql = f'SELECT rowid FROM "{name}" WHERE "{name}" MATCH ? ORDER BY rank LIMIT 200'
            db.execute(sql, (any_part(query),)).fetchall()
            times.append(1000 * (time.process_time() - begun))
        figures["any part of 8 characters, best 200, ms: median"] = statistics.median(times)
        figures["any part of 8 characters, best 200, ms: max"] = max(times)
        result[name] = figures
        db.close()
    return result


def show(title: str, table: dict[str, dict[str, float]]) -> None:
    print(f"\n{title:<46}" + "".join(f"{name:>24}" for name in table))
    for row in next(iter(table.values())):
        print(f"{row:<46}" + "".join(f"{figures[row]:>24.4g}" for figures in table.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; default: download them")
    parser.add_argument("--recognised", type=Path, help='lines of {"text", "recognised"}')
    parser.add_argument("--words", type=Path, help="dict.txt of jieba: measure size and speed")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    try:
        import rjieba  # noqa: F401
    except ImportError:
        print("rjieba is not installed: jieba's words are left out", file=sys.stderr)
        with_jieba = False
    else:
        with_jieba = True
    table = methods(with_jieba)
    cpu = next(iter(cpu_info("model name")), platform.machine()).split(":")[-1].strip()
    print(f"{cpu}, SQLite {sqlite3.sqlite_version}")
    with tempfile.TemporaryDirectory() as scratch:
        stamps = options.stamps or fetch(Path(scratch))
        captions = list(dict.fromkeys(caption for _, caption in things(stamps)))
        results: dict[str, dict[str, dict[str, float]]] = {}
        sets = {
            f"{len(captions)} captions, %": (captions, captions),
            "in traditional, %": (captions, [opencc_converter("s2t")(c) for c in captions]),
        }
        if options.recognised:
            lines = options.recognised.read_text("utf-8").splitlines()
            pairs = [json.loads(line) for line in lines]
            truth = ["".join(pair["text"].split()) for pair in pairs]
            sets[f"{len(pairs)} recognised, %"] = truth, [pair["recognised"] for pair in pairs]
        for title, (truth, stored) in sets.items():
            results[title] = accuracy(truth, stored, table, with_jieba)
            show(title, results[title])
        if options.words:
            texts, queries = synthetic(options.words, options.rows)
            mean = statistics.mean(map(len, texts))
            title = f"{len(texts):,} texts, mean length {mean:.0f}"
            results[title] = speed(texts, queries, table, Path(scratch))
            show(title, results[title])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
