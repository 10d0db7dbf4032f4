"""Embeddings on disk: ``.npz``, clip-retrieval's folders, and the official feature JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cn_clip.arrays import read_npy, read_npz
from cn_clip.data.sources.lines import Lines, json_object
from cn_clip.embeddings.inputs import Kind
from cn_clip.errors import DataError, UsageError
from cn_clip.files import check_plain
from cn_clip.publish import (
    begins,
    claim,
    file_by,
    folder_by,
    json_object_at,
    published,
    published_folder,
)
from cn_clip.text import valid_text

_ROWS_PER_FILE = 100_000
_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class Features:
    """Rows to write: ``ids`` and ``labels`` (a path or the text) in order, and their vectors.

    ``rows(start, end)`` returns the embeddings float32 (end - start, dim). ``about`` is stated in
    the output: the model, its fingerprint, and that the vectors are of unit length.
    """

    kind: Kind
    ids: list[str | int]
    labels: list[str]
    dim: int
    rows: Callable[[int, int], npt.NDArray[np.float32]]
    about: dict[str, Any]


def claim_features(
    out: str | Path, *, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> Path:
    """Check that embeddings may be written to ``out``; nothing is touched. Return it as a path.

    Raises:
        UsageError: see ``writer_of`` and ``publish.claim``.
    """
    inputs, suffix = list(inputs), Path(out).suffix
    writer_of(Path(out))
    if not suffix:
        return claim(out, folder_by("embed"), kind="folder", inputs=inputs, overwrite=overwrite)
    own = _is_npz if suffix == ".npz" else _is_jsonl
    path = claim(out, file_by("embed", own), inputs=inputs, overwrite=overwrite)
    if suffix == ".jsonl":
        claim(about_of(path), file_by("embed", _is_about), inputs=inputs)
    return path


def about_of(out: Path) -> Path:
    """Return where it stands what the vectors of a ``.jsonl`` are."""
    return out.with_name(f"{out.name}.about.json")


def writer_of(out: Path) -> Callable[[Features, Path], None]:
    """Return the function that writes ``out``, by its suffix: ``.npz``, ``.jsonl``, or a folder.

    Raises:
        UsageError: the suffix is of no known format, or a library for it is missing.
    """
    if out.suffix == ".npz":
        return write_npz
    if out.suffix == ".jsonl":
        return write_jsonl
    if out.suffix:
        raise UsageError(
            f"--out {out}: give .npz, .jsonl (official features), or a folder (clip-retrieval's "
            "layout)"
        )
    _parquet()
    return write_clip_retrieval


def write_npz(features: Features, out: Path) -> None:
    """Write ``embeddings`` float32 (N, D), ``ids`` (N,), and ``about`` (JSON), all or nothing."""
    ids: npt.NDArray[Any] = np.array(features.ids)
    if ids.dtype.kind == "U" or any(isinstance(each, str) for each in features.ids):
        ids = np.array([str(each) for each in features.ids], dtype=np.str_)
    about = np.array(json.dumps(features.about, ensure_ascii=False))
    with published(out) as path, path.open("wb") as stream:
        rows = features.rows(0, len(features.ids))
        np.savez(stream, embeddings=rows, ids=ids, about=about)


def write_jsonl(features: Features, out: Path) -> None:
    """Write the official ``{"image_id": ..., "feature": [...]}`` lines, or ``text_id``, and what
    they are into ``OUT.about.json``."""
    key = {"images": "image_id", "texts": "text_id"}[features.kind]
    with published(about_of(out)) as path:  # first: it is what tells that OUT is ours
        _write_about(features, path)
    with published(out) as path, path.open("w", encoding="utf-8") as stream:
        for start, end in _spans(len(features.ids), 1000):
            rows = features.rows(start, end).tolist()
            for name, row in zip(features.ids[start:end], rows, strict=True):
                stream.write(json.dumps({key: name, "feature": row}, ensure_ascii=False) + "\n")


def write_clip_retrieval(features: Features, out: Path) -> None:
    """Write ``img_emb/img_emb_0.npy`` (or ``text_emb/...``) and ``metadata/metadata_0.parquet``
    beside ``about.json``, a pair of files for every 100,000 rows, all or nothing."""
    arrow, parquet = _parquet()
    stem, column = {
        "images": ("img_emb", "image_path"),
        "texts": ("text_emb", "caption"),
    }[features.kind]
    with published_folder(out, "embed") as folder:
        (folder / stem).mkdir()
        (folder / "metadata").mkdir()
        for part, (start, end) in enumerate(_spans(len(features.ids), _ROWS_PER_FILE)):
            np.save(folder / stem / f"{stem}_{part}.npy", features.rows(start, end))
            table = {
                "id": [str(each) for each in features.ids[start:end]],
                column: features.labels[start:end],
            }
            parquet.write_table(
                arrow.table(table), folder / "metadata" / f"metadata_{part}.parquet"
            )
        _write_about(features, folder / "about.json")


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows read back: ``ids`` as strings, each once, and their ``vectors`` float32 (N, D)."""

    path: Path
    ids: list[str]
    vectors: npt.NDArray[np.float32]


