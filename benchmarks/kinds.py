"""Nine kinds of things: the Tux Paint stamps in the official zero-shot layout.

    python benchmarks/kinds.py FOLDER                  # fetches the Debian package of the stamps
    python benchmarks/kinds.py FOLDER --stamps DIR
    python benchmarks/kinds.py FOLDER --photos         # without the folders of cartoons

Writes the 262 images whose folder is one of nine classes (fewer without cartoons), on white
squares, as FOLDER/test/0 to FOLDER/test/8 with FOLDER/label_cn.txt, for
`cn-clip eval zeroshot --data FOLDER`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from things468 import fetch, on_white, things

KINDS = {
    "animals/mammals": "哺乳动物",
    "animals/birds": "鸟",
    "animals/insects": "昆虫",
    "food": "食物",
    "vehicles": "车辆",
    "plants": "植物",
    "space": "太空",
    "sports": "体育用品",
    "clothes": "衣服",
}


def write_kinds(stamps: Path, folder: Path, *, photos: bool) -> int:
    """Write the images and the labels; return the number of images."""
    count, keys = 0, list(KINDS)
    for number, (path, _) in enumerate(things(stamps)):
        parts = path.relative_to(stamps).parts
        kind = "/".join(parts[: 2 if parts[0] == "animals" else 1])
        if kind in KINDS and not (photos and "cartoon" in parts):
            place = folder / "test" / str(keys.index(kind))
            place.mkdir(parents=True, exist_ok=True)
            on_white(path).save(place / f"{number:03}.png")
            count += 1
    (folder / "label_cn.txt").write_text("\n".join(KINDS.values()) + "\n", encoding="utf-8")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; fetched if not given")
    parser.add_argument("--photos", action="store_true", help="leave out what is in cartoon/")
    options = parser.parse_args()
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty; give a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        count = write_kinds(
            options.stamps or fetch(Path(scratch)), options.folder, photos=options.photos
        )
    print(f"{count} images of {len(KINDS)} kinds in {options.folder}")


if __name__ == "__main__":
    main()
