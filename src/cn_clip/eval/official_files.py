"""The official evaluation's files: annotations, predictions in both directions, and metrics."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cn_clip.data.sources.lines import Lines, json_object
from cn_clip.embeddings.files import EmbeddingsToWrite, write_jsonl
from cn_clip.embeddings.inputs import Kind
from cn_clip.errors import DataError, UsageError
from cn_clip.eval.metrics.recall import Recall
from cn_clip.eval.retrieval import Id, Measured
from cn_clip.outputs import claim, own_file, own_folder, stamp, starts_with
from cn_clip.publish import atomic_file, map_write_errors, write_text
from cn_clip.topk import top_k

Direction = Literal["text_to_image", "image_to_text"]
K = 10  # what the official evaluator asks for

# direction -> the key of what asks, and of what is found, in predictions and annotations
_KEYS: dict[Direction, tuple[str, str]] = {
    "text_to_image": ("text_id", "image_ids"),
    "image_to_text": ("image_id", "text_ids"),
}
_KINDS = {"image_id": "pictures", "text_id": "texts"}


@dataclass(frozen=True, slots=True)
class Predictions:
    """What was found for each id that asks, best first; ids as strings."""

    path: Path
    direction: Direction
    found: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Scored:
    """Recall of predictions over the ``queries`` of the annotations; ``extra`` ids asked besides,
    and count for nothing."""

    direction: Direction
    recall: Recall
    queries: int
    extra: int


def claim_official(out: str | Path, *, inputs: Iterable[str | Path] = ()) -> Path:
    """Check that ``write_official`` may write into a folder; nothing is touched. Return it.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    return claim(out, own_folder("eval retrieval"), kind="folder", inputs=inputs, in_place=True)


