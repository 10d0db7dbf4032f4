"""stub"""

import numpy as np

Query = str


def parse_query(q):
    return q


def embed_query(embedder, query, images=(), vectors=()):
    parts = []
    if query:
        parts.append(embedder.embed_texts(query))
    if len(images):
        parts.append(embedder.embed_images(list(images)))
    if len(vectors):
        parts.append(np.asarray(vectors))
    v = np.concatenate(parts).sum(0)
    return (v / np.linalg.norm(v)).astype(np.float32)
