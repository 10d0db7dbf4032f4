"""Pictures with words: emoji by several hands with their Chinese CLDR names, and Open Clip Art.

Every source yields `Picture`s. Names in `words` stand first-best: the name, then keywords.
"""

import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIDE = 224  # what the tower sees
RENDERED = 320  # width that SVGs are drawn at, before they are squashed like any picture
SKIN_TONES = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}
# Folders of Open Clip Art without things to name (flags, playing cards, geometry, interface icons),
# or with names in many languages.
CLIP_ART_SKIPPED = (
    "buttons/",
    "computer/",
    "geography/",
    "logos/",
    "recreation/games/cards/",
    "shapes/",
    "signs_and_symbols/",
    "special/",
    "unsorted/",
)


@dataclass(frozen=True)
class Picture:
    """One picture: `group` names what it shows, so that no split separates two drawings of it."""

    source: str
    key: str
    group: str
    words: tuple[str, ...]
    data: bytes  # an encoded picture, or SVG text


def on_white(data: bytes) -> Image.Image:
    """The picture in RGB, transparent pixels on white, SIDE x SIDE (squashed, not cropped)."""
    if data.lstrip()[:1] == b"<":
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode("utf-8"), width=RENDERED))
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def emoji_words(annotations: Path, derived: Path | None) -> dict[str, tuple[str, ...]]:
    """Code points (`1f600-200d-...`, without FE0F) -> Chinese name and keywords, from CLDR."""
    words: dict[str, tuple[str, ...]] = {}
    for path, root in ((annotations, "annotations"), (derived, "annotationsDerived")):
        if path is None:
            continue
        table = json.loads(path.read_text("utf-8"))[root]["annotations"]
        for symbol, entry in table.items():
            code = "-".join(f"{ord(c):x}" for c in symbol if ord(c) != 0xFE0F)
            name = entry["tts"][0]
            if name.startswith("旗: "):
                country = name.removeprefix("旗: ")
                words[code] = (f"{country}国旗", f"{country}的旗帜", country)
            else:
                keywords = tuple(k for k in entry.get("default", ()) if k != name)
                words[code] = (name, *keywords)
    return words


def wanted_emoji(code: str) -> bool:
    """Skin tones repeat one picture five times, so only the yellow one stays."""
    return not SKIN_TONES & set(code.split("-")) and len(code) > 3


def iconify(
    folder: Path,
    source: str,
    names: dict[str, tuple[str, ...]],
    *,
    chars: Path | None = None,
) -> Iterator[Picture]:
    """Emoji of an `@iconify-json/*` package.

    `chars.json` maps code points to icons; a package without one borrows another's, since Iconify
    names the same emoji alike everywhere.
    """
    icons = json.loads((folder / "icons.json").read_text("utf-8"))
    size = icons.get("width", 16), icons.get("height", 16)
    table = json.loads(((chars or folder) / "chars.json").read_text("utf-8"))
    for raw, icon in table.items():
        code = "-".join(part for part in raw.lower().split("-") if part != "fe0f")
        entry = icons["icons"].get(icon)
        if entry is None or code not in names or not wanted_emoji(code):
            continue
        width, height = entry.get("width", size[0]), entry.get("height", size[1])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f"{entry['body']}</svg>"
        )
        yield Picture(source, code, code, names[code], svg.encode())


def fluent_3d(folder: Path, names: dict[str, tuple[str, ...]]) -> Iterator[Picture]:
    """Emoji of `@lobehub/fluent-emoji-3d`: one WebP for each code point sequence."""
    for path in sorted((folder / "assets").glob("*.webp")):
        code = "-".join(part for part in path.stem.lower().split("-") if part != "fe0f")
        if code in names and wanted_emoji(code):
            yield Picture("fluent-3d", code, code, names[code], path.read_bytes())


def plain_title(title: str) -> str:
    """`Simple_Apple 02` -> `simple apple`: what is left is the name that people gave it."""
    title = re.sub(r"[_\-/]+", " ", title)
    title = re.sub(r"\b(\d+|v\d+|svg|png|clip ?art|icon|remix|by .*)\b", " ", title, flags=re.I)
    title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", title)
    return " ".join(re.sub(r"[^A-Za-z' ]+", " ", title).lower().split())


def clip_art(folder: Path) -> Iterator[Picture]:
    """Open Clip Art (public domain): SVGs whose metadata hold an English title and keywords."""
    namespaces = {
        "dc": "http://purl.org/dc/elements/1.1/",
        "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    }
    for path in sorted(folder.rglob("*.svg")):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key.startswith(CLIP_ART_SKIPPED):
            continue
        data = path.read_bytes()
        try:
            work = ET.fromstring(data)
        except ET.ParseError:
            continue
        titles = work.findall(".//rdf:RDF/*/dc:title", namespaces)
        title = plain_title((titles[0].text or "") if titles else "")
        keywords = [plain_title(li.text or "") for li in work.findall(".//rdf:li", namespaces)]
        keywords = [k for k in dict.fromkeys(keywords) if k and k not in ("hash", title)]
        if title and "rpg" not in title:
            yield Picture("clip-art", key, title, (title, *keywords), data)
