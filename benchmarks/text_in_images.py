"""Search by the text in images: signs, screenshots, packaging and memes among the 468 things.

    python benchmarks/text_in_images.py --stamps DIR --fonts DIR [DIR ...] --photos DIR [DIR ...]

Stamps: see things468.py; without --stamps they are downloaded. Fonts: folders with Chinese TrueType
or OpenType files, such as those of the Debian packages fonts-noto-cjk, fonts-wqy-microhei,
fonts-wqy-zenhei, fonts-arphic-ukai, fonts-arphic-uming and fonts-lxgw-wenkai (``apt-get download``
and ``dpkg -x`` need no root). Photos, under the texts: the package's sample, and folders such as
scikit-image's ``data``.

--count images are drawn, each with a text of its own in one font and size. The gallery is the
stamps and these images; it is searched by image embedding alone, and fused with the recognised
text (cn_clip.search.fusion). The positives of a text query are all images whose drawn text contains
it. Queries:

- "text": the drawn text, without the small print;
- "part": 2 to 4 neighbouring characters of it;
- "described": the text in a sentence, such as 写着“营业中”的牌子;
- "text-free": the captions of the stamps, whose positives are stamps.

Recall is in percent, with the 95 % bootstrap interval of its difference to image alone. "Reciprocal
rank" is the other way to fuse. The constants of the fusion were chosen with --seed 1 to 3; report
other seeds. --save writes the true and the recognised
texts for fulltext.py.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from things468 import fetch, on_white, things

import cn_clip
from cn_clip.eval.metrics.bootstrap import paired_interval
from cn_clip.processes import cpu_info
from cn_clip.sample import embedded_sample
from cn_clip.search.fulltext import TOKENIZER, fold, match_expression, tokens, units
from cn_clip.search.fusion import CANDIDATES, TextMatch, fuse, match_text
from cn_clip.search.ocr import TextReader

WORDS = Path(__file__).with_suffix(".tsv")  # kind and text
SENTENCES = ("写着“{}”的牌子", "上面有“{}”字样", "{}的图片", "带有{}几个字的照片", "显示{}的画面")
SMALL_PRINT = {
    "sign": ("电话：138{:08d}", "TEL {:08d}", "营业时间 {}:00-22:00"),
    "packaging": ("净含量：{}克", "保质期{}个月", "NET WT {}g"),
    "screenshot": ("{}:{:02d}", "已读 {}", "第{}条"),
}
SIZES = {"sign": (22, 84), "screenshot": (13, 26), "packaging": (20, 60), "meme": (26, 56)}
MIN_SIZE = 8  # pixels of a character
BUCKETS = (10, 13, 18, 26, 40)


@dataclass(frozen=True)
class Drawn:
    image: Image.Image
    kind: str
    text: str  # the main text
    small_print: tuple[str, ...]
    font: str
    size: int
    vertical: bool


def font_files(folders: list[Path]) -> list[tuple[Path, int, str]]:
    """Return file, face and name of each font that has simplified characters; no mono or light."""
    fonts = {}
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".ttf", ".ttc", ".otf")):
            faces = []
            for index in range(12):
                try:
                    faces.append((index, " ".join(ImageFont.truetype(path, 20, index).getname())))
                except OSError:
                    break
            for index, name in faces:
                simplified = "SC" in name.split() or "CN" in name.split() or len(faces) == 1
                if (simplified or "WenQuanYi" in name) and "Mono" not in name:
                    fonts.setdefault(name, (path, index, name))
    with_chinese = []
    for path, index, name in fonts.values():
        font = ImageFont.truetype(path, 20, index)
        missing = font.getmask("\U0010fffd")
        if bytes(font.getmask("锦")) not in (bytes(missing), b""):
            with_chinese.append((path, index, name))
    return with_chinese


def photo_files(folders: list[Path]) -> list[Path]:
    """Return the package's photos, and those of at least 300 x 200 in colour in the folders."""
    photos = [path for path in embedded_sample().images if path.name.startswith("photo")]
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".jpg", ".png"):
                with Image.open(path) as image:
                    if image.mode == "RGB" and image.width >= 300 and image.height >= 200:
                        photos.append(path)
    return photos


