"""The image of correct and failed retrievals in the model card, from the held-out drawings:

    python recipes/mini/retrievals.py --data mini --out docs/images/mini-retrievals.png

The names on the left are a random sample of those with a correct first result, those on the right
of those without a correct result in the first five. Correct drawings have green frames.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import cn_clip

SIDE, FRAME, GAP, LABEL, TITLE = 96, 4, 6, 190, 64
TITLES = ("首个结果正确\nfirst result correct", "前五个都不对\nnone of the first five correct")
SHOWN, ROWS = 5, 7
RIGHT, WRONG = "#2e9e44", "#dddddd"


def draw_titles(sheet: Image.Image, width: int, font: str) -> None:
    """Write what the two halves of the sheet are, above their first results."""
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(TITLES):
        place = column * width + LABEL, 4
        draw.multiline_text(place, title, "black", ImageFont.truetype(font, 20), spacing=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="output folder of prepare.py")
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    parser.add_argument("--model", default="mini", help="name or path for cn_clip.load")
    parser.add_argument("--font", default="NotoSansCJK-Regular.ttc", help="a Chinese font")
    options = parser.parse_args()
    rows = [
        json.loads(line) for line in (options.data / "val.jsonl").read_text("utf-8").splitlines()
    ]
    paths = [options.data / row["image"] for row in rows]
    by_text: dict[str, set[int]] = defaultdict(set)
    for number, row in enumerate(rows):
        by_text[row["text"]].add(number)
    names = list(by_text)
    embedder = cn_clip.load(options.model)
    scores = embedder.embed_texts(names) @ embedder.embed_images(paths).T
    first = np.argsort(-scores, axis=1, kind="stable")[:, :SHOWN]
    correct = [n for n, name in enumerate(names) if first[n, 0] in by_text[name]]
    failed = [n for n, name in enumerate(names) if not by_text[name] & set(first[n].tolist())]
    rng = random.Random(0)
    width, height = LABEL + SHOWN * (SIDE + GAP), TITLE + ROWS * (SIDE + GAP)
    sheet = Image.new("RGB", (2 * width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(options.font, 20)
    draw_titles(sheet, width, options.font)
    for column, chosen in enumerate((rng.sample(correct, ROWS), rng.sample(failed, ROWS))):
        for row, query in enumerate(chosen):
            left, top = column * width, TITLE + row * (SIDE + GAP)
            draw.text((left + 8, top + SIDE // 2 - 14), names[query][:9], "black", font)
            for place, number in enumerate(first[query].tolist()):
                colour = RIGHT if number in by_text[names[query]] else WRONG
                with Image.open(paths[number]) as image:
                    small = image.convert("RGB").resize((SIDE - 2 * FRAME,) * 2)
                position = left + LABEL + place * (SIDE + GAP), top
                sheet.paste(ImageOps.expand(small, FRAME, colour), position)
    sheet.save(options.out, optimize=True)
    print(
        f"{options.out}: {len(correct)} of {len(names)} names correct first, "
        f"{len(failed)} not among the first {SHOWN}"
    )


if __name__ == "__main__":
    main()
