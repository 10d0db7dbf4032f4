"""Everything that `cn-clip train --recipe mini` needs, from packages (see README.md):

    python recipes/mini/prepare.py --packages DIR --out DIR

Writes pictures/, train.jsonl and val.jsonl (pairs), sentences/ (texts and where they belong), and
start/ (the model that training starts from), and says of each whether it is, byte for byte, what
data/checksums.json tells: that which the shipped model learned from. What the sentence encoder has
embedded is kept in the packages' folder, so that a second run is a matter of minutes.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from image_tower import features_of, fit_head, imagenet_tower
from pictures import Picture, all_pictures, drawn, emoji_words, english_names
from PIL import Image
from sentence_encoder import EmbeddingCache
from space import Space, unit
from words import (
    DATA,
    Thing,
    Words,
    captions,
    classes,
    jieba_words,
    templated,
    things,
    vocabulary,
)

import cn_clip
from cn_clip import weights
from cn_clip.config import ModelConfig, TextConfig, VisionConfig
from cn_clip.embeddings.files import EmbeddingsToWrite, write_clip_retrieval
from cn_clip.eval.robustness.rewrites import simplified, traditional
from cn_clip.model.clip import CLIP, initialize
from cn_clip.model.efficientnet import EfficientNetLite
from cn_clip.publish import atomic_file

SEED = 0
SIDE = 256  # of the pictures on disk
EMBED_DIM = 384  # the sentence encoder's
VALIDATED = 0.06  # share of the groups of pictures held out
SYNONYMS, BROADER, CAPTIONS = 4, 2, 2  # texts of a picture, at most
FREQUENT_WORDS, TEMPLATED_NOUNS, DRAWN_CAPTIONS = 30_000, 6_000, 50_000
STOPPED = 3  # one text in so many is there with a full stop, too
LOGIT_SCALE = 15.0
WITHOUT = ("clip-art", "synonyms", "looks")
PARTS = ("pictures", "train.jsonl", "val.jsonl", "sentences", "start")
VOCABULARY = Path(cn_clip.__file__).parent / "assets/vocab.txt"

CONFIG = ModelConfig(
    name="mini",
    embed_dim=EMBED_DIM,
    vision=VisionConfig("efficientnet_lite", 224),
    text=TextConfig(
        hidden_size=256,
        layers=3,
        heads=4,
        intermediate_size=1024,
        max_positions=64,
        dropout=0.0,
    ),
    image_mean=(127 / 255,) * 3,
    image_std=(128 / 255,) * 3,
    background="white",
)


def one_name(words: Words) -> Words:
    """The words without synonyms, broader words and captions: the first name alone."""
    return Words(words.names[:1])


def kept(pictures: list[Picture], without: str | None) -> list[Picture]:
    """The pictures, and their words, that an ablation keeps."""
    if without == "clip-art":
        return [each for each in pictures if each.source != "clip-art"]
    if without == "synonyms":
        return [replace(each, words=one_name(each.words)) for each in pictures]
    return pictures


def known_things(without: str | None) -> tuple[list[Thing], list[Thing]]:
    """The classes of ImageNet and all other things, with the words that an ablation keeps."""
    named, known = classes(), things()
    if without == "synonyms":
        return one_named(named), one_named(known)
    return named, known


def one_named(some: list[Thing]) -> list[Thing]:
    return [replace(each, words=one_name(each.words)) for each in some]


def space_of(
    encode: EmbeddingCache, named: list[Thing], known: list[Thing], without: str | None
) -> Space:
    """The joint space, without the looks of what is no class if an ablation leaves them out."""
    return Space(encode, named, [] if without == "looks" else known)


def file_of(picture: Picture) -> str:
    return picture.name.replace("/", "-").removesuffix(".jpg")


def write_picture(picture: Picture, *, folder: Path) -> bool:
    """Write one PNG, unless it is there; False if it cannot be drawn or is blank."""
    path = folder / f"{file_of(picture)}.png"
    if path.exists():
        return True
    try:
        image = drawn(picture.data, SIDE)
    except Exception:
        return False
    if np.asarray(image).std() < 2:
        return False
    with atomic_file(path) as new:
        image.save(new, "PNG", compress_level=4)
    return True


def write_pictures(packages: Path, out: Path) -> list[Picture]:
    """Write every picture that is not near one of the benchmark's; return them without data, and
    those that are the same dot by dot as one."""
    lines = (DATA / "excluded.jsonl").read_text("utf-8").splitlines()
    excluded = {json.loads(line)["picture"] for line in lines}
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [each for each in all_pictures(packages) if each.name not in excluded]
    with ProcessPoolExecutor(2) as pool:
        good = pool.map(partial(write_picture, folder=folder), pictures, chunksize=16)
        written = [replace(p, data=b"") for p, ok in zip(pictures, good, strict=True) if ok]
    same: dict[bytes, list[Picture]] = defaultdict(list)
    for each in written:
        content = (folder / f"{file_of(each)}.png").read_bytes()
        same[hashlib.sha256(content).digest()].append(each)
    return [merged(several) for several in same.values()]


def merged(several: list[Picture]) -> Picture:
    """One picture with the words of all, the plainest name first: France before an island of it."""
    several = sorted(several, key=lambda picture: len(picture.words.names[0]))

    def all_of(kind: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t for each in several for t in getattr(each.words, kind)))

    words = Words(all_of("names"), all_of("broader"), all_of("captions"))
    return replace(several[0], words=words)


def held_out(pictures: list[Picture]) -> set[str]:
    """Names of pictures for validation: those of groups drawn, and whatever has the same name."""
    groups = sorted({picture.group for picture in pictures})
    chosen = set(random.Random(SEED).sample(groups, round(len(groups) * VALIDATED)))
    return {picture.words.names[0] for picture in pictures if picture.group in chosen}


def texts_of(picture: Picture) -> list[str]:
    """The texts of a picture: names, captions, and some broader words, other ones for each."""
    words, rng = picture.words, random.Random(f"{SEED} {picture.name}")
    some = [
        *words.names[:SYNONYMS],
        *words.captions[:CAPTIONS],
        *rng.sample(words.broader, min(BROADER, len(words.broader))),
    ]
    return list(dict.fromkeys(some))


def write_pairs(pictures: list[Picture], out: Path) -> None:
    """Write both manifests; print what they hold."""
    apart = held_out(pictures)
    numbers: dict[str, int] = {}  # the same text has the same text_id everywhere
    rows: dict[str, list[dict[str, str | int]]] = {"train": [], "val": []}
    for picture in pictures:
        validates = picture.words.names[0] in apart
        for text in picture.words.names[:1] if validates else texts_of(picture):
            rows["val" if validates else "train"].append(
                {
                    "image": f"pictures/{file_of(picture)}.png",
                    "text": text,
                    "image_id": file_of(picture),
                    "text_id": numbers.setdefault(text, len(numbers)),
                }
            )
    for split, found in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        (out / f"{split}.jsonl").write_text("".join(lines), "utf-8")
        shown = [p for p in pictures if (p.words.names[0] in apart) == (split == "val")]
        print(
            f"{split}: {len(found)} pairs of {len(shown)} pictures "
            f"({dict(Counter(p.source for p in shown))}), {len({r['text'] for r in found})} texts"
        )


def write_sentences(
    space: Space, known: list[Thing], pictures: list[Picture], packages: Path, out: Path
) -> dict[str, np.ndarray]:
    """Write texts and where they belong; return the places of all by text."""
    named = [name for each in known for name in each.words.names]
    said = [text for each in known for text in each.words.broader + each.words.captions]
    shown = [text for each in pictures for text in each.words.texts]
    of_things = list(dict.fromkeys([*named, *said, *shown]))
    chinese = list(dict.fromkeys(named + [p.words.names[0] for p in pictures]))
    words, nouns = jieba_words(FREQUENT_WORDS)
    tokens = vocabulary(VOCABULARY)
    patterned = templated(chinese, 4, seed=1) | templated(nouns[:TEMPLATED_NOUNS], 1, seed=2)
    plain = [*of_things, *captions(chinese, DRAWN_CAPTIONS, seed=3), *words, *tokens]
    texts = list(dict.fromkeys(" ".join(text.split()) for text in plain if text.strip()))
    table = dict(zip(texts, space.places(texts), strict=True))
    # Other characters change nothing, nor does a full stop behind what is said of a thing.
    for text in tokens:
        if (usual := simplified(text)) in table:
            table[text] = table[usual]
    for text in of_things:
        table.setdefault(traditional(text), table[text])
    for text in random.Random(SEED).sample(of_things, len(of_things) // STOPPED):
        table.setdefault(f"{text}。", table[text])
    # A pattern changes little of what a word stands for: half-way between word and sentence.
    new = [text for text in patterned if text not in table]
    inner = space.places([patterned[text] for text in new])
    table |= zip(new, unit(space.places(new) + inner), strict=True)
    # An English name belongs where its Chinese one does (Reimers & Gurevych, 2020).
    modules = packages / "node_modules"
    codes = emoji_words(modules)
    for name, code in english_names(modules).items():
        if code in codes and codes[code].names[0] in table:
            table.setdefault(name, table[codes[code].names[0]])
    order = sorted(table)
    vectors = np.stack([table[text] for text in order])
    found = EmbeddingsToWrite(
        "texts",
        [*range(len(order))],
        order,
        EMBED_DIM,
        lambda a, b: vectors[a:b],
        {"kind": "texts"},
    )
    write_clip_retrieval(found, out / "sentences")
    print(f"sentences: {len(order)} texts")
    return table


def write_start(
    space: Space, places: dict[str, np.ndarray], pictures: list[Picture], layers: int, out: Path
) -> None:
    """Write the model that training starts from: ImageNet's backbone under a head in closed form,
    and a random BERT whose word embeddings begin as what the sentence encoder says of a token."""
    config = replace(CONFIG, text=replace(CONFIG.text, layers=layers))
    model = CLIP(config)
    initialize(model, torch.Generator().manual_seed(SEED))
    features = picture_features(pictures, out)
    tower = fitted_tower(pictures, features, places, space.prototypes)
    state = model.state_dict()
    state |= {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    state["logit_scale"].fill_(np.log(LOGIT_SCALE))
    tokens = VOCABULARY.read_text("utf-8")
    at = {
        row: places[text]
        for row, token in enumerate(tokens.rstrip("\n").split("\n"))
        if (text := token.strip().removeprefix("##")) in places and not token.startswith("[")
    }
    known = np.stack([*at.values()])
    _, _, axes = np.linalg.svd(known - known.mean(0), full_matrices=False)
    reduced = known @ axes[: config.text.hidden_size].T
    table = state["bert.embeddings.word_embeddings.weight"]
    table[list(at)] = torch.from_numpy(reduced * (0.03 / reduced.std())).float()
    weights.save_state(config, state, out / "start")
    print(f"start: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")


def picture_features(pictures: list[Picture], out: Path) -> np.ndarray:
    """(N, 1280): what ImageNet's backbone sees in the pictures that were written."""
    images = (Image.open(out / f"pictures/{file_of(picture)}.png") for picture in pictures)
    tower = imagenet_tower(CONFIG.vision, EMBED_DIM)
    return features_of(images, tower, CONFIG.vision.resolution)


