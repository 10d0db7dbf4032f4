"""Images of a library that look alike."""

import shutil

from conftest import TINY, make_image, make_model

from cn_clip.embedder import Embedder
from cn_clip.search.duplicates import duplicates
from cn_clip.search.folder import LibraryFolder, create
from cn_clip.search.roots import parse_root
from cn_clip.search.updating import update


def test_copies_and_resized_images_are_grouped_and_others_are_not(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(6):
        make_image(seed, (320, 240)).save(photos / f"{seed}.png")
    make_image(1, (320, 240)).resize((160, 120)).save(photos / "small.jpg")
    make_image(1, (320, 240)).save(photos / "recompressed.jpg", quality=60)
    shutil.copy(photos / "4.png", photos / "copy.png")
    create(tmp_path / "library")
    with LibraryFolder(tmp_path / "library", writable=True) as library:
        with library.writing("index"):
            update(
                library,
                [parse_root(str(photos))],
                lambda name: Embedder.from_model(make_model(TINY["vit"])),
            )
        groups = [
            [sorted(path.rpartition("/")[2] for path in each.paths) for each in group]
            for group in duplicates(library).groups
        ]
    assert sorted(groups, key=len) == [
        [["4.png", "copy.png"]],
        [*sorted([["1.png"], ["recompressed.jpg"]]), ["small.jpg"]],
    ]