def claim_metrics(out: str | Path, *, inputs: Iterable[str | Path] = ()) -> Path:
    """Check that ``write_metrics`` may write a file; nothing is touched. Return it as a path.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    own = starts_with(b'{"success": true, "score": ')
    return claim(out, own_file("eval predictions", own), inputs=inputs)


def write_official(measured: Measured, folder: Path) -> list[Path]:
    """Write features, annotations, predictions and metrics as the official scripts read and write
    them; return the paths.

    The annotations ``texts.jsonl`` and ``texts.tr.jsonl`` hold what is in a pair. Each file is
    written whole or not at all.

    Raises:
        UsageError: there are fewer than 10 pictures or texts to predict from.
    """
    images, texts = measured.image_ids, measured.text_ids
    if min(len(images), len(texts)) < K:
        raise UsageError(
            f"the official files hold the {K} best for each, but there are {len(images)} pictures "
            f"and {len(texts)} texts; measure on more, or write none"
        )
    best_images = top_k(measured.texts, measured.images, K).indexes
    best_texts = top_k(measured.images, measured.texts, K).indexes
    of_text: dict[int, list[Id]] = {}
    of_image: dict[int, list[Id]] = {}
    for image, text in measured.pairs.tolist():
        of_text.setdefault(text, []).append(images[image])
        of_image.setdefault(image, []).append(texts[text])
    captions = measured.captions or [""] * len(texts)
    files: dict[str, Iterable[dict[str, Any]]] = {
        "texts.jsonl": (
            {"text_id": texts[text], "text": captions[text], "image_ids": of_text[text]}
            for text in sorted(of_text)
        ),
        "texts.tr.jsonl": (
            {"image_id": images[image], "text_ids": of_image[image]} for image in sorted(of_image)
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
        _write_features(measured, "images", folder / "imgs.img_feat.jsonl")
        _write_features(measured, "texts", folder / "texts.txt_feat.jsonl")
        for name, objects in files.items():
            with atomic_file(folder / name) as path, path.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
        write_metrics(measured.recall.text_to_image, folder / "metrics.json")
        write_metrics(measured.recall.image_to_text, folder / "tr_metrics.json")
    return [folder / name for name in names]


def write_metrics(recall: Recall, out: Path) -> None:
    """Write what the official evaluator writes, in percent; its score is the mean recall."""
    mean = 100 * recall.mean
    scores = {"score": mean, "mean_recall": mean} | {
        name: 100 * share
        for name, share in (("r1", recall.r1), ("r5", recall.r5), ("r10", recall.r10))
    }
    write_text(out, json.dumps({"success": True, "score": mean, "scoreJson": scores}))


def read_truth(path: Path) -> list[tuple[str, str]]:
    """Return the image id and the text id of every pair of ``{"text_id", "image_ids"}`` lines, or
    of ``{"image_id", "text_ids"}`` lines, as strings.

    A line whose list is empty asks for what is not there, and is a pair with the id ``""``: the
    official evaluator counts it as missed.

    Raises:
        DataError: a line is not of this form, or asks for an id again.
    """
    _, direction, answers = _read(path)
    pairs = [(asked, each) for asked, found in answers.items() for each in found or [""]]
    return pairs if direction == "image_to_text" else [(image, text) for text, image in pairs]


def read_predictions(path: Path) -> Predictions:
    """Read ``{"text_id": 1, "image_ids": [...]}`` lines, or ``{"image_id", "text_ids"}``; ids are
    numbers or strings, 10 or more a line.

    Raises:
        DataError: a line is not of this form, has fewer than 10 predictions, predicts an id
            twice, or asks for an id again; it is named by its number.
    """
    lines, direction, answers = _read(path)
    one, many = _KEYS[direction]
    for number, (asked, found) in enumerate(answers.items()):
        where = f"{lines.where(number)}: {one} {asked!r}"
        if len(found) < K:
            raise DataError(f"{where} has {len(found)} {many}; predict at least {K}")
        if len(set(found)) < len(found):
            twice = next(each for at, each in enumerate(found) if each in found[:at])
            raise DataError(f"{where} predicts {twice!r} twice; predict different {many}")
    return Predictions(path, direction, answers)


def score_predictions(predictions: Predictions, truth: Iterable[tuple[str, str]]) -> Scored:
    """Score predictions as the official ``evaluation.py`` and ``evaluation_tr.py`` do.

    Args:
        predictions: from ``read_predictions``.
        truth: from ``read_truth``; of either direction, both hold the same pairs.

    Raises:
        DataError: an id of the annotations has no predictions, or no predicted id is in them.
    """
    turned = predictions.direction == "text_to_image"
    wanted: dict[str, set[str]] = {}
    for image, text in truth:
        asked, right = (text, image) if turned else (image, text)
        if asked:
            wanted.setdefault(asked, set()).add(right)
    one, many = _KEYS[predictions.direction]
    missing = [each for each in wanted if each not in predictions.found]
    if missing:
        raise DataError(
            f"{predictions.path}: {len(missing):,} of {len(wanted):,} {_KINDS[one]} have no "
            f"predictions, {one} {missing[0]!r} for one; predict for the whole split"
        )
    known = set().union(*wanted.values())
    if known != {""} and not any(known & set(found) for found in predictions.found.values()):
        example = next(iter(predictions.found.values()))[0]
        raise DataError(
            f"{predictions.path}: no predicted id is in the annotations, {example!r} for one; are "
            f"the {many} of this split, or row numbers?"
        )
    first = [
        next((at for at, each in enumerate(predictions.found[asked][:K]) if each in right), K)
        for asked, right in wanted.items()
    ]
    if not first:
        raise DataError(f"the annotations hold no {_KINDS[one]}, so there is nothing to score")
    ranks = np.array(first)
    r1, r5, r10 = (float(np.mean(ranks < at)) for at in (1, 5, 10))
    extra = len(predictions.found) - len(wanted)
    return Scored(predictions.direction, Recall(r1, r5, r10), len(wanted), extra)


def _write_features(measured: Measured, kind: Kind, out: Path) -> None:
    ids, vectors = {
        "images": (measured.image_ids, measured.images),
        "texts": (measured.text_ids, measured.texts),
    }[kind]
    about = {"model": measured.model, "kind": kind, "dim": vectors.shape[1]}
    labels = [str(each) for each in ids]
    rows = EmbeddingsToWrite(kind, ids, labels, vectors.shape[1], lambda a, b: vectors[a:b], about)
    write_jsonl(rows, out)


def _read(path: Path) -> tuple[Lines, Direction, dict[str, list[str]]]:
    """Read lines of an id and a list of ids; the first line tells the direction."""
    lines = Lines(path)
    if not len(lines):
        raise DataError(f"{path} is empty")
    first = json_object(lines[0], lines.where(0))
    direction: Direction = "image_to_text" if "text_ids" in first else "text_to_image"
    answers: dict[str, list[str]] = {}
    for number, (asked, found) in enumerate(_answers(lines, *_KEYS[direction])):
        if asked in answers:
            before = lines.where(list(answers).index(asked))
            raise DataError(
                f"{lines.where(number)}: {_KEYS[direction][0]} {asked!r} was there before, "
                f"{before}; keep one of them"
            )
        answers[asked] = found
    return lines, direction, answers


def _answers(lines: Lines, one: str, many: str) -> Iterator[tuple[str, list[str]]]:
    for number in range(len(lines)):
        where = lines.where(number)
        values = json_object(lines[number], where)
        if one not in values or not isinstance(values.get(many), list):
            raise DataError(f'{where}: expected {{"{one}": 1, "{many}": [1, 2, ...]}}')
        for each in (values[one], *values[many]):
            if isinstance(each, bool) or not isinstance(each, str | int) or each == "":
                raise DataError(f"{where}: {each!r:.40} is no id; give numbers or strings")
        yield str(values[one]), [str(each) for each in values[many]]