def read_features(path: Path, kind: Kind) -> Stored:
    """Read what ``write_npz``, ``write_jsonl`` or ``write_clip_retrieval`` wrote, or the official
    package, or clip-retrieval itself.

    Args:
        path: ``.npz``, ``.jsonl``, or a folder with ``img_emb`` or ``text_emb``, and ``metadata``.
        kind: what the rows should be of.

    Raises:
        UsageError: the format is not known, or a library for it is missing.
        DataError: the rows are of the other kind, of different widths or not finite, an id is
            repeated, or the file is damaged; the row is named.
    """
    if not path.exists():
        raise UsageError(f"no features at {path}; make them with: cn-clip embed {kind}")
    if path.suffix == ".jsonl":
        stored = _read_jsonl(path, kind)
    elif path.suffix == ".npz":
        stored = _read_npz(path, kind)
    elif path.is_dir():
        label = {"images": "image_path", "texts": "caption"}[kind]
        stored = _read_clip_retrieval(path, kind, ("id", "key", label))
    else:
        raise UsageError(
            f"{path}: give .npz, .jsonl (official features), or a folder (clip-retrieval's layout)"
        )
    return _checked(stored)


def read_captions(path: Path) -> Stored:
    """Read texts with their embeddings from a folder in clip-retrieval's layout; their ids are the
    texts themselves, of the column ``caption``. If a text stands there twice, the first counts.

    Raises:
        UsageError: there is no such folder, or a library for it is missing.
        DataError: see ``read_features``.
    """
    if not path.is_dir():
        raise UsageError(
            f"no folder {path}; make it with: cn-clip embed texts --out {path}, without a suffix"
        )
    stored = _read_clip_retrieval(path, "texts", ("caption",))
    if len(stored.ids) == len(stored.vectors):
        first = {text: row for row, text in reversed([*enumerate(stored.ids)])}
        rows = sorted(first.values())
        stored = Stored(path, [stored.ids[row] for row in rows], stored.vectors[rows])
    return _checked(stored)


def _checked(stored: Stored) -> Stored:
    path = stored.path
    # Whatever the format held: half an emoji can be written to no other file.
    stored = Stored(path, [valid_text(each) for each in stored.ids], stored.vectors)
    if not stored.ids:
        raise DataError(f"{path} holds no features")
    if len(stored.ids) != len(stored.vectors):
        raise DataError(
            f"{path} holds {len(stored.ids)} ids, but {len(stored.vectors)} vectors; embed anew"
        )
    strange = np.flatnonzero(~np.isfinite(stored.vectors).all(axis=1))
    if len(strange):
        raise DataError(
            f"{path}: the vector of {stored.ids[strange[0]]!r} holds NaN or infinity, as do "
            f"{len(strange)} in all; embed anew, in float32"
        )
    seen: set[str] = set()
    for each in stored.ids:
        if each in seen:
            raise DataError(f"{path}: the id {each!r} stands there twice; keep one of them")
        seen.add(each)
    return stored


def _read_npz(path: Path, kind: Kind) -> Stored:
    what = "an .npz with embeddings and ids, as cn-clip embed writes it"
    found = read_npz(path, ("embeddings", "ids"), optional=("about",), what=what)
    about: dict[str, Any] = {}
    try:
        ids = [str(each) for each in found["ids"].reshape(-1).tolist()]
        text = str(found["about"]) if "about" in found else None
    except ValueError:  # numbers of characters that there are none of
        raise DataError(
            f"{path}: its ids or its description (about) are no text; embed anew"
        ) from None
    if text is not None:
        about = json_object(text, f"{path}: about")
    if about.get("kind", kind) != kind:
        raise DataError(f"{path} holds {about['kind']}, not {kind}")
    if found["ids"].ndim != 1:
        raise DataError(f"{path}: ids have the shape {found['ids'].shape}; expected (N,)")
    return Stored(path, ids, _vectors(found["embeddings"], path))


