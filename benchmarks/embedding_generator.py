"""Vectors like those of `mini`'s images and texts, in any number, without the images.

    python benchmarks/embedding_generator.py                    # cosines of drawn ones
    python benchmarks/embedding_generator.py --fit --stamps DIR # fit them again

The parameters, `embedding_generator.npz`, are fitted to the 468 things (`things468.py`):

- An image is drawn around one of the 468 (a smoothed bootstrap, which keeps mean and covariance):
  `x = mean + a (x_i - mean) + sqrt(1 - a^2) z`, with z of the images' covariance.
- A query is the text of an image drawn alike: its regression on the image plus the residual, both
  fitted by cross-validation, about the mean of the texts. The gap between the modalities is the
  difference of the means.

Covariances are kept as their first 128 principal components and an equal variance in all others.
With `--fit`, the cosines of the real ones are printed beside those of the drawn ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

PARAMETERS = Path(__file__).with_suffix(".npz")
COMPONENTS, FOLDS = 128, 10
KEPT = 0.7  # a: how much of an image's difference from the mean its neighbours share
BATCH = 1 << 16


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Generator:
    """Draws images and queries; the same numbers for the same seed and count."""

    def __init__(self, parameters: Path = PARAMETERS, dim: int | None = None) -> None:
        with np.load(parameters) as file:
            self.fitted = {name: file[name].astype(np.float32) for name in file.files}
        own = len(self.fitted["image_mean"])
        # A wider space by an isometry, which keeps every cosine.
        rng = np.random.default_rng(0)
        self.dim = dim or own
        basis = np.linalg.qr(rng.normal(size=(self.dim, own)))[0].T.astype(np.float32)
        self.basis = None if self.dim == own else basis  # (own, dim)

    def _latent(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return images as differences from their mean, (count, components)."""
        fitted = self.fitted
        centers = fitted["image_scores"][rng.integers(len(fitted["image_scores"]), size=count)]
        noise = rng.standard_normal((count, COMPONENTS), np.float32) * fitted["image_sd"]
        return KEPT * centers + np.sqrt(1 - KEPT**2, dtype=np.float32) * noise

    def _placed(self, rows: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
        fitted = self.fitted
        rest = rng.standard_normal((len(rows), len(fitted["image_mean"])), np.float32)
        rows = rows @ fitted[f"{kind}_axes"] + fitted[f"{kind}_mean"] + fitted[f"{kind}_rest"] * rest
        return unit(rows if self.basis is None else rows @ self.basis)

    def images(self, count: int, seed: int = 0) -> np.ndarray:
        """Return unit vectors float16 (count, dim)."""
        rng = np.random.default_rng((seed, 0))
        out = np.empty((count, self.dim), np.float16)
        for start in range(0, count, BATCH):
            latent = self._latent(min(BATCH, count - start), rng)
            out[start : start + len(latent)] = self._placed(latent, "image", rng)
        return out

    def queries(self, count: int, seed: int = 0) -> np.ndarray:
        """Return unit vectors float32 (count, dim), each the text of an image."""
        rng = np.random.default_rng((seed, 1))
        noise = rng.standard_normal((count, COMPONENTS), np.float32)
        text = self._latent(count, rng) @ self.fitted["slope"] + noise @ self.fitted["residual"]
        return self._placed(text, "text", rng).astype(np.float32)


def components(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean, principal axes (C, D), scores (N, C), their deviations and that of the rest."""
    mean = rows.mean(axis=0)
    _unused, values, axes = np.linalg.svd(rows - mean, full_matrices=False)
    variances = values**2 / len(rows)
    # 467 differences have no variance in more directions; the rest is spread over those left.
    rest = np.sqrt(variances[COMPONENTS:].sum() / rows.shape[1])
    axes = axes[:COMPONENTS]
    scores = (rows - mean) @ axes.T
    return {"mean": mean, "axes": axes, "scores": scores, "sd": scores.std(0), "rest": rest}


def ridge(x: np.ndarray, y: np.ndarray, weight: float) -> np.ndarray:
    return np.linalg.solve(x.T @ x + weight * np.eye(x.shape[1]), x.T @ y)


def out_of_fold(x: np.ndarray, y: np.ndarray, weight: float) -> np.ndarray:
    """Return the residuals of a ridge regression, each by a fit without its fold."""
    fold = np.random.default_rng(0).permutation(len(x)) % FOLDS
    residual = np.empty_like(y)
    for number in range(FOLDS):
        held = fold == number
        residual[held] = y[held] - x[held] @ ridge(x[~held], y[~held], weight)
    return residual


def embed_things(stamps: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return `mini`'s embeddings of the 468 images, and of the caption of each."""
    import cn_clip
    from things468 import on_white, things

    embedder = cn_clip.load("mini")
    pairs = things(stamps)
    images = embedder.embed_images(on_white(path) for path, _ in pairs)
    return np.asarray(images), np.asarray(embedder.embed_texts([text for _, text in pairs]))


def fit(images: np.ndarray, texts: np.ndarray) -> dict[str, np.ndarray]:
    image, text = components(images.astype(np.float64)), components(texts.astype(np.float64))
    x, y = image["scores"], text["scores"]
    weights = 10.0 ** np.arange(-3, 3, 0.25) * np.trace(x.T @ x) / COMPONENTS
    weight = min(weights, key=lambda w: np.square(out_of_fold(x, y, w)).sum())
    residual = out_of_fold(x, y, weight)
    covariance = residual.T @ residual / len(residual)
    values, vectors = np.linalg.eigh(covariance)
    fitted = {f"image_{name}": value for name, value in image.items()}
    fitted |= {f"text_{name}": text[name] for name in ("mean", "axes", "rest")}
    fitted["slope"] = ridge(x, y, weight)
    fitted["residual"] = np.sqrt(values.clip(0))[:, None] * vectors.T  # (C, C)
    return {name: np.float16(value) for name, value in fitted.items()}


def describe(name: str, images: np.ndarray, texts: np.ndarray) -> None:
    """Print how the cosines between texts and images are distributed."""
    scores = np.sort(texts @ images.astype(np.float32).T, axis=1)[:, ::-1]
    among = images.astype(np.float32) @ images.astype(np.float32).T
    np.fill_diagonal(among, -1)
    means = np.linalg.norm(images.mean(0, np.float64) - texts.mean(0, np.float64))
    row = [scores.mean(), scores.std(), *(scores[:, at].mean() for at in (0, 9, 99))]
    row += [scores[:, 0].std(), among.mean(), among.max(1).mean(), means]
    print(f"{name:<8}" + "".join(f"{value:>10.3f}" for value in row))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", action="store_true", help="fit the parameters and write them")
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; default: download them")
    options = parser.parse_args()
    columns = "mean sd top1 top10 top100 sd(top1) img-img nearest gap".split()
    print(f"{'':<8}" + "".join(f"{name:>10}" for name in columns))
    if options.fit:
        from things468 import fetch

        with tempfile.TemporaryDirectory() as scratch:
            images, texts = embed_things(options.stamps or fetch(Path(scratch)))
        np.savez_compressed(PARAMETERS, **fit(images, texts))
        describe("real", images, texts)
    generator = Generator()
    describe("drawn", generator.images(468), generator.queries(468))
    print(f"{PARAMETERS.name}: {PARAMETERS.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
