"""Libraries of generated images and tiny models."""

import os
from functools import cache
from pathlib import Path

import numpy as np
from conftest import TINY, encoded, make_image, make_model

from cn_clip.embedder import Embedder
from cn_clip.search.folder import LibraryFolder
from cn_clip.search.updating import open_for_update, roots_to_update, update


@cache
def embedder(name: str = "tiny") -> Embedder:
    """A tiny model; models of other names have other weights."""
    return Embedder.from_model(make_model(TINY["vit"], sum(name.encode())))


@cache
def jpeg(number: int) -> bytes:
    return encoded(make_image(number, (48, 40)), "JPEG")


def photos(folder: Path, numbers) -> Path:
    """Write image files named by their numbers; their contents differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return folder


def index(library: Path, *sources, model: str = "tiny", globs=None, **options):
    """Run what ``cn-clip index`` runs; return its ``Update``."""
    with open_for_update(library, [str(source) for source in sources]) as folder:
        roots = roots_to_update(folder, [str(source) for source in sources], **(globs or {}))
        with folder.writing("index"):
            return update(folder, roots, embedder, model=model, **options)


def opened(library: Path, *, writable: bool = False) -> LibraryFolder:
    return LibraryFolder(library, writable=writable)


def vectors_of(library: Path) -> dict[bytes, np.ndarray]:
    """The vectors of searchable images by the digests of their contents."""
    with opened(library) as folder:
        snapshot = folder.snapshot()
        rows = folder.query("SELECT digest, id FROM images")
        shown = snapshot.searchable
        return {
            bytes(digest): np.array(snapshot.vectors[image - 1])
            for digest, image in rows
            if image <= len(snapshot.vectors) and (shown is None or shown[image - 1])
        }


def found_files(library: Path) -> dict[str, int]:
    """The image of each present file, by the path below its root."""
    with opened(library) as folder:
        return {
            os.fsdecode(name): image
            for name, image in folder.query(
                "SELECT name, image FROM files WHERE present AND image IS NOT NULL"
            )
        }


def problems(library: Path, **options) -> list[str]:
    """What ``cn-clip library verify`` finds."""
    from cn_clip.search.verify import verify

    with opened(library) as folder:
        return [problem.text for problem in verify(folder, **options).problems]


def same(one: dict[bytes, np.ndarray], other: dict[bytes, np.ndarray]) -> bool:
    """Whether two libraries have the same images with the same vectors, up to float16."""
    return one.keys() == other.keys() and all(
        np.allclose(np.float32(one[key]), np.float32(other[key]), atol=2e-3) for key in one
    )
