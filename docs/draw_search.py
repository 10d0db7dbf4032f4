"""The image at the top of the README: what `mini` finds for some texts in the sample images.

python docs/draw_search.py --font NotoSansCJK-Regular.ttc
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import cn_clip
from cn_clip.sample import embedded_sample

PAGE = Path(__file__).parent / "images" / "search.png"
TEXTS = ("一杯咖啡", "宇航员", "圣诞树")
SIDE, GAP, LABEL, SHOWN = 150, 14, 200, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--font", default="NotoSansCJK-Regular.ttc", help="a Chinese font")
    given = parser.parse_args()
    embedder = cn_clip.load("mini", device="cpu")
    paths = embedded_sample().images
    cosines = embedder.embed_texts(list(TEXTS)) @ embedder.embed_images(paths).T
    row = SIDE + 34 + GAP
    sheet = Image.new("RGB", (LABEL + SHOWN * (SIDE + GAP) + GAP, len(TEXTS) * row + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = (ImageFont.truetype(given.font, size) for size in (26, 17))
    for number, (text, scores) in enumerate(zip(TEXTS, cosines, strict=True)):
        top = GAP + number * row
        draw.text((GAP + 6, top + SIDE // 2 - 20), text, "#111111", large)
        for place, index in enumerate(np.argsort(-scores, kind="stable")[:SHOWN].tolist()):
            left = LABEL + place * (SIDE + GAP)
            with Image.open(paths[index]) as image:
                fitted = ImageOps.pad(image.convert("RGB"), (SIDE, SIDE), color="white")
            sheet.paste(ImageOps.expand(fitted, 1, "#d0d0d0").resize((SIDE, SIDE)), (left, top))
            draw.text((left + 2, top + SIDE + 4), f"{scores[index]:.3f}", "#555555", small)
    sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(PAGE, optimize=True)


if __name__ == "__main__":
    main()
