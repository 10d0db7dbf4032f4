"""A few pairs and a tiny model, for runs that take a second."""

import json
import tomllib
from dataclasses import replace

import numpy as np
from conftest import TINY, make_image, make_model

from cn_clip import weights
from cn_clip.embeddings.files import EmbeddingsToWrite, write_clip_retrieval
from cn_clip.train.recipe.toml import build_recipe

CAPTIONS = [chr(0x4E00 + 37 * n) + chr(0x5000 + 91 * n) + chr(0x5200 + 53 * n) for n in range(200)]


def from_toml(text):
    """Build the recipe of a text that ``Recipe.to_toml`` wrote."""
    return build_recipe(tomllib.loads(text))


def write_pairs(folder, name, numbers, **changes):
    """Write a manifest of pairs, each of its own picture and caption, and return its URI."""
    rows = []
    for n in numbers:
        picture = folder / f"{n}.png"
        if not picture.exists():
            make_image(n, (40, 40)).save(picture)
        row = {"image": picture.name, "text": CAPTIONS[n], "image_id": str(n), "text_id": str(n)}
        rows.append(row | changes)
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return f"jsonl:{path}"


def write_start(folder, kind="vit", dropout=0.0):
    """Write the weights of a tiny model into a folder."""
    config = TINY[kind]
    model = make_model(replace(config, text=replace(config.text, dropout=dropout)))
    weights.save_folder(model, folder)
    return folder


def write_sentences(folder, count=40, dim=32):
    """Write texts of several lengths with vectors of any direction, as a sentence encoder's."""
    texts = [CAPTIONS[n] * (1 + n % 7) for n in range(count)]
    vectors = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    rows = EmbeddingsToWrite("texts", list(range(count)), texts, dim, lambda a, b: vectors[a:b], {})
    write_clip_retrieval(rows, folder)
    return folder


def recipe_values(pairs, start, out, *stages, **tables):
    """Return the plain values of a recipe of two epochs, with changes to its stages and tables."""
    stage = {
        "epochs": 2,
        "global_batch_size": 16,
        "optimizer": {"learning_rate": 1e-3, "warmup": 2},
    }
    values = {
        "data": {"train": [pairs[0]], "val": [pairs[1]], "workers": 0},
        "start": {"checkpoint": str(start)},
        "machine": {"precision": "fp32", "device": "cpu"},
        "output": {"folder": str(out), "log_every": 1},
        "stages": [stage | each for each in stages or ({},)],
    }
    for name, table in tables.items():
        values[name] = values.get(name, {}) | table if isinstance(table, dict) else table
    return values


def make_recipe(*given, **tables):
    """Build what ``recipe_values`` returns."""
    return build_recipe(recipe_values(*given, **tables))
