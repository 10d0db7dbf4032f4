"""Pictures with words: emoji by several hands, Open Clip Art, and pictures of a children's game.

Emoji have their Chinese names and keywords from CLDR; the words of the others are in data/.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from words import Words, labels

RENDERED = 320  # width that SVGs are drawn at
LARGEST = 50_000_000  # pixels of a picture worth decoding
KEYWORDS = 4  # of an emoji; the later ones say little of what is to be seen
SKIN_TONES = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}
JOINERS = {"200d", "2640", "2642", "27a1"}  # joiner, female, male, "facing right"
GROWN_UP, CHILD = "1f9d1", "1f9d2"
PEOPLE = {"1f468": GROWN_UP, "1f469": GROWN_UP, "1f466": CHILD, "1f467": CHILD}


@dataclass(frozen=True)
class Picture:
    """One picture: `group` names what it shows, so that a split can keep its drawings together."""

    source: str
    key: str
    group: str
    words: Words
    data: bytes  # an encoded picture, or SVG text

    @property
    def name(self) -> str:
        return f"{self.source}/{self.key}"


def drawn(data: bytes, side: int) -> Image.Image:
    """The picture on a white square, side x side, nothing cut off.

    Raises:
        OSError, ValueError: it cannot be decoded, or is far too large.
    """
    if data.lstrip()[:1] == b"<":
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode("utf-8"), width=RENDERED))
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > LARGEST:
            raise ValueError(f"{image.width} x {image.height} pixels")
        layer = image.convert("RGBA")
    longer = max(layer.size)
    square = Image.new("RGBA", (longer, longer), "white")
    square.alpha_composite(layer, ((longer - layer.width) // 2, (longer - layer.height) // 2))
    return square.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def all_pictures(packages: Path) -> Iterator[Picture]:
    """Every picture that has words, each key once in a source."""
    modules = packages / "node_modules"
    words = emoji_words(modules)
    noto = modules / "@iconify-json/noto"
    yield from fluent_3d(modules / "@lobehub/fluent-emoji-3d", words)
    yield from iconify(noto, "noto", words)
    yield from iconify(modules / "@iconify-json/noto-v1", "noto-v1", words, chars=noto)
    yield from iconify(modules / "@iconify-json/twemoji", "twemoji", words)
    yield from iconify(modules / "@iconify-json/emojione", "emojione", words, chars=noto)
    debian = packages / "debian"
    png = debian / "openclipart-png/usr/share/openclipart/png"
    for key, each in labels("clip_art.tsv").items():
        yield Picture("clip-art", key, each.names[0], each, (png / f"{key}.png").read_bytes())
    games = debian / "pysiogame/usr/share/games/pysiogame/res/images"
    for key, each in labels("games.tsv").items():
        yield Picture("games", key, each.names[0], each, (games / key).read_bytes())


def emoji_words(modules: Path) -> dict[str, Words]:
    """Code points (`1f600-200d-...`, without FE0F) -> Chinese name, keywords as broader words."""
    words: dict[str, Words] = {}
    for package, root in (
        ("cldr-annotations-full/annotations", "annotations"),
        ("cldr-annotations-derived-full/annotationsDerived", "annotationsDerived"),
    ):
        path = modules / package / "zh/annotations.json"
        table = json.loads(path.read_text("utf-8"))[root]["annotations"]
        for symbol, entry in table.items():
            code = "-".join(f"{ord(c):x}" for c in symbol if ord(c) != 0xFE0F)
            name = entry["tts"][0]
            if name.startswith("旗: "):
                country = name.removeprefix("旗: ")
                words[code] = Words((f"{country}国旗", f"{country}的旗帜"), ("国旗", "旗帜"))
            else:
                others = [k for k in entry.get("default", ()) if k != name]
                words[code] = Words((name,), tuple(others[:KEYWORDS]))
    return words


def english_names(modules: Path) -> dict[str, str]:
    """English names of emoji -> their code points."""
    path = modules / "cldr-annotations-full/annotations/en/annotations.json"
    table = json.loads(path.read_text("utf-8"))["annotations"]["annotations"]
    return {
        entry["tts"][0]: "-".join(f"{ord(c):x}" for c in symbol if ord(c) != 0xFE0F)
        for symbol, entry in table.items()
        if "tts" in entry
    }


def family(code: str) -> str:
    """What variants of an emoji share: policeman, policewoman and police officer are one."""
    parts = {PEOPLE.get(part, part) for part in code.split("-")} - JOINERS
    return "-".join(sorted(parts)) or code


def _wanted(code: str) -> bool:
    """Skin tones repeat one picture five times, so only the yellow one stays; signs of up to three
    hexadecimal digits are letters and numbers."""
    return not SKIN_TONES & set(code.split("-")) and len(code) > 3


def iconify(
    folder: Path, source: str, words: dict[str, Words], *, chars: Path | None = None
) -> Iterator[Picture]:
    """Emoji of an `@iconify-json/*` package.

    `chars.json` maps code points to icons; a package without one borrows another's, since Iconify
    names the same emoji alike everywhere.
    """
    icons = json.loads((folder / "icons.json").read_text("utf-8"))
    size = icons.get("width", 16), icons.get("height", 16)
    table = json.loads(((chars or folder) / "chars.json").read_text("utf-8"))
    seen = set()
    for raw, icon in table.items():
        code = "-".join(part for part in raw.lower().split("-") if part != "fe0f")
        entry = icons["icons"].get(icon)
        if entry is None or code in seen or code not in words or not _wanted(code):
            continue
        seen.add(code)
        width, height = entry.get("width", size[0]), entry.get("height", size[1])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f"{entry['body']}</svg>"
        )
        yield Picture(source, code, family(code), words[code], svg.encode())


def fluent_3d(folder: Path, words: dict[str, Words]) -> Iterator[Picture]:
    """Emoji of `@lobehub/fluent-emoji-3d`: one WebP for each code point sequence."""
    seen = set()
    for path in sorted((folder / "assets").glob("*.webp")):
        code = "-".join(part for part in path.stem.lower().split("-") if part != "fe0f")
        if code in words and code not in seen and _wanted(code):
            seen.add(code)
            yield Picture("fluent-3d", code, family(code), words[code], path.read_bytes())