def fitted_tower(
    pictures: list[Picture],
    features: np.ndarray,
    places: dict[str, np.ndarray],
    prototypes: np.ndarray,
) -> EfficientNetLite:
    """ImageNet's tower under a head fitted to the pictures that are not for validation."""
    tower, apart = imagenet_tower(CONFIG.vision, EMBED_DIM), held_out(pictures)
    seen = np.array([picture.words.names[0] not in apart for picture in pictures])
    goals = np.stack([goal_of(picture, places) for picture in pictures])
    fit_head(tower, features[seen], goals[seen], prototypes)
    return tower


def goal_of(picture: Picture, places: dict[str, np.ndarray]) -> np.ndarray:
    """Where a picture belongs: its name, and half as much all else that is said of it."""
    words = picture.words
    others = [*words.names[1:], *words.captions, *words.broader]
    found = places[words.names[0]]
    if others:
        found = found + 0.5 * np.mean([places[text] for text in others], 0)
    return found / np.linalg.norm(found)


def checksum(part: Path) -> str:
    """SHA-256 of a file, or of all files in a folder, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(each for each in (part, *part.rglob("*")) if each.is_file()):
        digest.update(f"{path.relative_to(part)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def tell_checksums(out: Path) -> None:
    """Write checksums.json; tell what is as in data/checksums.json."""
    found = {part: checksum(out / part) for part in PARTS}
    (out / "checksums.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    known = json.loads((DATA / "checksums.json").read_text("utf-8"))
    for part, value in found.items():
        print(f"{part}: {'the same' if value == known[part] else 'not the same'} as for the card")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="what run.sh fetched")
    parser.add_argument("--out", type=Path, required=True, help="where the files go")
    parser.add_argument("--layers", type=int, default=3, help="of the text tower")
    parser.add_argument("--without", choices=WITHOUT, help="what an ablation leaves out")
    options = parser.parse_args()
    torch.set_num_threads(2)
    started = time.monotonic()
    pictures = kept(write_pictures(options.packages, options.out), options.without)
    write_pairs(pictures, options.out)
    encode = EmbeddingCache(options.packages / "sentence_encoder")
    named, known = known_things(options.without)
    space = space_of(encode, named, known, options.without)
    places = write_sentences(space, named + known, pictures, options.packages, options.out)
    write_start(space, places, pictures, options.layers, options.out)
    if options.without is None and options.layers == CONFIG.text.layers:
        tell_checksums(options.out)
    print(f"{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    sys.exit(main())
