"""HTML report of a diagnosis, with an unpaired and a deleted image."""

import json

import numpy as np
from conftest import make_image

from cn_clip.data.sources.open import open_source
from cn_clip.eval.dataset import EvalSet
from cn_clip.eval.diagnosis.measure import diagnose
from cn_clip.eval.diagnosis.report import write_diagnosis
from cn_clip.eval.images import EmbeddedImages


def test_a_hub_without_a_caption_and_a_deleted_image_are_shown(tmp_path):
    rows = []
    for n in range(3):
        make_image(n, (40, 40)).save(tmp_path / f"{n}.png")
        rows.append({"image": f"{n}.png", "text": f"第{n}张"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = open_source(f"jsonl:{path}")
    pairs = np.array([[0, 0], [1, 1]])  # the last image is unpaired
    data = EvalSet([source], [(0, 0), (0, 1), (0, 2)], ["第0张", "第1张"], pairs)
    vectors = np.eye(3, dtype=np.float32)
    texts = np.array([[0.6, 0, 0.8], [0, 0.6, 0.8]], np.float32)  # both closest to the last
    (tmp_path / "1.png").unlink()
    found = diagnose("m", vectors, texts, data.texts, pairs)
    assert found.hubs.counts.tolist() == [2, 2, 2]
    write_diagnosis(
        tmp_path / "out.html", "pairs", data, EmbeddedImages(np.arange(3), vectors, pairs), [found]
    )
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "(without a caption)" in html
    assert "rank 2" in html
    assert 'src=""' in html  # a deleted image leaves an empty figure