def _vectors(given: npt.NDArray[Any], path: Path) -> npt.NDArray[np.float32]:
    """Return what was read as vectors, float32 (N, D), if it can be that."""
    if given.ndim != 2 or given.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: embeddings have the shape {given.shape} of {given.dtype}; expected numbers "
            "of shape (N, D)"
        )
    with np.errstate(over="ignore"):  # what is infinite then is refused by its id
        return given.astype(np.float32)


def _read_jsonl(path: Path, kind: Kind) -> Stored:
    key = {"images": "image_id", "texts": "text_id"}[kind]
    lines = Lines(path)
    ids: list[str] = []
    rows: list[npt.NDArray[np.float32]] = []
    for number in range(len(lines)):
        where = lines.where(number)
        values = json_object(lines[number], where)
        if key not in values or "feature" not in values:
            raise DataError(f'{where}: expected {{"{key}": 1, "feature": [0.1, ...]}}')
        try:
            with np.errstate(over="ignore"):  # infinity is refused by its id
                row = np.array(values["feature"], np.float32)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{where}: its feature is not a list of numbers") from None
        if row.ndim != 1 or (rows and len(row) != len(rows[0])):
            expected = f"{len(rows[0])} numbers as above" if rows else "a list of numbers"
            raise DataError(f"{where}: its feature has the shape {row.shape}; expected {expected}")
        ids.append(str(values[key]))
        rows.append(row)
    return Stored(path, ids, np.stack(rows) if rows else np.empty((0, 0), np.float32))


def _read_clip_retrieval(path: Path, kind: Kind, columns: Sequence[str]) -> Stored:
    _parquet()
    stem = {"images": "img_emb", "texts": "text_emb"}[kind]
    vectors = sorted((path / stem).glob("*.npy"), key=_part)
    tables = sorted((path / "metadata").glob("*.parquet"), key=_part)
    if not vectors or len(vectors) != len(tables):
        raise DataError(
            f"{path} holds {len(vectors)} files in {stem} and {len(tables)} in metadata; expected "
            "as many of both, as clip-retrieval writes them"
        )
    ids = [each for table in tables for each in _column(table, columns)]
    parts = [_vectors(read_npy(file), file) for file in vectors]
    if len({part.shape[1] for part in parts}) > 1:
        raise DataError(f"{path / stem}: the files hold vectors of different widths; embed anew")
    return Stored(path, ids, np.concatenate(parts))


def _column(table: Path, columns: Sequence[str]) -> list[str]:
    """Read the first of some columns that a Parquet file has, as strings."""
    _, parquet = _parquet()
    try:
        check_plain(table)
        names = parquet.read_schema(table).names
        column = next((each for each in columns if each in names), None)
        values: list[Any] = []
        if column is not None:
            values = parquet.read_table(table, columns=[column])[column].to_pylist()
        ids = [str(each) for each in values]
    # pyarrow raises many kinds on damaged files: OSError, ArrowInvalid, KeyError, TypeError, ...
    except Exception as error:
        raise DataError(
            f"{table} is not Parquet ({error}); embed anew, or fetch the file again"
        ) from None
    if column is None:
        raise DataError(f"{table} has no column {' or '.join(columns)}; its rows have no ids")
    return ids


def _part(path: Path) -> tuple[int, str]:
    """Sort ``img_emb_10`` after ``img_emb_9``."""
    digits = path.stem.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else -1), path.stem


def _spans(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, max(1, count), size):
        yield start, min(count, start + size)


def _is_npz(path: Path) -> bool:
    """Tell whether a file begins and ends as what ``write_npz`` writes."""
    with path.open("rb") as stream:
        head = stream.read(64)
        stream.seek(-min(512, path.stat().st_size), 2)
        tail = stream.read()
    first = head.startswith(b"PK") and b"embeddings.npy" in head
    return first and b"ids.npy" in tail and b"about.npy" in tail


def _is_jsonl(path: Path) -> bool:
    lines = begins(b'{"image_id": ', b'{"text_id": ')
    return lines(path) and _is_about(about_of(path))


def _is_about(path: Path) -> bool:
    return {"model", "kind", "dim"} <= json_object_at(path).keys()


def _write_about(features: Features, path: Path) -> None:
    text = json.dumps(features.about, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def _parquet() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError(
            "clip-retrieval's layout needs pyarrow: pip install pyarrow, or give --out X.npz"
        ) from None
