"""Source images with Chinese words: emoji sets, Open Clip Art, and images of a children's game.

Chinese names and keywords of emoji are CLDR's; the words of the others are in data/.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from words import Words, labels

SVG_WIDTH = 320  # pixels of a rendered SVG
MAX_PIXELS = 50_000_000  # larger images are skipped
KEYWORDS = 4  # per emoji; later ones hardly describe the image
SKIN_TONES = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}
JOINERS = {"200d", "2640", "2642", "27a1"}  # joiner, female, male, "facing right"
GROWN_UP, CHILD = "1f9d1", "1f9d2"
PEOPLE = {"1f468": GROWN_UP, "1f469": GROWN_UP, "1f466": CHILD, "1f467": CHILD}


@dataclass(frozen=True)
class SourceImage:
    """One image; images of one `group` show the same object and stay in one split."""

    source: str
    key: str
    group: str
    words: Words
    data: bytes  # an encoded image, or SVG text

    @property
    def name(self) -> str:
        return f"{self.source}/{self.key}"


def render(data: bytes, side: int) -> Image.Image:
    """Return the image on a white square, side x side, without cropping.

    Raises:
        OSError, ValueError: the image is unreadable or too large.
    """
    if data.lstrip()[:1] == b"<":
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode("utf-8"), width=SVG_WIDTH))
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        layer = image.convert("RGBA")
    longer = max(layer.size)
    square = Image.new("RGBA", (longer, longer), "white")
    square.alpha_composite(layer, ((longer - layer.width) // 2, (longer - layer.height) // 2))
    return square.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def all_images(packages: Path) -> Iterator[SourceImage]:
    """Yield all images that have words; a key is unique within a source."""
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
    for key, words_of_image in labels("clip_art.tsv").items():
        yield SourceImage(
            "clip-art",
            key,
            words_of_image.names[0],
            words_of_image,
            (png / f"{key}.png").read_bytes(),
        )
    games = debian / "pysiogame/usr/share/games/pysiogame/res/images"
    for key, words_of_image in labels("games.tsv").items():
        yield SourceImage(
            "games", key, words_of_image.names[0], words_of_image, (games / key).read_bytes()
        )


def emoji_words(modules: Path) -> dict[str, Words]:
    """Return Chinese names and keywords by code points (`1f600-200d-...`, without FE0F)."""
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
    """Return code points of emoji by English name."""
    path = modules / "cldr-annotations-full/annotations/en/annotations.json"
    table = json.loads(path.read_text("utf-8"))["annotations"]["annotations"]
    return {
        entry["tts"][0]: "-".join(f"{ord(c):x}" for c in symbol if ord(c) != 0xFE0F)
        for symbol, entry in table.items()
        if "tts" in entry
    }


def family(code: str) -> str:
    """Return a key that variants of an emoji share, such as policeman and policewoman."""
    parts = {PEOPLE.get(part, part) for part in code.split("-")} - JOINERS
    return "-".join(sorted(parts)) or code


def _is_used(code: str) -> bool:
    """Whether an emoji is used: skin tones repeat one image five times, and code points of up to
    three hexadecimal digits are letters and digits."""
    return not SKIN_TONES & set(code.split("-")) and len(code) > 3


def iconify(
    folder: Path, source: str, words: dict[str, Words], *, chars: Path | None = None
) -> Iterator[SourceImage]:
    """Yield emoji of an `@iconify-json/*` package.

    `chars.json` maps code points to icons. A package without it uses that of another package,
    because Iconify uses the same names in all.
    """
    icons = json.loads((folder / "icons.json").read_text("utf-8"))
    size = icons.get("width", 16), icons.get("height", 16)
    table = json.loads(((chars or folder) / "chars.json").read_text("utf-8"))
    seen = set()
    for raw, icon in table.items():
        code = "-".join(part for part in raw.lower().split("-") if part != "fe0f")
        entry = icons["icons"].get(icon)
        if entry is None or code in seen or code not in words or not _is_used(code):
            continue
        seen.add(code)
        width, height = entry.get("width", size[0]), entry.get("height", size[1])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f"{entry['body']}</svg>"
        )
        yield SourceImage(source, code, family(code), words[code], svg.encode())


def fluent_3d(folder: Path, words: dict[str, Words]) -> Iterator[SourceImage]:
    """Yield emoji of `@lobehub/fluent-emoji-3d`: one WebP per code point sequence."""
    seen = set()
    for path in sorted((folder / "assets").glob("*.webp")):
        code = "-".join(part for part in path.stem.lower().split("-") if part != "fe0f")
        if code in words and code not in seen and _is_used(code):
            seen.add(code)
            yield SourceImage("fluent-3d", code, family(code), words[code], path.read_bytes())
