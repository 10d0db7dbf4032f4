"""Prepare the data and the initial weights of `cn-clip train --recipe mini` (see README.md):

    python recipes/mini/prepare.py --packages DIR --out DIR

Writes pictures/ (images), train.jsonl and val.jsonl (pairs), sentences/ (texts and their target
embeddings), and start/ (initial weights). Compares the checksum of each part with
data/checksums.json, the data of the shipped model. Embeddings of the sentence encoder are cached in
the packages' folder, so a second run takes minutes.
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
from images import SourceImage, all_images, emoji_words, english_names, render
from PIL import Image
from sentence_encoder import EmbeddingCache
from space import Space, unit
from words import (
    DATA,
    Thing,
    Words,
    captions,
    classes,
    fill_templates,
    jieba_words,
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
SIDE = 256  # pixels of the images on disk
EMBED_DIM = 384  # of the sentence encoder
VALIDATION_FRACTION = 0.06  # of the groups of images
SYNONYMS, BROADER, CAPTIONS = 4, 2, 2  # maximum number of texts per image
FREQUENT_WORDS, TEMPLATED_NOUNS, DRAWN_CAPTIONS = 30_000, 6_000, 50_000
FULL_STOP_EVERY = 3  # one text in three also appears with a full stop
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


def first_name_only(words: Words) -> Words:
    """Return only the first name, without synonyms, broader words and captions."""
    return Words(words.names[:1])


def ablated_images(images: list[SourceImage], without: str | None) -> list[SourceImage]:
    """Return the images and words that an ablation keeps."""
    if without == "clip-art":
        return [image for image in images if image.source != "clip-art"]
    if without == "synonyms":
        return [replace(image, words=first_name_only(image.words)) for image in images]
    return images


def ablated_things(without: str | None) -> tuple[list[Thing], list[Thing]]:
    """Return the classes of ImageNet and other things, with the words that an ablation keeps."""
    named, known = classes(), things()
    if without == "synonyms":
        return with_one_name(named), with_one_name(known)
    return named, known


def with_one_name(things: list[Thing]) -> list[Thing]:
    return [replace(thing, words=first_name_only(thing.words)) for thing in things]


def ablated_space(
    encode: EmbeddingCache, named: list[Thing], known: list[Thing], without: str | None
) -> Space:
    """Return the joint space; one ablation excludes the looks of things outside ImageNet."""
    return Space(encode, named, [] if without == "looks" else known)


def file_stem(image: SourceImage) -> str:
    return image.name.replace("/", "-").removesuffix(".jpg")


def write_image(image: SourceImage, *, folder: Path) -> bool:
    """Write one PNG unless it exists; return False if the image is unreadable or blank."""
    path = folder / f"{file_stem(image)}.png"
    if path.exists():
        return True
    try:
        rendered = render(image.data, SIDE)
    except Exception:
        return False
    if np.asarray(rendered).std() < 2:
        return False
    with atomic_file(path) as new:
        rendered.save(new, "PNG", compress_level=4)
    return True


def write_images(packages: Path, out: Path) -> list[SourceImage]:
    """Write all images that are not near a benchmark image.

    Return them without data; images with the same pixels are merged.
    """
    lines = (DATA / "excluded.jsonl").read_text("utf-8").splitlines()
    excluded = {json.loads(line)["image"] for line in lines}
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    images = [image for image in all_images(packages) if image.name not in excluded]
    with ProcessPoolExecutor(2) as pool:
        good = pool.map(partial(write_image, folder=folder), images, chunksize=16)
        written = [replace(p, data=b"") for p, ok in zip(images, good, strict=True) if ok]
    by_content: dict[bytes, list[SourceImage]] = defaultdict(list)
    for image in written:
        content = (folder / f"{file_stem(image)}.png").read_bytes()
        by_content[hashlib.sha256(content).digest()].append(image)
    return [merge(duplicates) for duplicates in by_content.values()]


def merge(duplicates: list[SourceImage]) -> SourceImage:
    """Return one image with the words of all, the shortest name first."""
    duplicates = sorted(duplicates, key=lambda image: len(image.words.names[0]))

    def all_of(kind: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t for image in duplicates for t in getattr(image.words, kind)))

    words = Words(all_of("names"), all_of("broader"), all_of("captions"))
    return replace(duplicates[0], words=words)


def validation_names(images: list[SourceImage]) -> set[str]:
    """Return the first names of validation images: those of randomly chosen groups."""
    groups = sorted({image.group for image in images})
    chosen = set(random.Random(SEED).sample(groups, round(len(groups) * VALIDATION_FRACTION)))
    return {image.words.names[0] for image in images if image.group in chosen}


def texts_of(image: SourceImage) -> list[str]:
    """Return the texts of an image: names, captions, and randomly chosen broader words."""
    words, rng = image.words, random.Random(f"{SEED} {image.name}")
    some = [
        *words.names[:SYNONYMS],
        *words.captions[:CAPTIONS],
        *rng.sample(words.broader, min(BROADER, len(words.broader))),
    ]
    return list(dict.fromkeys(some))


def write_pairs(images: list[SourceImage], out: Path) -> None:
    """Write both manifests; print their sizes."""
    validation = validation_names(images)
    numbers: dict[str, int] = {}  # text ids by text
    rows: dict[str, list[dict[str, str | int]]] = {"train": [], "val": []}
    for image in images:
        validates = image.words.names[0] in validation
        for text in image.words.names[:1] if validates else texts_of(image):
            rows["val" if validates else "train"].append(
                {
                    "image": f"pictures/{file_stem(image)}.png",
                    "text": text,
                    "image_id": file_stem(image),
                    "text_id": numbers.setdefault(text, len(numbers)),
                }
            )
    for split, split_rows in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows]
        (out / f"{split}.jsonl").write_text("".join(lines), "utf-8")
        split_images = [p for p in images if (p.words.names[0] in validation) == (split == "val")]
        print(
            f"{split}: {len(split_rows)} pairs of {len(split_images)} images "
            f"({dict(Counter(p.source for p in split_images))}), "
            f"{len({r['text'] for r in split_rows})} texts"
        )


def write_sentences(
    space: Space, known: list[Thing], images: list[SourceImage], packages: Path, out: Path
) -> dict[str, np.ndarray]:
    """Write texts and their target embeddings; return the targets by text."""
    names = [name for thing in known for name in thing.words.names]
    other_texts = [text for thing in known for text in thing.words.broader + thing.words.captions]
    image_texts = [text for image in images for text in image.words.texts]
    of_things = list(dict.fromkeys([*names, *other_texts, *image_texts]))
    chinese = list(dict.fromkeys(names + [p.words.names[0] for p in images]))
    words, nouns = jieba_words(FREQUENT_WORDS)
    tokens = vocabulary(VOCABULARY)
    patterned = fill_templates(chinese, 4, seed=1) | fill_templates(
        nouns[:TEMPLATED_NOUNS], 1, seed=2
    )
    plain = [*of_things, *captions(chinese, DRAWN_CAPTIONS, seed=3), *words, *tokens]
    texts = list(dict.fromkeys(" ".join(text.split()) for text in plain if text.strip()))
    table = dict(zip(texts, space.targets(texts), strict=True))
    # Traditional characters and a final full stop do not change the target.
    for text in tokens:
        if (usual := simplified(text)) in table:
            table[text] = table[usual]
    for text in of_things:
        table.setdefault(traditional(text), table[text])
    for text in random.Random(SEED).sample(of_things, len(of_things) // FULL_STOP_EVERY):
        table.setdefault(f"{text}。", table[text])
    # The target of a templated text is half-way between those of the word and of the text.
    new = [text for text in patterned if text not in table]
    inner = space.targets([patterned[text] for text in new])
    table |= zip(new, unit(space.targets(new) + inner), strict=True)
    # An English name has the target of the Chinese name (Reimers & Gurevych, 2020).
    modules = packages / "node_modules"
    codes = emoji_words(modules)
    for name, code in english_names(modules).items():
        if code in codes and codes[code].names[0] in table:
            table.setdefault(name, table[codes[code].names[0]])
    order = sorted(table)
    vectors = np.stack([table[text] for text in order])
    embeddings = EmbeddingsToWrite(
        "texts",
        [*range(len(order))],
        order,
        EMBED_DIM,
        lambda a, b: vectors[a:b],
        {"kind": "texts"},
    )
    write_clip_retrieval(embeddings, out / "sentences")
    print(f"sentences: {len(order)} texts")
    return table


def write_start(
    space: Space, targets: dict[str, np.ndarray], images: list[SourceImage], layers: int, out: Path
) -> None:
    """Write the initial weights: ImageNet's backbone with a head fitted in closed form, and a
    random BERT whose word embeddings are projections of the tokens' targets."""
    config = replace(CONFIG, text=replace(CONFIG.text, layers=layers))
    model = CLIP(config)
    initialize(model, torch.Generator().manual_seed(SEED))
    features = backbone_features(images, out)
    tower = fitted_tower(images, features, targets, space.prototypes)
    state = model.state_dict()
    state |= {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    state["logit_scale"].fill_(np.log(LOGIT_SCALE))
    tokens = VOCABULARY.read_text("utf-8")
    at = {
        row: targets[text]
        for row, token in enumerate(tokens.rstrip("\n").split("\n"))
        if (text := token.strip().removeprefix("##")) in targets and not token.startswith("[")
    }
    known = np.stack([*at.values()])
    _, _, axes = np.linalg.svd(known - known.mean(0), full_matrices=False)
    reduced = known @ axes[: config.text.hidden_size].T
    table = state["bert.embeddings.word_embeddings.weight"]
    table[list(at)] = torch.from_numpy(reduced * (0.03 / reduced.std())).float()
    weights.save_weights(config, state, out / "start")
    print(f"start: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")


def backbone_features(images: list[SourceImage], out: Path) -> np.ndarray:
    """Return features (N, 1280) of the written images by ImageNet's backbone."""
    files = (Image.open(out / f"pictures/{file_stem(image)}.png") for image in images)
    tower = imagenet_tower(CONFIG.vision, EMBED_DIM)
    return features_of(files, tower, CONFIG.vision.resolution)


def fitted_tower(
    images: list[SourceImage],
    features: np.ndarray,
    targets: dict[str, np.ndarray],
    prototypes: np.ndarray,
) -> EfficientNetLite:
    """Return ImageNet's tower with a head fitted to the training images."""
    tower, validation = imagenet_tower(CONFIG.vision, EMBED_DIM), validation_names(images)
    is_training = np.array([image.words.names[0] not in validation for image in images])
    image_targets = np.stack([target_of(image, targets) for image in images])
    fit_head(tower, features[is_training], image_targets[is_training], prototypes)
    return tower


def target_of(image: SourceImage, targets: dict[str, np.ndarray]) -> np.ndarray:
    """Return the target embedding of an image: its name, plus half the mean of its other texts."""
    words = image.words
    others = [*words.names[1:], *words.captions, *words.broader]
    target = targets[words.names[0]]
    if others:
        target = target + 0.5 * np.mean([targets[text] for text in others], 0)
    return target / np.linalg.norm(target)


def checksum(part: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (part, *part.rglob("*")) if path.is_file()):
        digest.update(f"{path.relative_to(part)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_checksums(out: Path) -> None:
    """Write checksums.json, and compare it with data/checksums.json."""
    checksums = {part: checksum(out / part) for part in PARTS}
    (out / "checksums.json").write_text(json.dumps(checksums, indent=2) + "\n", "utf-8")
    known = json.loads((DATA / "checksums.json").read_text("utf-8"))
    for part, value in checksums.items():
        print(f"{part}: {'equal to' if value == known[part] else 'not'} the shipped model's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="packages of run.sh")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--layers", type=int, default=3, help="layers of the text tower")
    parser.add_argument("--without", choices=WITHOUT, help="ablation: data to leave out")
    options = parser.parse_args()
    torch.set_num_threads(2)
    started = time.monotonic()
    images = ablated_images(write_images(options.packages, options.out), options.without)
    write_pairs(images, options.out)
    encode = EmbeddingCache(options.packages / "sentence_encoder")
    named, known = ablated_things(options.without)
    space = ablated_space(encode, named, known, options.without)
    targets = write_sentences(space, named + known, images, options.packages, options.out)
    write_start(space, targets, images, options.layers, options.out)
    if options.without is None and options.layers == CONFIG.text.layers:
        write_checksums(options.out)
    print(f"{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    sys.exit(main())
