"""Find the pictures that repeat a picture of the benchmark, so that the recipe leaves them out:

    python recipes/mini/decontaminate.py --packages DIR --work DIR

This is the only script here that opens the Tux Paint stamps, and it reads their pixels, not their
captions. It writes `data/excluded.jsonl`, which is part of the repository: `prepare.py` reads that
list and never sees the stamps. Pictures are compared by `cn-clip data decontaminate`, twice: as
they are, and cut to what is drawn on them, since a copy with other margins is a copy too.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from pictures import all_pictures, drawn
from PIL import Image, ImageChops
from words import DATA

SIDE = 256
NEARLY_WHITE = 12  # of 255
STAMPS = "tuxpaint-stamps-default"
# Found by eye among the 60 pictures nearest to a stamp by EfficientNet's features.
BY_EYE = {
    "clip-art/people/clothing/hats/green_fedora_01": "clothes/hats/green_fedora.png",
    "clip-art/food/beverages/glass": "a glass of water",
}


def trimmed(image: Image.Image) -> Image.Image:
    """The drawing without its margins, on a white square."""
    away = ImageChops.difference(image, Image.new("RGB", image.size, "white")).convert("L")
    content = image.crop(away.point(lambda value: 255 * (value > NEARLY_WHITE)).getbbox())
    side = max(content.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(content, ((side - content.width) // 2, (side - content.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def write_both(numbered: tuple[int, bytes], *, folder: Path) -> bool:
    number, data = numbered
    try:
        image = drawn(data, SIDE)
        cut = trimmed(image)
    except Exception:
        return False
    image.save(folder / f"whole-{number}.png", compress_level=1)
    cut.save(folder / f"trimmed-{number}.png", compress_level=1)
    return True


def write_set(name: str, pictures: list[tuple[str, bytes]], work: Path) -> None:
    """Write pictures in both forms, and a manifest of each."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as pool:
        numbered = enumerate(data for _, data in pictures)
        good = list(pool.map(partial(write_both, folder=folder), numbered, chunksize=16))
    for form in ("whole", "trimmed"):
        rows = [
            {"image": f"{name}/{form}-{number}.png", "text": key, "image_id": key}
            for number, ((key, _), ok) in enumerate(zip(pictures, good, strict=True))
            if ok
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (work / f"{name}-{form}.jsonl").write_text("".join(lines), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-qq", STAMPS], cwd=work, check=True)
    (package,) = work.glob(f"{STAMPS}*.deb")
    subprocess.run(["dpkg", "-x", package.name, "unpacked"], cwd=work, check=True)
    root = work / "unpacked/usr/share/tuxpaint/stamps"
    stamps = [(str(p.relative_to(root)), p.read_bytes()) for p in sorted(root.rglob("*.png"))]
    write_set("stamps", stamps, work)
    pictures = [(each.name, each.data) for each in all_pictures(options.packages)]
    write_set("pictures", pictures, work)
    found = {name: {"picture": name, "stamp": stamp} for name, stamp in BY_EYE.items()}
    for form in ("whole", "trimmed"):
        out = work / f"{form}.jsonl"
        command = [sys.executable, "-m", "cn_clip", "data", "decontaminate", "--overwrite"]
        command += [f"jsonl:{work}/pictures-{form}.jsonl", "--min-caption", "0"]
        command += ["--against", f"jsonl:{work}/stamps-{form}.jsonl", "--out", str(out)]
        subprocess.run([*command, "--report", f"{work}/{form}.html"], check=True)
        for line in out.read_text("utf-8").splitlines()[1:]:
            row = json.loads(line)
            name, stamp = row["train"]["image_id"], row["against"]["image_id"]
            entry = {"picture": name, "stamp": stamp, "compared": form, "bits": row["distance"]}
            found.setdefault(name, entry)
    lines = [json.dumps(found[name], ensure_ascii=False) + "\n" for name in sorted(found)]
    (DATA / "excluded.jsonl").write_text("".join(lines), "utf-8")
    print(f"{len(found)} of {len(pictures)} pictures excluded, {len(stamps)} stamps")


if __name__ == "__main__":
    main()
