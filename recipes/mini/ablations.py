"""What each part of the data gives, before any training:

    python recipes/mini/ablations.py --packages mini/packages --data mini

The image tower is that which training starts from, fitted anew to what is left of the data, and the
text tower is replaced by where texts belong. So a row tells what the words and pictures are worth,
and the last steps of the recipe are free to make more of it. Scores are those of the 468 things.
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
    file_of,
    fitted_tower,
    kept,
    known_things,
    picture_features,
    space_of,
    write_pictures,
)
from sentence_encoder import EmbeddingCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import things468


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="what run.sh fetched")
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; fetched if not given")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = things468.things(options.stamps or things468.fetch(Path(scratch)))
        shown = [things468.on_white(path) for path, _ in pairs]
    captions = list(dict.fromkeys(caption for _, caption in pairs))
    correct = np.array([[caption == own for _, own in pairs] for caption in captions])
    pictures = write_pictures(options.packages, options.data)
    features = dict(
        zip(map(file_of, pictures), picture_features(pictures, options.data), strict=True)
    )
    tower = imagenet_tower(CONFIG.vision, EMBED_DIM)
    asked = features_of(shown, tower, CONFIG.vision.resolution)
    encode = EmbeddingCache(options.packages / "sentence_encoder")
    for what in (None, *WITHOUT):
        mine = kept(pictures, what)
        space = space_of(encode, *known_things(what), what)
        texts = sorted({text for each in mine for text in each.words.texts})
        places = dict(zip(texts, space.places(texts), strict=True))
        seen = np.stack([features[file_of(each)] for each in mine])
        tower = fitted_tower(mine, seen, places, space.prototypes)
        x = torch.from_numpy(asked)
        with torch.no_grad():
            shares = (tower.sharpness * tower.classifier(x)).softmax(-1)
            images = shares @ tower.prototypes + tower.residual(x)
        images = torch.nn.functional.normalize(images, dim=-1).numpy()
        scores = space.places(captions) @ images.T
        rows = [things468.hits(scores, correct), things468.hits(scores.T, correct.T)]
        cells = [*map(things468.cell, rows)]
        print(f"| {'all' if what is None else f'without {what}'} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
