"""The official annotations, predictions and metrics files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cn_clip.data.sources.lines import Lines, json_object
from cn_clip.data.sources.official import parse_id
from cn_clip.embeddings.files import EmbeddingsToWrite, StoredEmbeddings, write_jsonl
from cn_clip.embeddings.inputs import Kind
from cn_clip.errors import DataError, UsageError
from cn_clip.eval.metrics.recall import Recall, recall_of
from cn_clip.eval.retrieval import Id, RetrievalResult
from cn_clip.outputs import claim, own_file, own_folder, reads_as, stamp, starts_with
from cn_clip.publish import atomic_file, map_write_errors, write_text
from cn_clip.topk import top_k
from cn_clip.translation import N_, _, translate

Direction = Literal["text_to_image", "image_to_text"]
K = 10  # predictions per query in the official evaluation

# direction -> JSON keys of the query and of the results, in predictions and annotations
_KEYS: dict[Direction, tuple[str, str]] = {
    "text_to_image": ("text_id", "image_ids"),
    "image_to_text": ("image_id", "text_ids"),
}
# What ``write_metrics`` writes, whole, and the start of what ``write_failure`` writes.
_METRICS = re.compile(
    rb'\{"success": true, "score": (N), "scoreJson": '
    rb'\{"score": \1, "mean_recall": \1, "r1": N, "r5": N, "r10": N\}\}\Z'.replace(
        b"N", rb"[\d.e-]+"
    )
)
_FAILURE = b'{"errorDetail": "'
# A line of ``write_predictions`` and ``write_image_annotations``; annotations of texts have a text.
_LINE = re.compile(rb'\{"(text|image)_id": ("(?:[^"\\]|\\.)*"|-?\d+), "(image|text)_ids": \[')
_PLURALS = {"image_id": N_("images"), "text_id": N_("texts")}


@dataclass(frozen=True, slots=True)
class Predictions:
    """Ranked result ids of each query id, best first; ids are strings."""

    path: Path
    direction: Direction
    ranked: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class PredictionScores:
    """Recall of predictions over the ``queries`` of the annotations; ``extra`` predicted queries
    are not in the annotations and are ignored."""

    direction: Direction
    recall: Recall
    queries: int
    extra: int


def claim_official_files(out: str | Path, *, inputs: Iterable[str | Path] = ()) -> Path:
    """Return a folder if ``write_official_files`` may write into it; nothing is written yet.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    return claim(out, own_folder("eval retrieval"), kind="folder", inputs=inputs, in_place=True)


def claim_metrics(out: str | Path, *, inputs: Iterable[str | Path] = ()) -> Path:
    """Return a path if ``write_metrics`` may write there; nothing is written yet.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    is_metrics, is_failure = reads_as(_METRICS, b"}}"), starts_with(_FAILURE)
    own = own_file("eval predictions", lambda path: is_metrics(path) or is_failure(path))
    return claim(out, own, inputs=inputs)


def claim_lines(
    out: str | Path, *, option: str = "--output", inputs: Iterable[str | Path] = ()
) -> Path:
    """Return a path if predictions or annotations of images may be written there, over such a file
    too.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    own = own_file("eval", reads_as(_LINE, b"]}\n"))
    return claim(out, own, option=option, inputs=inputs)


def write_official_files(result: RetrievalResult, folder: Path) -> list[Path]:
    """Write features, annotations, predictions and metrics in the official formats; return the
    paths.

    The annotations ``texts.jsonl`` and ``texts.tr.jsonl`` hold paired items only. Each file is
    written atomically.

    Raises:
        UsageError: there are fewer than 10 images or texts.
    """
    images, texts = result.image_ids, result.text_ids
    if min(len(images), len(texts)) < K:
        raise UsageError(
            _(
                "the official files hold {results_per_query} results per query, but there are "
                "{image_count} images and {text_count} texts; evaluate on more data, or omit --out",
                results_per_query=K,
                image_count=len(images),
                text_count=len(texts),
            )
        )
    best_images = top_k(result.texts, result.images, K).indexes
    best_texts = top_k(result.images, result.texts, K).indexes
    images_of: dict[int, list[Id]] = {}
    texts_of: dict[int, list[Id]] = {}
    for image, text in result.pairs.tolist():
        images_of.setdefault(text, []).append(images[image])
        texts_of.setdefault(image, []).append(texts[text])
    captions = result.captions or [""] * len(texts)
    files: dict[str, Iterable[dict[str, Any]]] = {
        "texts.jsonl": (
            {"text_id": texts[text], "text": captions[text], "image_ids": images_of[text]}
            for text in sorted(images_of)
        ),
        "texts.tr.jsonl": (
            {"image_id": images[image], "text_ids": texts_of[image]} for image in sorted(texts_of)
        ),
        "predictions.jsonl": (
            {"text_id": text, "image_ids": [images[row] for row in rows]}
            for text, rows in zip(texts, best_images.tolist(), strict=True)
        ),
        "tr_predictions.jsonl": (
            {"image_id": image, "text_ids": [texts[row] for row in rows]}
            for image, rows in zip(images, best_texts.tolist(), strict=True)
        ),
    }
    features = {"imgs.img_feat.jsonl": "images", "texts.txt_feat.jsonl": "texts"}
    names = [*features, *files, "metrics.json", "tr_metrics.json"]
    with map_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stamp(folder, "eval retrieval", [*names, *(f"{name}.about.json" for name in features)])
        _write_features(result, "images", folder / "imgs.img_feat.jsonl")
        _write_features(result, "texts", folder / "texts.txt_feat.jsonl")
        for name, objects in files.items():
            _write_lines(folder / name, objects)
        write_metrics(result.recall.text_to_image, folder / "metrics.json")
        write_metrics(result.recall.image_to_text, folder / "tr_metrics.json")
    return [folder / name for name in names]


