"""Find training images that are near-duplicates of benchmark images, to exclude them:

    python recipes/mini/decontaminate.py --packages DIR --work DIR

This is the only script here that opens the Tux Paint stamps; it reads their pixels, not their
captions. It writes `data/excluded.jsonl`, which is part of the repository: `prepare.py` reads that
list and never the stamps. Images are compared by `cn-clip data decontaminate`.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from images import all_images, render
from words import DATA

SIDE = 256
STAMPS = "tuxpaint-stamps-default"
# Found manually: two among the 60 images nearest to a stamp by EfficientNet's features, and the
# minus sign, a bar that no hash distinguishes.
BY_EYE = {
    "clip-art/people/clothing/hats/green_fedora_01": "clothes/hats/green_fedora.png",
    "clip-art/food/beverages/glass": "a glass of water",
    "fluent-3d/2796": "symbols/math/operators/op1_minus.png",
    "noto-v1/2796": "symbols/math/operators/op1_minus.png",
    "twemoji/2796": "symbols/math/operators/op1_minus.png",
}


def write_image(numbered: tuple[int, bytes], *, folder: Path) -> bool:
    number, data = numbered
    try:
        image = render(data, SIDE)
    except Exception:
        return False
    image.save(folder / f"{number}.png", compress_level=1)
    return True


def write_set(name: str, images: list[tuple[str, bytes]], work: Path) -> Path:
    """Write images and a manifest; return the path of the manifest."""
    folder, manifest = work / name, work / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as pool:
        numbered = enumerate(data for _, data in images)
        written = list(pool.map(partial(write_image, folder=folder), numbered, chunksize=16))
    rows = [
        {"image": f"{name}/{number}.png", "text": key, "image_id": key}
        for number, ((key, _), ok) in enumerate(zip(images, written, strict=True))
        if ok
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    manifest.write_text("".join(lines), "utf-8")
    return manifest


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
    images = [(image.name, image.data) for image in all_images(options.packages)]
    against, train = write_set("stamps", stamps, work), write_set("images", images, work)
    out = work / "removed.jsonl"
    command = [sys.executable, "-m", "cn_clip", "data", "decontaminate", f"jsonl:{train}"]
    command += ["--against", f"jsonl:{against}", "--min-caption", "0", "--out", str(out)]
    subprocess.run([*command, "--report", f"{work}/removed.html", "--overwrite"], check=True)
    excluded = {name: {"image": name, "stamp": stamp} for name, stamp in BY_EYE.items()}
    for line in out.read_text("utf-8").splitlines()[1:]:
        row = json.loads(line)
        name, stamp = row["train"]["image_id"], row["against"]["image_id"]
        excluded.setdefault(name, {"image": name, "stamp": stamp, "bits": row["distance"]})
    lines = [json.dumps(excluded[name], ensure_ascii=False) + "\n" for name in sorted(excluded)]
    (DATA / "excluded.jsonl").write_text("".join(lines), "utf-8")
    print(f"{len(excluded)} of {len(images)} images excluded, {len(stamps)} stamps")


if __name__ == "__main__":
    main()
