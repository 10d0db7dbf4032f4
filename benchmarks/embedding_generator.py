"""Vectors like those of `mini`'s images and texts, in any number, without the images.

    python benchmarks/embedding_generator.py                    # cosines of drawn ones
    python benchmarks/embedding_generator.py --fit --stamps DIR # beside those of the real ones

The parameters, `embedding_generator.npz`, are fitted to the 468 things (`things468.py`): the
embedding of an image and that of its caption, side by side, are one point of twice the dimension.
A point is drawn around one of the 468 (a smoothed bootstrap, which keeps mean and covariance):
`p = mean + a (p_i - mean) + sqrt(1 - a^2) z`, with z of the points' covariance. Its halves are an
image and a text about it, each scaled to unit length. So the gap between the modalities, and how
near a text is to its image and to others, are those of the fit. With `a` = 0.9, an image's
nearest neighbour among 468 has a cosine of 0.69, with real ones 0.74; lower values lower it.

The covariance is kept as its first 128 principal components and an equal variance in all others.
Queries are texts of other points than the images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

PARAMETERS = Path(__file__).with_suffix(".npz")
COMPONENTS = 128
KEPT = 0.9  # a
BATCH = 1 << 16


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Generator:
    """Draws images and texts; the same ones for the same seed and count.

    A ``dim`` above that of `mini` places them in a wider space, by an isometry, which keeps every
    cosine.
    """

    def __init__(self, parameters: Path = PARAMETERS, dim: int | None = None) -> None:
        with np.load(parameters) as file:
            self.fitted = {name: file[name].astype(np.float32) for name in file.files}
        own = len(self.fitted["mean"]) // 2
        self.dim = dim or own
        self.basis = np.eye(own, dtype=np.float32)  # (own, dim)
        if self.dim != own:
            noise = np.random.default_rng(0).normal(size=(self.dim, own))
            self.basis = np.linalg.qr(noise)[0].T.astype(np.float32)

    def pairs(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return images and the text about each, unit vectors float32 (count, dim)."""
        fitted = self.fitted
        rest = np.float32(np.sqrt(1 - KEPT**2))
        around = fitted["scores"][rng.integers(len(fitted["scores"]), size=count)]
        spread = rng.standard_normal((count, COMPONENTS), np.float32) * fitted["sd"]
        points = (KEPT * around + rest * spread) @ fitted["axes"] + fitted["mean"]
        points += fitted["rest"] * rng.standard_normal(points.shape, np.float32)
        images, texts = np.split(points, 2, axis=1)
        return unit(images @ self.basis), unit(texts @ self.basis)

    def images(self, count: int, seed: int = 0) -> np.ndarray:
        """Return unit vectors float16 (count, dim)."""
        rng = np.random.default_rng((seed, 0))
        out = np.empty((count, self.dim), np.float16)
        for at in range(0, count, BATCH):
            out[at : at + BATCH] = self.pairs(min(BATCH, count - at), rng)[0]
        return out

    def queries(self, count: int, seed: int = 0) -> np.ndarray:
        """Return texts, unit vectors float32 (count, dim)."""
        return self.pairs(count, np.random.default_rng((seed, 1)))[1]


def embed_things(stamps: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return `mini`'s embeddings of the 468 images, and of the caption of each."""
    from things468 import on_white, things

    import cn_clip

    embedder = cn_clip.load("mini")
    pairs = things(stamps)
    images = embedder.embed_images(on_white(path) for path, _ in pairs)
    return np.asarray(images), np.asarray(embedder.embed_texts([text for _, text in pairs]))


def fit(images: np.ndarray, texts: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean (2D,), principal axes (C, 2D), scores (N, C), their deviations and the rest's."""
    points = np.concatenate([images, texts], axis=1).astype(np.float64)
    mean = points.mean(axis=0)
    _unused, values, axes = np.linalg.svd(points - mean, full_matrices=False)
    rest = np.sqrt((values[COMPONENTS:] ** 2).sum() / points.size)
    scores = (points - mean) @ axes[:COMPONENTS].T
    fitted = {"mean": mean, "axes": axes[:COMPONENTS], "scores": scores, "sd": scores.std(axis=0)}
    return {name: np.float16(value) for name, value in (fitted | {"rest": rest}).items()}


def describe(name: str, images: np.ndarray, texts: np.ndarray) -> None:
    """Print how the cosines between texts and images are distributed."""
    products = texts @ images.T
    own = np.diagonal(products).mean()
    others = products[~np.eye(len(products), dtype=bool)].reshape(len(products), -1)
    others = np.sort(others, axis=1)[:, ::-1]
    among = images @ images.T
    np.fill_diagonal(among, -1)
    gap = np.linalg.norm(images.mean(0, np.float64) - texts.mean(0, np.float64))
    row = [own, *(others[:, at].mean() for at in (0, 9, 99)), others.mean(), others.std()]
    row += [others[:, 0].std(), among.mean(), among.max(1).mean(), gap]
    print(f"{name:<8}" + "".join(f"{value:>10.3f}" for value in row))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", action="store_true", help="fit the parameters and write them")
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; default: download them")
    options = parser.parse_args()
    columns = ["own", "1st", "10th", "100th", "mean", "sd", "sd(1st)", "img-img", "nearest", "gap"]
    print(f"{'':<8}" + "".join(f"{name:>10}" for name in columns))
    if options.fit:
        from things468 import fetch

        with tempfile.TemporaryDirectory() as scratch:
            images, texts = embed_things(options.stamps or fetch(Path(scratch)))
        np.savez_compressed(PARAMETERS, **fit(images, texts))
        describe("real", images, texts)
    generator = Generator()
    describe("drawn", *generator.pairs(468, np.random.default_rng(0)))
    print(f"{PARAMETERS.name}: {PARAMETERS.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
