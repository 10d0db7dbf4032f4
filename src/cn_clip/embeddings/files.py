"""Embedding files: ``.npz``, clip-retrieval's folders, and the official feature JSONL."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from cn_clip.arrays import read_npy, read_npz
from cn_clip.data.sources.lines import Lines, json_object
from cn_clip.embeddings.inputs import Kind
from cn_clip.errors import DataError, UsageError
from cn_clip.files import as_path, check_regular
from cn_clip.format_version import FIELD, Format
from cn_clip.outputs import atomic_folder, claim, json_object_at, own_file, own_folder, starts_with
from cn_clip.publish import atomic_file
from cn_clip.text import path_text, valid_text
from cn_clip.translation import _, translate

EMBEDDINGS = Format("embeddings", 1)  # of the metadata
_ROWS_PER_FILE = 100_000


@dataclass(frozen=True, slots=True)
class EmbeddingsToWrite:
    """N embeddings to write.

    Attributes:
        kind: of the items.
        ids: (N,) in order.
        labels: (N,) the path of an image, or the text.
        dim: width of an embedding.
        rows: ``rows(start, end)`` returns the embeddings, float32 (end - start, dim).
        about: metadata written to the output: model, fingerprint, whether normalised.
        columns: more columns (N,) of clip-retrieval's metadata. Slices of these, of ids and of
            labels are lists.
    """

    kind: Kind
    ids: Sequence[str | int]
    labels: Sequence[str]
    dim: int
    rows: Callable[[int, int], npt.NDArray[np.float32]]
    about: dict[str, Any]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def claim_embeddings(
    out: str | Path,
    *,
    command: str = "embed",
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> Path:
    """Check that embeddings may be written to ``out``, without touching it. Return it as a path.

    Raises:
        UsageError: see ``writer_for`` and ``outputs.claim``.
    """
    inputs, suffix = list(inputs), Path(out).suffix
    writer_for(Path(out))
    if not suffix:
        return claim(out, own_folder(command), kind="folder", inputs=inputs, overwrite=overwrite)
    own = _is_npz if suffix == ".npz" else _is_jsonl
    path = claim(out, own_file(command, own), inputs=inputs, overwrite=overwrite)
    if suffix == ".jsonl":
        claim(about_path(path), own_file(command, _is_about), inputs=inputs)
    return path


def about_path(out: Path) -> Path:
    """Return the path of the metadata of a ``.jsonl`` file."""
    return out.with_name(f"{out.name}.about.json")


def writer_for(out: Path) -> Callable[[EmbeddingsToWrite, Path], None]:
    """Return the function that writes ``out``, by its suffix: ``.npz``, ``.jsonl``, or a folder.

    Raises:
        UsageError: the suffix is unknown, or a library for the format is missing.
    """
    if out.suffix == ".npz":
        return write_npz
    if out.suffix == ".jsonl":
        return write_jsonl
    if out.suffix:
        raise UsageError(
            _(
                "--out {out}: give .npz, .jsonl (official features), or a folder "
                "(clip-retrieval's layout)",
                out=out,
            )
        )
    _parquet()
    return write_clip_retrieval


def write_npz(embeddings: EmbeddingsToWrite, out: Path) -> None:
    """Write ``embeddings`` float32 (N, D), ``ids`` (N,), and ``about`` (JSON), atomically."""
    listed = embeddings.ids[:]
    ids: npt.NDArray[Any] = np.array(listed)
    if ids.dtype.kind == "U" or any(isinstance(id, str) for id in listed):
        ids = np.array([str(id) for id in listed], dtype=np.str_)
    about = np.array(json.dumps(with_format(embeddings.about), ensure_ascii=False))
    with atomic_file(out) as path, path.open("wb") as stream:
        rows = embeddings.rows(0, len(embeddings.ids))
        np.savez(stream, embeddings=rows, ids=ids, about=about)


def write_jsonl(embeddings: EmbeddingsToWrite, out: Path) -> None:
    """Write the official lines ``{"image_id": ..., "feature": [...]}``, or ``text_id``, and the
    metadata to ``OUT.about.json``."""
    key = {"images": "image_id", "texts": "text_id"}[embeddings.kind]
    with atomic_file(about_path(out)) as path:  # first: it identifies OUT as ours
        _write_about(embeddings, path)
    with atomic_file(out) as path, path.open("w", encoding="utf-8") as stream:
        for start, end in _spans(len(embeddings.ids), 1000):
            rows = embeddings.rows(start, end).tolist()
            for name, row in zip(embeddings.ids[start:end], rows, strict=True):
                stream.write(json.dumps({key: name, "feature": row}, ensure_ascii=False) + "\n")


def write_clip_retrieval(
    embeddings: EmbeddingsToWrite, out: Path, *, command: str = "embed"
) -> None:
    """Write ``img_emb/img_emb_0.npy`` (or ``text_emb/...``), ``metadata/metadata_0.parquet`` and
    ``about.json``, atomically; one pair of files per 100,000 rows."""
    arrow, parquet = _parquet()
    stem, column = {
        "images": ("img_emb", "image_path"),
        "texts": ("text_emb", "caption"),
    }[embeddings.kind]
    with atomic_folder(out, command) as folder:
        (folder / stem).mkdir()
        (folder / "metadata").mkdir()
        for part, (start, end) in enumerate(_spans(len(embeddings.ids), _ROWS_PER_FILE)):
            np.save(folder / stem / f"{stem}_{part}.npy", embeddings.rows(start, end))
            table = {
                "id": [str(id) for id in embeddings.ids[start:end]],
                column: embeddings.labels[start:end],
            } | {name: values[start:end] for name, values in embeddings.columns.items()}
            parquet.write_table(
                arrow.table(table), folder / "metadata" / f"metadata_{part}.parquet"
            )
        _write_about(embeddings, folder / "about.json")


def with_format(about: dict[str, Any]) -> dict[str, Any]:
    """Return metadata with its format version first."""
    return {FIELD: str(EMBEDDINGS)} | about


def check_format(about: dict[str, Any], path: Path) -> None:
    """Raise a ``DataError`` for metadata of a newer version."""
    EMBEDDINGS.check(about.get(FIELD), path, DataError, _("embed again"))


@dataclass(frozen=True, slots=True)
class EmbeddingsFile:
    """A file of embeddings.

    Attributes:
        kind: ``"images"`` or ``"texts"``.
        ids: N unique ids, as strings.
        vectors: float32 (N, D).
        about: how they were made: model, fingerprint, whether normalised, ``logit_scale``. Empty
            for files of other programs.
    """

    kind: Kind
    ids: list[str]
    vectors: npt.NDArray[np.float32]
    about: dict[str, Any]


def read(path: str | os.PathLike[str]) -> EmbeddingsFile:
    """Read embeddings of ``cn-clip embed``, the official package or clip-retrieval.

    Args:
        path: ``.npz``, ``.jsonl``, or a folder with ``img_emb`` or ``text_emb``, and ``metadata``.

    Raises:
        UsageError: there is no such file, or a library for its format is missing.
        DataError: the file is damaged, or of another format.
    """
    file = as_path(path)
    about = about_of(file) if file.exists() else {}
    stated = about.get("kind")
    kind = cast(Kind, stated) if stated in get_args(Kind) else _kind_of(file)
    stored = read_embeddings(file, kind)
    return EmbeddingsFile(kind, stored.ids, stored.vectors, about)


def _kind_of(path: Path) -> Kind:
    """Return the kind of embeddings without metadata."""
    if path.suffix == ".jsonl" and path.is_file():
        lines = Lines(path)
        first = json_object(lines[0], lines.where(0)) if len(lines) else {}
        return "texts" if "text_id" in first else "images"
    return "texts" if (path / "text_emb").is_dir() else "images"


@dataclass(frozen=True, slots=True)
class StoredEmbeddings:
    """Embeddings read from ``path``: unique ``ids`` (N,), and ``vectors`` float32 (N, D)."""

    path: Path
    ids: list[str]
    vectors: npt.NDArray[np.float32]


def read_embeddings(path: Path, kind: Kind) -> StoredEmbeddings:
    """Read embeddings written by this module, the official package or clip-retrieval.

    Args:
        path: ``.npz``, ``.jsonl``, or a folder with ``img_emb`` or ``text_emb``, and ``metadata``.
        kind: the expected kind.

    Raises:
        UsageError: the format is unknown, or a library for it is missing.
        DataError: the rows are of the other kind, of different widths or not finite, an id is
            repeated, or the file is damaged or of a newer version.
    """
    if not path.exists():
        raise UsageError(
            _("no embeddings at {path}; make them with: cn-clip embed {kind}", path=path, kind=kind)
        )
    if path.suffix == ".jsonl":
        stored = _read_jsonl(path, kind)
    elif path.suffix == ".npz":
        stored = _read_npz(path, kind)
    elif path.is_dir():
        label = {"images": "image_path", "texts": "caption"}[kind]
        stored = _read_clip_retrieval(path, kind, ("id", "key", label))
    else:
        raise UsageError(
            _(
                "{path}: give .npz, .jsonl (official features), or a clip-retrieval folder",
                path=path,
            )
        )
    return _checked(stored)


def about_of(path: Path) -> dict[str, Any]:
    """Return the metadata of embeddings that ``read_embeddings`` accepts; empty without any."""
    if path.suffix == ".npz":
        arrays = read_npz(path, (), optional=("about",))
        return json_object(str(arrays["about"]), path_text(path)) if "about" in arrays else {}
    return json_object_at(about_path(path) if path.suffix else path / "about.json")


def read_captions(path: Path) -> StoredEmbeddings:
    """Read the text embeddings of a folder in clip-retrieval's layout, with the texts (column
    ``caption``) as ids. Of a repeated text the first row is kept.

    Raises:
        UsageError: the folder does not exist, or a library for it is missing.
        DataError: see ``read_embeddings``.
    """
    if not path.is_dir():
        raise UsageError(
            _(
                "no folder {path}; make it with: cn-clip embed texts --out {path}, without a "
                "suffix",
                path=path,
            )
        )
    stored = _read_clip_retrieval(path, "texts", ("caption",))
    if len(stored.ids) == len(stored.vectors):
        first = {text: row for row, text in reversed([*enumerate(stored.ids)])}
        rows = sorted(first.values())
        stored = StoredEmbeddings(path, [stored.ids[row] for row in rows], stored.vectors[rows])
    return _checked(stored)


def _checked(stored: StoredEmbeddings) -> StoredEmbeddings:
    path = stored.path
    # No lone surrogates: they cannot be written to any other file.
    stored = StoredEmbeddings(path, [valid_text(id) for id in stored.ids], stored.vectors)
    if not stored.ids:
        raise DataError(_("{path} holds no embeddings", path=path))
    if len(stored.ids) != len(stored.vectors):
        raise DataError(
            _(
                "{path} holds {id_count} ids, but {vector_count} vectors; embed again",
                path=path,
                id_count=len(stored.ids),
                vector_count=len(stored.vectors),
            )
        )
    not_finite = np.flatnonzero(~np.isfinite(stored.vectors).all(axis=1))
    if len(not_finite):
        raise DataError(
            _(
                "{path}: the vector of {id!r} holds NaN or infinity, as do {count} in total; "
                "embed again, in float32",
                path=path,
                id=stored.ids[not_finite[0]],
                count=len(not_finite),
            )
        )
    seen: set[str] = set()
    for id in stored.ids:
        if id in seen:
            raise DataError(
                _("{path}: the id {id!r} is repeated; keep one of them", path=path, id=id)
            )
        seen.add(id)
    return stored


def _read_npz(path: Path, kind: Kind) -> StoredEmbeddings:
    description = _("an .npz with embeddings and ids, as cn-clip embed writes it")
    arrays = read_npz(path, ("embeddings", "ids"), optional=("about",), description=description)
    about: dict[str, Any] = {}
    try:
        ids = [str(id) for id in arrays["ids"].reshape(-1).tolist()]
        text = str(arrays["about"]) if "about" in arrays else None
    except ValueError:  # invalid code points
        raise DataError(
            _("{path}: ids or about is not valid text; embed again", path=path)
        ) from None
    if text is not None:
        about = json_object(text, _("{path}: about", path=path))
    check_format(about, path)
    if about.get("kind", kind) != kind:
        raise DataError(
            _(
                "{path} holds {kind}, not {expected_kind}",
                path=path,
                kind=translate(str(about["kind"])),
                expected_kind=translate(kind),
            )
        )
    if arrays["ids"].ndim != 1:
        raise DataError(
            _(
                "{path}: ids have the shape {shape}; expected (N,)",
                path=path,
                shape=arrays["ids"].shape,
            )
        )
    return StoredEmbeddings(path, ids, _as_vectors(arrays["embeddings"], path))


def _as_vectors(array: npt.NDArray[Any], path: Path) -> npt.NDArray[np.float32]:
    """Return an array of numbers (N, D) as float32."""
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(
            _(
                "{path}: embeddings are {dtype} of shape {shape}; expected numbers of shape (N, D)",
                path=path,
                dtype=array.dtype,
                shape=array.shape,
            )
        )
    with np.errstate(over="ignore"):  # _checked refuses infinity
        return array.astype(np.float32)


def _read_jsonl(path: Path, kind: Kind) -> StoredEmbeddings:
    key = {"images": "image_id", "texts": "text_id"}[kind]
    check_format(json_object_at(about_path(path)), about_path(path))
    lines = Lines(path)
    ids: list[str] = []
    rows: list[npt.NDArray[np.float32]] = []
    for number in range(len(lines)):
        where = lines.where(number)
        values = json_object(lines[number], where)
        if key not in values or "feature" not in values:
            raise DataError(
                _('{where}: expected {{"{key}": 1, "feature": [0.1, ...]}}', where=where, key=key)
            )
        try:
            with np.errstate(over="ignore"):  # _checked refuses infinity
                row = np.array(values["feature"], np.float32)
        except (TypeError, ValueError, OverflowError):
            raise DataError(
                _("{where}: its feature is not a list of numbers", where=where)
            ) from None
        if row.ndim != 1 or (rows and len(row) != len(rows[0])):
            expected = (
                _("{count} numbers as above", count=len(rows[0]))
                if rows
                else _("a list of numbers")
            )
            raise DataError(
                _(
                    "{where}: its feature has the shape {shape}; expected {expected}",
                    where=where,
                    shape=row.shape,
                    expected=expected,
                )
            )
        ids.append(str(values[key]))
        rows.append(row)
    return StoredEmbeddings(path, ids, np.stack(rows) if rows else np.empty((0, 0), np.float32))


def _read_clip_retrieval(path: Path, kind: Kind, columns: Sequence[str]) -> StoredEmbeddings:
    _parquet()
    check_format(json_object_at(path / "about.json"), path / "about.json")
    stem = {"images": "img_emb", "texts": "text_emb"}[kind]
    vectors = sorted((path / stem).glob("*.npy"), key=_part_number)
    tables = sorted((path / "metadata").glob("*.parquet"), key=_part_number)
    if not vectors or len(vectors) != len(tables):
        raise DataError(
            _(
                "{path} holds {vector_count} files in {stem} and {table_count} in metadata; "
                "expected the same number, as clip-retrieval writes them",
                path=path,
                vector_count=len(vectors),
                stem=stem,
                table_count=len(tables),
            )
        )
    ids = [id for table in tables for id in _column(table, columns)]
    parts = [_as_vectors(read_npy(file), file) for file in vectors]
    if len({part.shape[1] for part in parts}) > 1:
        raise DataError(_("{folder}: vectors of different widths; embed again", folder=path / stem))
    return StoredEmbeddings(path, ids, np.concatenate(parts))


def _column(table: Path, columns: Sequence[str]) -> list[str]:
    """Read the first of ``columns`` that a Parquet file has, as strings."""
    _unused, parquet = _parquet()
    try:
        check_regular(table)
        names = parquet.read_schema(table).names
        column = next((name for name in columns if name in names), None)
        values: list[Any] = []
        if column is not None:
            values = parquet.read_table(table, columns=[column])[column].to_pylist()
        ids = [str(value) for value in values]
    # pyarrow raises many kinds on damaged files: OSError, ArrowInvalid, KeyError, TypeError, ...
    except Exception as error:
        raise DataError(
            _(
                "{table} is not Parquet ({error}); embed again, or download the file again",
                table=table,
                error=error,
            )
        ) from None
    if column is None:
        raise DataError(
            _(
                "{table} has no column {columns}; its rows have no ids",
                table=table,
                columns=_(" or ").join(columns),
            )
        )
    return ids


def _part_number(path: Path) -> tuple[int, str]:
    """Sort key: ``img_emb_10`` after ``img_emb_9``."""
    digits = path.stem.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else -1), path.stem


def _spans(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, max(1, count), size):
        yield start, min(count, start + size)


def _is_npz(path: Path) -> bool:
    """Return whether a file starts and ends like one of ``write_npz``."""
    with path.open("rb") as stream:
        head = stream.read(64)
        stream.seek(-min(512, path.stat().st_size), 2)
        tail = stream.read()
    starts = head.startswith(b"PK") and b"embeddings.npy" in head
    return starts and b"ids.npy" in tail and b"about.npy" in tail


def _is_jsonl(path: Path) -> bool:
    lines = starts_with(b'{"image_id": ', b'{"text_id": ')
    return lines(path) and _is_about(about_path(path))


def _is_about(path: Path) -> bool:
    return {"model", "kind", "dim"} <= json_object_at(path).keys()


def _write_about(embeddings: EmbeddingsToWrite, path: Path) -> None:
    text = json.dumps(with_format(embeddings.about), ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def _parquet() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError(
            _("clip-retrieval's layout needs pyarrow: pip install pyarrow, or give --out X.npz")
        ) from None
