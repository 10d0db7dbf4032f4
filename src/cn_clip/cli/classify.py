"""``cn-clip classify``: which of some Chinese labels fits each picture."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import BAR_WIDTH, Flag, bar, console, print_json, progress
from cn_clip.errors import UsageError
from cn_clip.files import MAX_TEXT, as_path, lines_of
from cn_clip.text import path_text, valid_text

if TYPE_CHECKING:
    from cn_clip.calibration import Calibration

_CHUNK = 32


def classify(
    images: Annotated[list[str], Parameter(negative=())],
    /,
    *,
    labels: str | None = None,
    # A lone hyphen is a value here: standard input.
    labels_file: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    template: Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)] = ("{}",),
    top: int = 5,
    calibration: str | None = None,
    loading: Loading = DEFAULT,
    json: Flag = False,
) -> int:
    """Tell which of some Chinese labels fits each picture.

    Prints, for each picture, the best labels with their probability (a softmax over the labels
    given) and cosine (independent of the other labels). With a calibration of this model, also the
    probability that the label matches at all, and "none of these" where the best cosine is below
    its threshold for labels. Damaged pictures are reported and do not stop the rest.

    Parameters
    ----------
    images
        Files, folders (searched through) or globs.
    labels
        The labels, separated by commas: 猫,狗,火箭
    labels_file
        A text file with one label a line, UTF-8; - is standard input.
    template
        A sentence with {} where the label goes, such as 一张{}的照片; repeat it to average several.
        By default the label alone.
    top
        How many labels to print for each picture.
    calibration
        A .json file from `cn-clip eval calibrate`, for this model.
    json
        Print JSON instead of a table.
    """
    from cn_clip import zeroshot
    from cn_clip.calibration import check_model, read_calibration
    from cn_clip.image.decode import find_images

    if top < 1:
        raise UsageError(f"--top {top} shows nothing; give 1 or more")
    names = zeroshot.distinct(_read_labels(labels, labels_file))
    paths = find_images(images)
    fitted = None if calibration is None else read_calibration(Path(calibration))
    embedder = loading.load()
    if fitted is not None:
        check_model(fitted, embedder)
    prototypes = zeroshot.label_embeddings(embedder, names, template)

    shown: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    out = console()
    with progress() as bars:
        task = bars.add_task("classifying", total=len(paths))
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            embeddings, errors = embedder.embed_readable(chunk)
            good = [path for index, path in enumerate(chunk) if index not in errors]
            result = zeroshot.score(embedder, embeddings, names, prototypes)
            for path, best in zip(good, result.top(top), strict=True):
                if json:
                    shown.append(_as_json(path, best, fitted))
                else:
                    out.print(_table(path, best, fitted))
            failed += [{"image": path_text(chunk[i]), "error": str(e)} for i, e in errors.items()]
            bars.advance(task, len(chunk))

    if json:
        print_json(
            {
                "model": embedder.name,
                "logit_scale": embedder.logit_scale,
                "templates": [valid_text(each) for each in template],
                "labels": names,
                "images": shown,
                "failed": failed,
            }
        )
    for failure in failed:
        print(f"cn-clip: {failure['error']}", file=sys.stderr)
    if len(paths) > 1 and failed:
        print(f"cn-clip: {len(failed)} of {len(paths)} pictures failed", file=sys.stderr)
    return 1 if failed else 0


def _read_labels(given: str | None, file: str | None) -> list[str]:
    if (given is None) == (file is None):
        raise UsageError("give either --labels 猫,狗 or --labels-file FILE")
    if given is not None:
        return re.split("[,，、]", given)
    assert file is not None
    try:
        if file == "-":
            raw = sys.stdin.buffer.read(MAX_TEXT + 1)
        else:  # not by read_file: a pipe, such as <(command), is welcome here
            with as_path(file).open("rb") as stream:
                raw = stream.read(MAX_TEXT + 1)
        if len(raw) > MAX_TEXT:
            raise UsageError(f"--labels-file {file} has more than {MAX_TEXT:,} bytes; give labels")
        lines = lines_of(raw)
    except OSError as error:
        raise UsageError(f"--labels-file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--labels-file {file} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    return [line for line in lines if line.strip()]


def _as_json(
    path: Path, best: list[tuple[str, float, float]], fitted: Calibration | None
) -> dict[str, Any]:
    keys = ("label", "probability", "cosine")
    rows: list[dict[str, Any]] = [dict(zip(keys, row, strict=True)) for row in best]
    if fitted is None:
        return {"image": path_text(path), "predictions": rows}
    for row, match in zip(rows, _matches(best, fitted), strict=True):
        row["match"] = match
    return {"image": path_text(path), "none_of_these": _none_of(best, fitted), "predictions": rows}


def _table(path: Path, best: list[tuple[str, float, float]], fitted: Calibration | None) -> Table:
    title = escape(path_text(path))
    if fitted is not None and _none_of(best, fitted):
        title += f"\n[red]none of these[/red]: cosine below {fitted.thresholds['labels']:.3f}"
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("", width=BAR_WIDTH, style="green")
    table.add_column("cosine", justify="right")
    matches = None if fitted is None else _matches(best, fitted)
    if matches is not None:
        table.add_column("match", justify="right")
    for at, (label, probability, cosine) in enumerate(best):
        cells = [escape(label), f"{probability:.1%}", bar(probability), f"{cosine:.3f}"]
        table.add_row(*cells, *([] if matches is None else [f"{matches[at]:.1%}"]))
    return table


def _matches(best: list[tuple[str, float, float]], fitted: Calibration) -> list[float]:
    from cn_clip.calibration import probability

    return [float(probability(fitted.curve, cosine)) for _, _, cosine in best]


def _none_of(best: list[tuple[str, float, float]], fitted: Calibration) -> bool | None:
    """Whether the best label is below the threshold; None if there is no threshold."""
    threshold = fitted.thresholds["labels"]
    return None if threshold is None else best[0][2] < threshold
