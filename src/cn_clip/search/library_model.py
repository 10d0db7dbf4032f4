"""The model of a library: loaded for a search or an index run, and checked against its vectors."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cn_clip.backends.exported import is_export
from cn_clip.config import BackendName, Precision
from cn_clip.embedder import Embedder, exported_model, load
from cn_clip.errors import CNClipError, LibraryError
from cn_clip.image.decode import read_file
from cn_clip.outputs import json_object_at
from cn_clip.publish import write_text
from cn_clip.search.folder import CACHE, LibraryFolder, StoredModel
from cn_clip.text import path_text
from cn_clip.translation import _

_SAMPLE = 8  # images embedded again to check another precision or runtime
MIN_COSINE = 0.98  # between the stored vector and that of a derived model, for each of them
_VERIFIED = "verified.json"


def load_for(
    library: LibraryFolder,
    model: StoredModel,
    *,
    name: str | None = None,
    backend: BackendName = "auto",
    device: str = "auto",
    precision: Precision = "auto",
) -> Embedder:
    """Load the model of a library, and check that it is the same.

    Args:
        library: the library.
        model: the active model.
        name: of another model, such as an export of the same one; by default that of the library.
        backend: as ``load``; ``"auto"`` prefers an export of the model that was made with
            ``cn-clip export``, which starts faster.
        device, precision: as ``load``.

    Raises:
        LibraryError: it is another model.
    """
    given = name or model.name
    if backend == "auto" and device == "auto" and precision == "auto":
        given = os.fspath(exported_model(given) or given)
    embedder = load(
        given,
        backend=backend,
        device=device,
        precision=precision,
        fast_decode=model.fast_decode and not is_export(Path(given)),
    )
    check_same(library, model, embedder)
    return embedder


def same_origin(model: StoredModel, embedder: Embedder) -> bool:
    """Return whether a model is that of the library, in any precision and on any runtime."""
    originals = {model.fingerprint, model.derived_from} - {None}
    return bool(originals & {embedder.fingerprint, embedder.derived_from})


def check_same(library: LibraryFolder, model: StoredModel, embedder: Embedder) -> None:
    """Check that a model is that of the library, or another precision or runtime of it.

    The latter embeds a few images of the library again; the result is kept in the library's cache.

    Raises:
        LibraryError: it is another model, or its embeddings differ.
    """
    if embedder.fingerprint == model.fingerprint:
        return
    if not same_origin(model, embedder):
        raise LibraryError(
            _(
                "{library} was made with the model {stored} ({stored_fingerprint:.8}), and this is "
                "{name} ({fingerprint:.8}); embed its images with the new model: cn-clip index "
                "--model {name}",
                library=path_text(library.path),
                stored=model.name,
                stored_fingerprint=model.fingerprint,
                name=embedder.name,
                fingerprint=embedder.fingerprint,
            )
        )
    record = library.path / CACHE / _VERIFIED
    key = f"{model.id} {embedder.fingerprint}"
    known = json_object_at(record)
    if isinstance(known.get(key), float) and known[key] >= MIN_COSINE:
        return
    cosines = _sample_cosines(library, model, embedder)
    if not len(cosines):  # no file at hand; the fingerprints agree
        return
    lowest = float(cosines.min())
    if lowest < MIN_COSINE:
        raise LibraryError(
            _(
                "{name} on this runtime gives other embeddings than those of {library}: cosines "
                "down to {lowest:.3f}, below {limit}; give --backend torch, or export it again",
                name=embedder.name,
                library=path_text(library.path),
                lowest=lowest,
                limit=MIN_COSINE,
            )
        )
    with suppress(OSError, CNClipError):  # a read-only library is verified each time
        record.parent.mkdir(exist_ok=True)
        write_text(record, json.dumps(known | {key: lowest}))


def _sample_cosines(
    library: LibraryFolder, model: StoredModel, embedder: Embedder
) -> npt.NDArray[np.float32]:
    """Embed a few images again; return their cosines with the stored vectors."""
    rows = library.query(
        "SELECT files.image, roots.location, files.name FROM files JOIN roots "
        "ON roots.id = files.root WHERE roots.kind = 'folder' AND files.present "
        "AND files.image BETWEEN 1 AND ? AND files.image NOT IN "
        "(SELECT image FROM missing WHERE model = ?) GROUP BY files.image LIMIT ?",
        (model.rows, model.id, 4 * _SAMPLE),
    )
    images, contents = [], []
    for image, location, name in rows:
        with suppress(CNClipError, OSError):
            contents.append(read_file(os.fsdecode(os.path.join(location, name))))
            images.append(image)
        if len(images) == _SAMPLE:
            break
    if not images:
        return np.empty(0, np.float32)
    vectors, errors = embedder.embed_readable(contents)
    kept = [image for index, image in enumerate(images) if index not in errors]
    stored = library.vector_file(model).open(model.rows)[np.array(kept, np.int64) - 1]
    cosines: npt.NDArray[np.float32] = (vectors * stored.astype(np.float32)).sum(axis=1)
    return cosines
