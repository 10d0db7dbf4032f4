"""What int8 costs `mini` on the 468 things: cosine, recall, and top-10 overlap with the original.

    python benchmarks/precisions.py                 # downloads the Debian package of the stamps
    python benchmarks/precisions.py --stamps DIR    # .../share/tuxpaint/stamps, already unpacked

Calibrated on the sample in the package, never on the stamps. For speed see
`cn-clip export --max-recall-drop`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from things468 import fetch, on_white, things

import cn_clip
from cn_clip.eval.metrics.recall import retrieval
from cn_clip.export import export
from cn_clip.topk import top_k

RUNS = (("onnx", "auto"), ("openvino", "auto"), ("openvino", "bfloat16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stamps", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = things(given.stamps or fetch(folder))
        captions = list(dict.fromkeys(caption for _, caption in rows))
        pairs = np.array([(n, captions.index(caption)) for n, (_, caption) in enumerate(rows)])
        original = cn_clip.load("mini", backend="torch")
        prepared = [original.prepare_image(on_white(path)) for path, _ in rows]

        def embed(embedder: cn_clip.Embedder) -> tuple[np.ndarray, np.ndarray]:
            batches = [prepared[n : n + 16] for n in range(0, len(prepared), 16)]
            images = np.concatenate([embedder.embed_prepared_images(batch) for batch in batches])
            return images, embedder.embed_texts(captions)

        images, texts = embed(original)
        recall = 100 * retrieval(images, texts, pairs).mean_recall
        best = top_k(texts, images, 10).indexes
        print(f"float32: mean recall {recall:.2f}")
        for runtime, precision in RUNS:
            if not (folder / runtime).exists():
                export("mini", folder / runtime, to=runtime, precision="int8")
            embedder = cn_clip.load(folder / runtime, backend=runtime, precision=precision)
            ours = embed(embedder)
            image, text = ((a * b).sum(axis=1) for a, b in zip(ours, (images, texts), strict=True))
            change = 100 * retrieval(*ours, pairs).mean_recall - recall
            same = top_k(ours[1], ours[0], 10).indexes
            shared = [len(np.intersect1d(a, b)) for a, b in zip(best, same, strict=True)]
            print(
                f"{runtime} {embedder.backend.precision}: image cosine {image.min():.3f} (mean "
                f"{image.mean():.4f}), text {text.min():.3f} ({text.mean():.4f}), mean recall "
                f"{change:+.2f}, top-10 overlap {np.mean(shared) / 10:.3f}"
            )


if __name__ == "__main__":
    main()
