"""Pairs and an image tower for a real two-stage training run, from packages (see README.md):

    python recipes/emoji/prepare.py --packages DIR --out DIR

Writes pictures/, train.jsonl, val.jsonl and image_tower/. The same packages give the same files.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import cn_clip

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mini"))

from build import DATA, draw, imagenet_weights
from pictures import Picture, emoji_words, fluent_3d, iconify
from texts import class_names
from tower import image_tower

SEED = 0
SIDE = 192
VALIDATED = 350  # concepts held out of about 1,600
KEYWORDS = (2, 3)  # in a picture's second and third caption
# Of the random projection that tells images of one class apart: ten times less changes nothing in
# the recall of the start weights, ten times more costs a third of it.
RESIDUAL_SCALE = 0.02

GENDERS = {"200d", "2640", "2642", "27a1"}  # joiner, female, male, "facing right"
GROWN_UP, CHILD = "1f9d1", "1f9d2"
PEOPLE = {"1f468": GROWN_UP, "1f469": GROWN_UP, "1f466": CHILD, "1f467": CHILD}


def emoji(packages: Path) -> Iterator[Picture]:
    """Every drawing of an emoji that has a Chinese name, once, without the benchmark's look-alikes.

    Flags have no name in this table (theirs is derived from countries), and that is welcome: no
    model can tell the flag of a country that it was never shown.
    """
    modules = packages / "node_modules"
    words = emoji_words(modules / "cldr-annotations-full/annotations/zh/annotations.json", None)
    noto = modules / "@iconify-json/noto"
    sources = (
        fluent_3d(modules / "@lobehub/fluent-emoji-3d", words),
        iconify(noto, "noto", words),
        iconify(modules / "@iconify-json/twemoji", "twemoji", words),
        iconify(modules / "@iconify-json/emojione", "emojione", words, chars=noto),
    )
    lines = (DATA / "excluded.txt").read_text("utf-8").splitlines()
    seen = {tuple(line.split("\t")[:2]) for line in lines if not line.startswith("#")}
    for source in sources:
        for picture in source:
            if (picture.source, picture.key) not in seen:
                seen.add((picture.source, picture.key))
                yield picture


def name_of(picture: Picture) -> str:
    return f"{picture.source}-{picture.key}"


def write_picture(picture: Picture, *, folder: Path) -> bool:
    """Write one PNG on white, SIDE x SIDE; False if it cannot be drawn or is blank."""
    image = draw(picture)
    if image is None:
        return False
    small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    small.save(folder / f"{name_of(picture)}.png")
    return True


def family(code: str) -> str:
    """What variants of an emoji share: policeman, policewoman and police officer are one."""
    parts = {PEOPLE.get(part, part) for part in code.split("-")} - GENDERS
    return "-".join(sorted(parts))


def held_out(codes: list[str]) -> set[str]:
    """Concepts for validation: whole families, drawn until there are VALIDATED concepts."""
    families = defaultdict(list)
    for code in sorted(codes):
        families[family(code)].append(code)
    order = sorted(families)
    random.Random(SEED).shuffle(order)
    drawn: set[str] = set()
    for each in order:
        if len(drawn) >= VALIDATED:
            break
        drawn.update(families[each])
    return drawn


def captions(picture: Picture, hidden: set[str]) -> list[str]:
    """The name, then the name with keywords: `名字，关键词、关键词`, other ones for each drawing.

    No keyword is among the `hidden` texts.
    """
    name, *keywords = picture.words
    keywords = [word for word in keywords if word not in hidden]
    rng = random.Random(f"{SEED} {name_of(picture)}")
    texts = [name]
    for count in KEYWORDS:
        some = rng.sample(keywords, min(count, len(keywords)))
        texts.append("，".join((name, "、".join(some))) if some else name)
    return list(dict.fromkeys(texts))


def write_pairs(packages: Path, out: Path) -> None:
    """Write the pictures and both manifests; print what they hold."""
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = list(emoji(packages))
    with ProcessPoolExecutor(2) as pool:
        good = pool.map(partial(write_picture, folder=folder), pictures, chunksize=16)
        pictures = [picture for picture, ok in zip(pictures, good, strict=True) if ok]
    apart = held_out(list({picture.group for picture in pictures}))
    unseen = {picture.words[0] for picture in pictures if picture.group in apart}
    numbers: dict[str, int] = {}  # the same text has the same text_id everywhere
    rows: dict[str, list[dict[str, str | int]]] = {"train": [], "val": []}
    for picture in pictures:
        validates = picture.group in apart
        for text in picture.words[:1] if validates else captions(picture, unseen):
            rows["val" if validates else "train"].append(
                {
                    "image": f"pictures/{name_of(picture)}.png",
                    "text": text,
                    "image_id": name_of(picture),
                    "text_id": numbers.setdefault(text, len(numbers)),
                }
            )
    texts = {split: {row["text"] for row in found} for split, found in rows.items()}
    assert not texts["train"] & texts["val"], "a validation text is in training"
    for split, found in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        (out / f"{split}.jsonl").write_text("".join(lines), "utf-8")
        shown = [p for p in pictures if (p.group in apart) == (split == "val")]
        sources = Counter(p.source for p in shown)
        print(
            f"{split}: {len(found)} pairs, {len(shown)} pictures ({dict(sources)}), "
            f"{len({p.group for p in shown})} concepts, {len(texts[split])} texts"
        )


def prototypes(embedder: cn_clip.Embedder) -> Tensor:
    """(1000, D): where the text tower puts the ImageNet classes, the mean over a class's names."""
    names = [names for names, _ in class_names(DATA / "imagenet_zh.txt")]
    vectors = embedder.embed_texts([name for each in names for name in each])
    starts = np.cumsum([0, *(len(each) for each in names)])
    means = [vectors[a:b].mean(0) for a, b in pairwise(starts)]
    return torch.from_numpy(np.stack(means))


def write_tower(folder: Path) -> None:
    """Write the image tower as one file of weights, `visual.*`."""
    embedder = cn_clip.load("mini", device="cpu")
    tower = image_tower(imagenet_weights(), embedder.dim)
    rng = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        tower.prototypes.copy_(prototypes(embedder))
        tower.sharpness.fill_(1.0)
        torch.nn.init.orthogonal_(tower.residual.weight, RESIDUAL_SCALE, generator=rng)
        tower.residual.bias.zero_()
    state = {f"visual.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{folder.name}: {len(state)} tensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="where npm put node_modules")
    parser.add_argument("--out", type=Path, required=True, help="where the files go")
    options = parser.parse_args()
    torch.set_num_threads(2)
    started = time.monotonic()
    write_pairs(options.packages, options.out)
    write_tower(options.out / "image_tower")
    print(f"{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