def write_metrics(recall: Recall, out: Path) -> None:
    """Write the official metrics, in percent; the score is the mean recall."""
    mean = 100 * recall.mean
    scores = {"score": mean, "mean_recall": mean} | {
        name: 100 * value
        for name, value in (("r1", recall.r1), ("r5", recall.r5), ("r10", recall.r10))
    }
    write_text(out, json.dumps({"success": True, "score": mean, "scoreJson": scores}))


def write_failure(message: str, out: Path) -> None:
    """Write the official metrics of an evaluation that failed."""
    values = {"errorDetail": message, "errorMsg": message, "score": 0, "scoreJson": {}}
    write_text(out, json.dumps(values | {"success": False}))


def write_predictions(
    direction: Direction,
    queries: StoredEmbeddings,
    results: StoredEmbeddings,
    out: Path,
    *,
    k: int = K,
) -> None:
    """Write the ids of the ``k`` best results of each query, best first, as official predictions.

    Args:
        direction: of the search.
        queries: embeddings of the queries.
        results: embeddings of what is searched.
        out: the ``.jsonl`` file.
        k: results per query, at most all.

    Raises:
        UsageError: ``k`` is below 1.
        DataError: queries and results have different widths.
    """
    if k < 1:
        raise UsageError(_("{k} results per query; give 1 or more", k=k))
    query_key, result_key = _KEYS[direction]
    if queries.vectors.shape[1] != results.vectors.shape[1]:
        raise DataError(
            _(
                "{queries} has vectors of width {width}, {results} of width {other}; give "
                "embeddings of one model",
                queries=queries.path,
                width=queries.vectors.shape[1],
                results=results.path,
                other=results.vectors.shape[1],
            )
        )
    best = top_k(queries.vectors, results.vectors, min(k, len(results.ids))).indexes
    ids = [parse_id(id) for id in results.ids]
    _write_lines(
        out,
        (
            {query_key: parse_id(query), result_key: [ids[row] for row in rows]}
            for query, rows in zip(queries.ids, best.tolist(), strict=True)
        ),
    )


def write_image_annotations(truth: Iterable[tuple[str, str]], out: Path) -> None:
    """Write pairs of image and text ids as ``{"image_id", "text_ids"}`` lines, images in the order
    of their first text."""
    texts_of: dict[str, list[int | str]] = {}
    for image, text in truth:
        if image:
            texts_of.setdefault(image, []).append(parse_id(text))
    _write_lines(
        out, ({"image_id": parse_id(image), "text_ids": ids} for image, ids in texts_of.items())
    )


def _write_lines(out: Path, objects: Iterable[dict[str, Any]]) -> None:
    with (
        map_write_errors(out),
        atomic_file(out) as path,
        path.open("w", encoding="utf-8") as stream,
    ):
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in objects)


def read_truth(path: Path) -> list[tuple[str, str]]:
    """Return the image id and the text id of every pair of ``{"text_id", "image_ids"}`` lines, or
    of ``{"image_id", "text_ids"}`` lines, as strings.

    A line with an empty list is a pair with the id ``""``, which the official evaluator counts as
    missed.

    Raises:
        DataError: a line has another form, or repeats a query id.
    """
    _, direction, lists = _read(path)
    pairs = [(query, result) for query, results in lists.items() for result in results or [""]]
    return pairs if direction == "image_to_text" else [(image, text) for text, image in pairs]