def with_tails(texts: list[str], *tails: str) -> list[str]:
    return [text + tail for text in texts for tail in tails]


def main_texts(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Return distinct pairs of kind and text, a quarter of each kind as far as there are texts."""
    words: dict[str, list[str]] = defaultdict(list)
    for line in WORDS.read_text("utf-8").splitlines():
        words[line.split("\t")[0]].append(line.split("\t")[1])
    shops = [a + b for a in words["names"] for b in words["shops"]]
    pools = {
        "sign": words["notices"] + shops,
        "screenshot": words["messages"] + with_tails(words["messages"], "谢谢", "了吗"),
        "packaging": [a + b for a in words["brands"] for b in words["goods"]],
        "meme": words["memes"] + with_tails(words["memes"], "哈哈哈", "真的", "吗"),
    }
    chosen: dict[str, str] = {}
    for kind, pool in pools.items():
        notices = rng.sample(words["notices"], 24) if kind == "sign" else []
        for text in [*notices, *rng.sample(pool, len(pool))]:
            if sum(k == kind for k in chosen.values()) < math.ceil(count / 4):
                chosen.setdefault(text, kind)
    return [(kind, text) for text, kind in chosen.items()][:count]


def colours(rng: random.Random) -> tuple[str, str]:
    """Return the colours of a ground and of the text on it."""
    return rng.choice(
        [
            ("#b3121d", "#fff4c2"),
            ("#1f5fae", "#ffffff"),
            ("#ffffff", "#202020"),
            ("#ffd400", "#1a1a1a"),
            ("#0e6b3a", "#f4f4f4"),
            ("#222222", "#ff9d1f"),
            ("#f2e6cf", "#5b2a12"),
            ("#e9e9e9", "#a01818"),
            ("#7d8a94", "#dfe4e8"),  # weak contrast
        ]
    )


def place(photo: Image.Image, board: Image.Image, rng: random.Random) -> Image.Image:
    """Return a photo with a board on it, turned a little and softened, as a camera sees it."""
    scale = max(1.0, 1.15 * board.width / photo.width, 1.3 * board.height / photo.height)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
    mask = Image.new("L", board.size, 255)
    angle = rng.uniform(-7, 7)
    turned = board.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    x = rng.randint(0, max(0, photo.width - turned.width))
    y = rng.randint(0, max(0, photo.height - turned.height))
    photo.paste(turned, (x, y), mask)
    photo = ImageEnhance.Brightness(photo).enhance(rng.uniform(0.6, 1.15))
    return photo.filter(ImageFilter.GaussianBlur(rng.choice((0, 0, 0.5, 0.9))))


def board_of(
    text: str,
    small: list[str],
    font: ImageFont.FreeTypeFont,
    little: ImageFont.FreeTypeFont,
    vertical: bool,
    rng: random.Random,
) -> Image.Image:
    ground, ink = colours(rng)
    size = round(font.size)
    if vertical:
        board = Image.new("RGB", (2 * size, round((len(text) * 1.15 + 1) * size)), ground)
        pen = ImageDraw.Draw(board)
        for n, character in enumerate(text):
            pen.text((size, (n * 1.15 + 1) * size), character, ink, font, anchor="mm")
        return board
    widths = [font.getlength(text), *(little.getlength(line) for line in small)]
    height = round(2.2 * size + len(small) * 1.5 * little.size)
    board = Image.new("RGB", (round(max(widths) + 1.2 * size), height), ground)
    pen = ImageDraw.Draw(board)
    pen.text((board.width / 2, 1.1 * size), text, ink, font, anchor="mm")
    for n, line in enumerate(small):
        y = 1.9 * size + (n + 0.5) * 1.4 * little.size
        pen.text((board.width / 2, y), line, ink, little, anchor="mm")
    return board


def screenshot(
    text: str, small: list[str], font: ImageFont.FreeTypeFont, rng: random.Random
) -> Image.Image:
    size = font.size
    dark = rng.random() < 0.3
    page = Image.new(
        "RGB", (round(22 * size), round(rng.uniform(24, 40) * size)), "#111" if dark else "#ededed"
    )
    pen = ImageDraw.Draw(page)
    y = 2 * size
    for n, line in enumerate(rng.sample([text, *small], 1 + len(small))):
        own = n % 2 == 1
        width = font.getlength(line)
        x = page.width - width - 2.5 * size if own else 2.5 * size
        box = (x - 0.7 * size, y - 0.6 * size, x + width + 0.7 * size, y + 1.8 * size)
        fill = ("#3eb575" if own else "#2c2c2c") if dark else ("#95ec69" if own else "#ffffff")
        pen.rounded_rectangle(box, 0.3 * size, fill)
        pen.text((x, y), line, "#ddd" if dark and not own else "#111", font)
        y += 4 * size
    return page


def meme(text: str, photo: Image.Image, font: ImageFont.FreeTypeFont) -> Image.Image:
    size = round(font.size)
    scale = max(1.0, (font.getlength(text) + size) / photo.width)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
    pen = ImageDraw.Draw(photo)
    where = (photo.width / 2, photo.height - size)
    pen.text(where, text, "white", font, "mm", stroke_width=max(1, size // 14), stroke_fill="black")
    return photo


def draw(
    kind: str, text: str, face: tuple[Path, int, str], photo: Path, rng: random.Random
) -> Drawn:
    low, high = SIZES[kind]
    size = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    font = ImageFont.truetype(face[0], size, face[1])
    little = ImageFont.truetype(face[0], max(12, size // 3), face[1])
    with Image.open(photo) as opened:
        ground = opened.convert("RGB")
    ground.thumbnail((640, 640))
    templates = SMALL_PRINT.get(kind, ())
    small = [
        t.format(rng.randint(100, 900), rng.randint(0, 59))
        for t in rng.sample(templates, min(len(templates), rng.randint(0, 2)))
    ]
    vertical = kind in ("sign", "packaging") and rng.random() < 0.15
    if vertical:
        small = []
    if kind == "screenshot":
        image = screenshot(text, small, font, rng)
    elif kind == "meme":
        image = meme(text, ground, font)
    else:
        image = place(ground, board_of(text, small, font, little, vertical, rng), rng)
    image, scale = passed_on(image, MIN_SIZE / size, rng)
    return Drawn(image, kind, text, tuple(small), face[2], round(size * scale), vertical)


def passed_on(image: Image.Image, least: float, rng: random.Random) -> tuple[Image.Image, float]:
    """Return an image as it arrives after being shared: made smaller, and a JPEG again."""
    scale = rng.uniform(least, 1)
    size = (round(image.width * scale), round(image.height * scale))
    content = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(content, "JPEG", quality=rng.randint(25, 90))
    return Image.open(content), scale


def character_errors(text: str, recognised: str) -> float:
    """Return the share of characters of a text that are not in the recognised text in order."""
    wanted, seen = units(text), units(recognised)
    wanted, seen = list("".join(wanted)), list("".join(seen))
    row = [0] * (len(seen) + 1)
    for a in wanted:  # longest common subsequence
        previous = 0
        for n, b in enumerate(seen, 1):
            previous, row[n] = row[n], previous + 1 if a == b else max(row[n], row[n - 1])
    return 1 - row[-1] / len(wanted)


def part_of(text: str, rng: random.Random) -> str:
    length = min(len(text), rng.randint(2, 4))
    start = rng.randint(0, len(text) - length)
    return text[start : start + length]


def text_index(texts: list[list[str]]) -> sqlite3.Connection:
    """Return the full-text index of recognised lines, as a library has it."""
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE images (id INTEGER PRIMARY KEY, text TEXT)")
    db.execute(f"CREATE VIRTUAL TABLE found USING fts5(words, tokenize = '{TOKENIZER}')")
    joined = [(n, "\n".join(lines)) for n, lines in enumerate(texts)]
    db.executemany("INSERT INTO images VALUES (?, ?)", joined)
    rows = [(n, tokens(text)) for n, text in joined]
    db.executemany("INSERT INTO found (rowid, words) VALUES (?, ?)", rows)
    return db


def text_matches(db: sqlite3.Connection, query: str) -> dict[int, TextMatch]:
    """Return the images whose text has a part of the query."""
    expression = match_expression(query, partial=True)
    if not expression:
        return {}
    sql = """SELECT images.id, text FROM found JOIN images ON images.id = found.rowid
        WHERE found MATCH ? ORDER BY rank LIMIT ?"""
    rows = db.execute(sql, (expression, CANDIDATES))
    every = {n: match_text(query, text) for n, text in rows}
    return {n: match for n, match in every.items() if match is not None}


def by_reciprocal_rank(order: list[int], matches: dict[int, TextMatch]) -> list[int]:
    """Return the order of the sum of 1 / (60 + rank) over both rankings."""
    scores = {n: 1 / (60 + rank) for rank, n in enumerate(order, 1)}
    by_strength = sorted(matches, key=lambda n: -matches[n].strength)
    for rank, n in enumerate(by_strength, 1):
        scores[n] += 1 / (60 + rank)
    return sorted(order, key=lambda n: -scores[n])


def recalls(orders: list[list[int]], positives: list[set[int]]) -> dict[str, np.ndarray]:
    return {
        f"R@{k}": np.array(
            [100.0 * bool(p & set(o[:k])) for o, p in zip(orders, positives, strict=True)]
        )
        for k in (1, 5, 10)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; default: download them")
    parser.add_argument("--fonts", type=Path, nargs="+", required=True)
    parser.add_argument("--photos", type=Path, nargs="*", default=[])
    parser.add_argument("--model", default="mini", help="anything that cn_clip.load takes")
    parser.add_argument("--count", type=int, default=360, help="images with text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the text recognition")
    parser.add_argument("--save", type=Path, help="write the true and the recognised texts")
    parser.add_argument("--sheet", type=Path, help="write the first 48 images as one PNG")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()

    rng = random.Random(options.seed)
    fonts, photos = font_files(options.fonts), photo_files(options.photos)
    if not fonts:
        parser.error("no Chinese font in the folders of --fonts")
    texts = main_texts(options.count, rng)
    rng.shuffle(texts)
    drawn = [
        draw(kind, text, fonts[n % len(fonts)], rng.choice(photos), rng)
        for n, (kind, text) in enumerate(texts)
    ]
    if options.sheet:
        write_sheet(drawn[:48], options.sheet)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = things(options.stamps or fetch(Path(scratch)))
        stamps = [on_white(path) for path, _ in pairs]

    reader = TextReader(threads=options.threads)
    recognised: list[list[str]] = []
    seconds, busy = [], []
    for image in [*stamps, *(d.image for d in drawn)]:
        start, before = time.perf_counter(), time.process_time()
        recognised.append([line.text for line in reader.recognize(image)])
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - before)
    embedder = cn_clip.load(options.model)
    gallery = embedder.embed_images([*stamps, *(d.image for d in drawn)])

    cpu = next(iter(cpu_info("model name")), platform.machine()).split(":")[-1].strip()
    print(f"{cpu}; {reader.name}, {options.threads} threads; {options.model}; seed {options.seed}")
    print(f"{len(stamps)} stamps; {len(drawn)} images with text", end="")
    print(f", {len(fonts)} fonts, {len(photos)} photos")
    for name, some in (("stamps", slice(len(stamps))), ("with text", slice(len(stamps), None))):
        rate, cost = 1 / statistics.mean(seconds[some]), statistics.mean(busy[some])
        share = statistics.mean(map(bool, recognised[some]))
        print(f"OCR, {name}: {rate:.1f} images/s, {cost:.3f} s of CPU each", end="")
        print(f", lines in {100 * share:.0f} %")
    errors = [
        character_errors(d.text, " ".join(r))
        for d, r in zip(drawn, recognised[len(stamps) :], strict=True)
    ]
    show_errors(drawn, errors)
    if options.save:
        rows = zip(drawn, recognised[len(stamps) :], strict=True)
        lines = [
            json.dumps({"text": d.text, "recognised": "\n".join(r)}, ensure_ascii=False)
            for d, r in rows
        ]
        options.save.write_text("\n".join(lines) + "\n", encoding="utf-8")

    captions = list(dict.fromkeys(caption for _, caption in pairs))
    contains = [fold(d.text).replace(" ", "") for d in drawn]
    parts = [part_of(d.text, rng) for d in drawn]
    described = [rng.choice(SENTENCES).format(d.text) for d in drawn]
    by_text = [
        [
            {len(stamps) + n for n, text in enumerate(contains) if fold(query) in text}
            for query in some
        ]
        for some in ([d.text for d in drawn], parts)
    ]
    groups = {
        "text": ([d.text for d in drawn], by_text[0]),
        "part": (parts, by_text[1]),
        "described": (described, by_text[0]),
        "text-free": (
            captions,
            [{n for n, (_, c) in enumerate(pairs) if c == caption} for caption in captions],
        ),
    }
    index = text_index(recognised)
    result: dict[str, dict[str, list[float]]] = {}
    for name, (queries, positives) in groups.items():
        cosines = embedder.embed_texts(queries) @ gallery.T
        orders: dict[str, list[list[int]]] = defaultdict(list)
        for query, row in zip(queries, cosines, strict=True):
            order = np.argsort(-row, kind="stable")
            matches = text_matches(index, query)
            hits = fuse(order, row[order], matches, logit_scale=embedder.logit_scale)
            orders["image alone"].append(order.tolist())
            orders["fused"].append([hit.id for hit in hits])
            orders["reciprocal rank"].append(by_reciprocal_rank(order.tolist(), matches))
        alone = recalls(orders["image alone"], positives)
        print(f"{name}, {len(queries)} queries")
        for way, ranked in orders.items():
            table = recalls(ranked, positives)
            cells = []
            for k, values in table.items():
                gain = paired_interval(values, alone[k])
                result.setdefault(f"{name}, {way}", {})[k] = [values.mean(), gain.low, gain.high]
                cells.append(f"{k} {values.mean():5.1f} [{gain.low:+.1f}, {gain.high:+.1f}]")
            print(f"  {way:<16} {'   '.join(cells)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show_errors(drawn: list[Drawn], errors: list[float]) -> None:
    """Print the error rate of characters by kind, font, size and direction."""
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for image, error in zip(drawn, errors, strict=True):
        above = [size for size in BUCKETS if image.size >= size]
        columns["size"][f"from {above[-1]} px" if above else f"below {BUCKETS[0]} px"].append(error)
        columns["font"][image.font].append(error)
        columns["kind"][image.kind].append(error)
        columns["direction"]["vertical" if image.vertical else "horizontal"].append(error)
    print(f"characters not recognised: {100 * statistics.mean(errors):.1f} %")
    for column, rows in columns.items():
        cells = (
            f"{k} {100 * statistics.mean(v):.1f} % of {len(v)}" for k, v in sorted(rows.items())
        )
        print(f"  by {column}: {'; '.join(cells)}")


def write_sheet(drawn: list[Drawn], path: Path) -> None:
    sheet = Image.new("RGB", (8 * 200, 6 * 200), "white")
    for n, one in enumerate(drawn):
        small = one.image.convert("RGB")
        small.thumbnail((196, 196))
        sheet.paste(small, (n % 8 * 200, n // 8 * 200))
    sheet.save(path)


if __name__ == "__main__":
    main()
