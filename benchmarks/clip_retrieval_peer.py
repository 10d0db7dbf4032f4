"""clip-retrieval's own pipeline around a traced image tower, for ``benchmarks/bulk.py engines``.

    PYTHON benchmarks/clip_retrieval_peer.py TOWER.pt RESOLUTION PHOTOS OUT

PYTHON has clip-retrieval. Reader, transform, loop, writer and logger are its own, as are its
defaults except for two reading processes; only the weights, which it would download, are given. It
prints the seconds from the loaded model to the last file.
"""

from __future__ import annotations

import sys
import time

import torch
from clip_retrieval.clip_inference import mapper, worker
from open_clip.transform import image_transform

READERS = 2
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Model:
    """A model of which only the images are encoded."""

    def __init__(self, path: str) -> None:
        self.encode_image = torch.jit.load(path)
        self.encode_text = None


def main(tower: str, resolution: str, photos: str, out: str) -> None:
    start = 0.0

    def load_clip(**options: object) -> tuple[Model, object, None]:
        nonlocal start
        transform = image_transform(int(resolution), is_train=False, mean=MEAN, std=STD)
        model = Model(tower)
        start = time.perf_counter()
        return model, transform, None

    mapper.load_clip = worker.load_clip = load_clip
    worker.worker([0], photos, out, 1, num_prepro_workers=READERS, enable_text=False, use_jit=False)
    print("seconds", time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
