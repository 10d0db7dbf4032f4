"""Ablations of the data, before any training:

    python recipes/mini/ablations.py --packages mini/packages --data mini

The image tower is the initial one of training, fitted to the remaining data. The target embeddings
of texts replace the text tower. Scores are those of the 468 things.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from image_tower import features_of, imagenet_tower
from prepare import (
    CONFIG,
    EMBED_DIM,
    WITHOUT,
    ablated_images,
    ablated_space,
    ablated_things,
    backbone_features,
    file_stem,
    fitted_tower,
    write_images,
)
from sentence_encoder import EmbeddingCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import things468


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="packages of run.sh")
    parser.add_argument("--data", type=Path, required=True, help="output folder of prepare.py")
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; downloaded by default")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = things468.things(options.stamps or things468.fetch(Path(scratch)))
        stamp_images = [things468.on_white(path) for path, _ in pairs]
    captions = list(dict.fromkeys(caption for _, caption in pairs))
    correct = np.array([[caption == own for _, own in pairs] for caption in captions])
    images = write_images(options.packages, options.data)
    features = dict(
        zip(map(file_stem, images), backbone_features(images, options.data), strict=True)
    )
    tower = imagenet_tower(CONFIG.vision, EMBED_DIM)
    stamp_features = features_of(stamp_images, tower, CONFIG.vision.resolution)
    encode = EmbeddingCache(options.packages / "sentence_encoder")
    for without in (None, *WITHOUT):
        images_left = ablated_images(images, without)
        space = ablated_space(encode, *ablated_things(without), without)
        texts = sorted({text for image in images_left for text in image.words.texts})
        targets = dict(zip(texts, space.targets(texts), strict=True))
        features_left = np.stack([features[file_stem(image)] for image in images_left])
        tower = fitted_tower(images_left, features_left, targets, space.prototypes)
        x = torch.from_numpy(stamp_features)
        with torch.no_grad():
            probabilities = (tower.sharpness * tower.classifier(x)).softmax(-1)
            embeddings = probabilities @ tower.prototypes + tower.residual(x)
        embeddings = torch.nn.functional.normalize(embeddings, dim=-1).numpy()
        scores = space.targets(captions) @ embeddings.T
        rows = [things468.hits(scores, correct), things468.hits(scores.T, correct.T)]
        cells = [*map(things468.cell, rows)]
        print(f"| {'all' if without is None else f'without {without}'} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
