"""Every kind of source, read by workers however they are started."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
from data.formats import IMAGES, PAIRS, WRITERS, read_pair

import cn_clip
from cn_clip.data.loading.loader import Loader, Preparation
from cn_clip.data.sources.open import SOURCE_OPTIONS, open_mix
from cn_clip.image.decode import read_image, to_pixels

# From Python 3.14 on, Linux starts with forkserver what it started with fork before.
METHODS = sorted(multiprocessing.get_all_start_methods())

# The folder of images holds the LMDB and the tables too.
pytestmark = pytest.mark.filterwarnings("ignore:.* skipped, not of a supported")


@pytest.fixture
def mix(pictures):
    """The four pairs as a source of every kind, in the order of ``SOURCE_OPTIONS``."""
    for image_id in IMAGES:
        lines = [text for name, _, text in PAIRS if name == image_id]
        (pictures / f"{image_id}.txt").write_text("\n".join(lines), encoding="utf-8")
    writers = {"folder": lambda pictures: f"folder:{pictures}", **WRITERS}
    return open_mix([writers[kind](pictures) for kind in SOURCE_OPTIONS])


def read(mix, workers):
    """Return what an epoch holds: (number of the source, pixels, image id, text), sorted."""
    loader = Loader(mix, Preparation(resolution=32), 4, seed=1, workers=workers)
    found = []
    for batch in loader.batches(0):
        assert not batch.skipped
        for row, pixels in zip(batch.rows, batch.pixels.numpy(), strict=True):
            found.append((row.image_id, row.text, pixels.tobytes()))
    return sorted(found)


@pytest.fixture
def start_method():
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_forkserver_preload(
        ["cn_clip.data.loading.loader"]
    )  # torch once, not per worker
    yield lambda method: multiprocessing.set_start_method(method, force=True)
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("method", METHODS, ids=[f"{m}-lmdb{lmdb.__version__}" for m in METHODS])
def test_workers_of_every_start_method_read_every_source(method, mix, start_method):
    """One loader over all sources, as starting workers anew for each would take minutes. They are
    read in this process first: what that leaves open must not hinder the workers.
    """
    start_method(method)
    expected = []
    for image_id, _, text in PAIRS:
        pixels = np.moveaxis(to_pixels(read_image(IMAGES[image_id]), 32), -1, 0).tobytes()
        expected += [(image_id, text, pixels)] * len(SOURCE_OPTIONS)
    assert read(mix, workers=0) == sorted(expected)
    assert read(mix, workers=2) == sorted(expected)
    assert read(mix, workers=0) == sorted(expected)


def test_a_source_is_pickled_without_its_open_files(mix):
    for part in mix:
        pickled = pickle.dumps(part.source)
        assert len(pickled) < 4000, part.source.name
        again = pickle.loads(pickled)
        for index in range(len(part.source)):
            assert read_pair(again, index) == read_pair(part.source, index)


@pytest.mark.full
@pytest.mark.parametrize("version", ["1.4.1", "1.8.1", "2.3.0", "3.0.0"])
def test_workers_read_lmdb_with_every_version_of_its_library(version, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path]
    subprocess.run([*pip, f"lmdb=={version}"], check=True)
    tests = Path(__file__).parent
    paths = [tmp_path, Path(cn_clip.__file__).parents[1]]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", __file__, tests / "test_lmdb.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    assert f"fork-lmdb{version}] PASSED" in ran.stdout
