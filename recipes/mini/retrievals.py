"""The card's picture of good and bad retrievals, from the drawings held out of training:

    python recipes/mini/retrievals.py --data mini --out docs/images/mini-retrievals.png

The names on the left are drawn at random among those that found the right drawing first, those on
the right among those that had none of theirs in the first five; green frames are right.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import cn_clip

SIDE, FRAME, GAP, LABEL = 96, 4, 6, 190
SHOWN, ROWS = 5, 7
RIGHT, WRONG = "#2e9e44", "#dddddd"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    parser.add_argument("--model", default="mini", help="anything that cn_clip.load takes")
    parser.add_argument("--font", default="NotoSansCJK-Regular.ttc", help="with Chinese letters")
    options = parser.parse_args()
    rows = [
        json.loads(line) for line in (options.data / "val.jsonl").read_text("utf-8").splitlines()
    ]
    paths = [options.data / row["image"] for row in rows]
    own: dict[str, set[int]] = defaultdict(set)
    for number, row in enumerate(rows):
        own[row["text"]].add(number)
    names = list(own)
    embedder = cn_clip.load(options.model)
    scores = embedder.embed_texts(names) @ embedder.embed_images(paths).T
    first = np.argsort(-scores, axis=1, kind="stable")[:, :SHOWN]
    good = [n for n, name in enumerate(names) if first[n, 0] in own[name]]
    bad = [n for n, name in enumerate(names) if not own[name] & set(first[n].tolist())]
    rng = random.Random(0)
    width, height = LABEL + SHOWN * (SIDE + GAP), ROWS * (SIDE + GAP)
    sheet = Image.new("RGB", (2 * width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(options.font, 20)
    for column, chosen in enumerate((rng.sample(good, ROWS), rng.sample(bad, ROWS))):
        for row, query in enumerate(chosen):
            left, top = column * width, row * (SIDE + GAP)
            draw.text((left + 8, top + SIDE // 2 - 14), names[query][:9], "black", font)
            for place, number in enumerate(first[query].tolist()):
                colour = RIGHT if number in own[names[query]] else WRONG
                with Image.open(paths[number]) as image:
                    small = image.convert("RGB").resize((SIDE - 2 * FRAME,) * 2)
                at = left + LABEL + place * (SIDE + GAP), top
                sheet.paste(ImageOps.expand(small, FRAME, colour), at)
    sheet.save(options.out, optimize=True)
    print(f"{options.out}: {len(good)} of {len(names)} names first, {len(bad)} not among {SHOWN}")


if __name__ == "__main__":
    main()
