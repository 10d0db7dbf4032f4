"""Draw a small shop: ``products.csv`` with 200 products, and their photos.

    python examples/shop.py shop

The tutorial docs/finetune.md uses it where you would use your own products.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "红色": "#d22d2d", "橙色": "#f08a24", "黄色": "#f2d03b", "绿色": "#3f9b45",
    "蓝色": "#2f6fd0", "紫色": "#8548b0", "粉色": "#f29ac0", "黑色": "#2b2b2b",
}  # fmt: skip
PATTERNS = ("", "条纹", "圆点")
SIDE = 240


def mug(draw: ImageDraw.ImageDraw) -> None:
    draw.rounded_rectangle((60, 60, 160, 190), 12, fill=255)
    draw.arc((135, 85, 205, 165), -90, 90, fill=255, width=14)


def shirt(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon(
        [(85, 50), (155, 50), (215, 90), (190, 125), (165, 108), (165, 200), (75, 200), (75, 108),
         (50, 125), (25, 90)],
        fill=255,
    )  # fmt: skip
    draw.pieslice((97, 28, 143, 72), 0, 180, fill=0)


def umbrella(draw: ImageDraw.ImageDraw) -> None:
    draw.pieslice((30, 40, 210, 200), 180, 360, fill=255)
    draw.line((120, 120, 120, 200), fill=255, width=8)
    draw.arc((96, 180, 124, 212), 0, 180, fill=255, width=8)


def hat(draw: ImageDraw.ImageDraw) -> None:
    draw.pieslice((65, 60, 175, 230), 180, 360, fill=255)
    draw.ellipse((25, 135, 215, 170), fill=255)


def lamp(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon([(90, 40), (150, 40), (185, 120), (55, 120)], fill=255)
    draw.line((120, 120, 120, 195), fill=255, width=10)
    draw.ellipse((80, 185, 160, 210), fill=255)


def backpack(draw: ImageDraw.ImageDraw) -> None:
    draw.arc((95, 25, 145, 85), 180, 360, fill=255, width=10)
    draw.rounded_rectangle((60, 55, 180, 205), 38, fill=255)
    draw.rounded_rectangle((80, 130, 160, 185), 10, outline=0, width=5)


def chair(draw: ImageDraw.ImageDraw) -> None:
    draw.rounded_rectangle((75, 35, 165, 120), 10, fill=255)
    draw.rectangle((65, 120, 175, 142), fill=255)
    for x in (70, 160):
        draw.rectangle((x, 142, x + 12, 212), fill=255)


def sofa(draw: ImageDraw.ImageDraw) -> None:
    draw.rounded_rectangle((45, 75, 195, 150), 18, fill=255)
    draw.rounded_rectangle((20, 105, 220, 185), 18, fill=255)
    for x in (40, 188):
        draw.rectangle((x, 185, x + 12, 205), fill=255)


KINDS = {
    "马克杯": mug, "T恤": shirt, "雨伞": umbrella, "帽子": hat,
    "台灯": lamp, "双肩包": backpack, "椅子": chair, "沙发": sofa,
}  # fmt: skip


def photo(kind: str, colour: str, pattern: str, rng: random.Random) -> Image.Image:
    """Draw a product, at its own size, angle and place on its own background."""
    shape = Image.new("L", (SIDE, SIDE))
    KINDS[kind](ImageDraw.Draw(shape))
    cloth = Image.new("RGB", (SIDE, SIDE), COLOURS[colour])
    draw = ImageDraw.Draw(cloth)
    step = rng.randrange(20, 28)
    if pattern == "条纹":
        for y in range(0, SIDE, step):
            draw.rectangle((0, y, SIDE, y + step // 3), fill="white")
    elif pattern == "圆点":
        for x, y in itertools.product(range(8, SIDE, step), repeat=2):
            draw.ellipse((x, y, x + 8, y + 8), fill="white")
    cloth.putalpha(shape)
    side = rng.randrange(150, 230)
    product = cloth.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC).resize((side, side))
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(215, 256) for _ in range(3)))
    place = (rng.randrange(SIDE - side + 1), rng.randrange(SIDE - side + 1))
    image.paste(product, place, product)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--products", type=int, default=192)
    parser.add_argument("--encoding", default="utf-8-sig", help="of the CSV; Excel in China: gbk")
    given = parser.parse_args()
    (given.folder / "photos").mkdir(parents=True)
    rng = random.Random(0)
    products = list(itertools.product(KINDS, COLOURS, PATTERNS))
    rng.shuffle(products)
    rows = []
    for number, (kind, colour, pattern) in enumerate(products[: given.products], 1):
        image = photo(kind, colour, pattern, rng)
        image.save(given.folder / f"photos/{number:03}.jpg", quality=90)
        rows.append((f"photos/{number:03}.jpg", f"{colour}{pattern}{kind}"))
        if number % 24 == 0:  # a photo that is in the shop twice
            image.resize((180, 180)).save(given.folder / f"photos/{number:03}-copy.jpg")
            rows.append((f"photos/{number:03}-copy.jpg", f"现货：{colour}{pattern}{kind}"))
    with (given.folder / "products.csv").open("w", encoding=given.encoding, newline="") as stream:
        csv.writer(stream).writerows([("image", "caption"), *rows])


if __name__ == "__main__":
    main()