def read_predictions(path: Path) -> Predictions:
    """Read ``{"text_id": 1, "image_ids": [...]}`` lines, or ``{"image_id", "text_ids"}``; ids are
    integers or strings, at least 10 per line.

    Raises:
        DataError: a line has another form, fewer than 10 predictions, a repeated prediction or a
            repeated query id; the message has its number.
    """
    lines, direction, ranked = _read(path)
    query_key, result_key = _KEYS[direction]
    for number, (query, results) in enumerate(ranked.items()):
        where = f"{lines.where(number)}: {query_key} {query!r}"
        if len(results) < K:
            raise DataError(
                _(
                    "{where} has {result_count} {result_key}; predict at least {results_per_query}",
                    where=where,
                    result_count=len(results),
                    result_key=result_key,
                    results_per_query=K,
                )
            )
        if len(set(results)) < len(results):
            repeated = next(result for n, result in enumerate(results) if result in results[:n])
            raise DataError(
                _(
                    "{where} predicts {repeated!r} twice; predict different {result_key}",
                    where=where,
                    repeated=repeated,
                    result_key=result_key,
                )
            )
    return Predictions(path, direction, ranked)


def score_predictions(
    predictions: Predictions, truth: Iterable[tuple[str, str]]
) -> PredictionScores:
    """Score predictions as the official ``evaluation.py`` and ``evaluation_tr.py`` do.

    Args:
        predictions: from ``read_predictions``.
        truth: from ``read_truth``, of either direction.

    Raises:
        DataError: a query of the annotations has no predictions, or no predicted id is in them.
    """
    by_text = predictions.direction == "text_to_image"
    positives: dict[str, set[str]] = {}
    for image, text in truth:
        query, positive = (text, image) if by_text else (image, text)
        if query:
            positives.setdefault(query, set()).add(positive)
    query_key, result_key = _KEYS[predictions.direction]
    if not positives:
        raise DataError(
            _(
                "the annotations have no {plural}; give those of the split",
                plural=translate(_PLURALS[query_key]),
            )
        )
    missing = [query for query in positives if query not in predictions.ranked]
    if missing:
        raise DataError(
            _(
                "{path}: {missing_count:,} of {positive_count:,} {plural} have no predictions, "
                "such as {query_key} {missing!r}; predict for the whole split",
                path=predictions.path,
                missing_count=len(missing),
                positive_count=len(positives),
                plural=translate(_PLURALS[query_key]),
                query_key=query_key,
                missing=missing[0],
            )
        )
    known = set().union(*positives.values())
    if known != {""} and not any(known & set(ids) for ids in predictions.ranked.values()):
        example = next(iter(predictions.ranked.values()))[0]
        raise DataError(
            _(
                "{path}: no predicted id is in the annotations, such as {example!r}; give "
                "{result_key} of this split, not row numbers",
                path=predictions.path,
                example=example,
                result_key=result_key,
            )
        )
    ranks = [
        next((n for n, result in enumerate(predictions.ranked[query][:K]) if result in ids), K)
        for query, ids in positives.items()
    ]
    extra = len(predictions.ranked) - len(positives)
    recall = recall_of(np.array(ranks))
    return PredictionScores(predictions.direction, recall, len(positives), extra)


def _write_features(result: RetrievalResult, kind: Kind, out: Path) -> None:
    ids, vectors = {
        "images": (result.image_ids, result.images),
        "texts": (result.text_ids, result.texts),
    }[kind]
    about = {"model": result.model, "kind": kind, "dim": vectors.shape[1]}
    labels = [str(key) for key in ids]
    rows = EmbeddingsToWrite(kind, ids, labels, vectors.shape[1], lambda a, b: vectors[a:b], about)
    write_jsonl(rows, out)


def _read(path: Path) -> tuple[Lines, Direction, dict[str, list[str]]]:
    """Read lines of a query id and a list of ids; the first line determines the direction."""
    lines = Lines(path)
    if not len(lines):
        raise DataError(_("{path} is empty; give a file with one query per line", path=path))
    first = json_object(lines[0], lines.where(0))
    direction: Direction = "image_to_text" if "text_ids" in first else "text_to_image"
    results_of: dict[str, list[str]] = {}
    for number, (query, results) in enumerate(_id_lists(lines, *_KEYS[direction])):
        if query in results_of:
            before = lines.where(list(results_of).index(query))
            raise DataError(
                _(
                    "{where}: {key} {query!r} is a repetition of {before}; keep one of them",
                    where=lines.where(number),
                    key=_KEYS[direction][0],
                    query=query,
                    before=before,
                )
            )
        results_of[query] = results
    return lines, direction, results_of


def _id_lists(lines: Lines, query_key: str, result_key: str) -> Iterator[tuple[str, list[str]]]:
    for number in range(len(lines)):
        where = lines.where(number)
        values = json_object(lines[number], where)
        if query_key not in values or not isinstance(values.get(result_key), list):
            raise DataError(
                _(
                    '{where}: expected {{"{query_key}": 1, "{result_key}": [1, 2, ...]}}',
                    where=where,
                    query_key=query_key,
                    result_key=result_key,
                )
            )
        for key in (values[query_key], *values[result_key]):
            if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
                raise DataError(
                    _(
                        "{where}: {key!r:.40} is not an id; give integers or strings",
                        where=where,
                        key=key,
                    )
                )
        yield str(values[query_key]), [str(key) for key in values[result_key]]
