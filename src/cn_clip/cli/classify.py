"""``cn-clip classify``: zero-shot classification of images by Chinese labels."""

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
from cn_clip.translation import _

if TYPE_CHECKING:
    from cn_clip.calibration import Calibration
    from cn_clip.zeroshot import Classification

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
    """Classify images by Chinese labels, zero-shot.

    Prints the best labels of each image with their probability (softmax over the given labels) and
    cosine (independent of the other labels). With a calibration of this model, also the calibrated
    probability of a match, and "none of these" where the highest cosine is below the threshold for
    labels. Unreadable images are reported; the others are classified.

    Parameters
    ----------
    images
        Files, folders (searched recursively) or globs.
    labels
        The labels, separated by commas: 猫,狗,火箭
    labels_file
        UTF-8 text file, one label per line; - is standard input.
    template
        Sentence with {} in place of the label, such as 一张{}的照片; repeat to average several.
        Default: the label alone.
    top
        Labels to print per image.
    calibration
        Calibration of this model: a .json file from `cn-clip eval calibrate`.
    json
        Print JSON instead of a table.
    """
    from cn_clip import zeroshot
    from cn_clip.calibration import check_model, read_calibration
    from cn_clip.image.decode import find_images

    if top < 1:
        raise UsageError(_("--top {top} is below 1; give 1 or more", top=top))
    names = zeroshot.distinct(_read_labels(labels, labels_file))
    paths = find_images(images)
    fitted = None if calibration is None else read_calibration(Path(calibration))
    embedder = loading.load()
    if fitted is not None:
        check_model(fitted, embedder)
    prototypes = zeroshot.label_embeddings(embedder, names, template)

    results: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    out = console()
    with progress() as bars:
        task = bars.add_task(_("classifying"), total=len(paths))
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            embeddings, errors = embedder.embed_readable(chunk)
            readable = [path for index, path in enumerate(chunk) if index not in errors]
            result = zeroshot.classify_embeddings(
                embedder, embeddings, names, prototypes, calibration=fitted
            )
            if json:
                rows = zip(readable, result.to_dicts(top), strict=True)
                results += [{"image": path_text(path)} | row for path, row in rows]
            else:
                for row, path in enumerate(readable):
                    out.print(_table(path, result, row, top, fitted))
            failed += [{"image": path_text(chunk[i]), "error": str(e)} for i, e in errors.items()]
            bars.advance(task, len(chunk))

    if json:
        print_json(
            {
                "model": embedder.name,
                "logit_scale": embedder.logit_scale,
                "templates": [valid_text(sentence) for sentence in template],
                "labels": names,
                "images": results,
                "failed": failed,
            }
        )
    for failure in failed:
        print(f"cn-clip: {failure['error']}", file=sys.stderr)
    if len(paths) > 1 and failed:
        print(
            _(
                "cn-clip: {failed_count} of {count} images failed",
                failed_count=len(failed),
                count=len(paths),
            ),
            file=sys.stderr,
        )
    return 1 if failed else 0


def _read_labels(given: str | None, file: str | None) -> list[str]:
    if (given is None) == (file is None):
        raise UsageError(_("give either --labels 猫,狗 or --labels-file FILE"))
    if given is not None:
        return re.split("[,，、]", given)
    assert file is not None
    try:
        if file == "-":
            raw = sys.stdin.buffer.read(MAX_TEXT + 1)
        else:  # not read_file, which refuses pipes such as <(command)
            with as_path(file).open("rb") as stream:
                raw = stream.read(MAX_TEXT + 1)
        if len(raw) > MAX_TEXT:
            raise UsageError(
                _(
                    "--labels-file {file} has over {limit:,} bytes; give labels",
                    file=file,
                    limit=MAX_TEXT,
                )
            )
        lines = lines_of(raw)
    except OSError as error:
        raise UsageError(
            _("--labels-file {file} cannot be read: {reason}", file=file, reason=error.strerror)
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            _(
                "--labels-file {file} is not UTF-8 (byte {position}); save it as UTF-8",
                file=file,
                position=error.start,
            )
        ) from None
    return [line for line in lines if line.strip()]


def _table(
    path: Path,
    result: Classification,
    row: int,
    top: int,
    calibration: Calibration | None,
) -> Table:
    title = escape(path_text(path))
    if calibration and result.none_of_these is not None and result.none_of_these[row]:
        threshold = calibration.thresholds["labels"]
        title += _("\n[red]none of these[/red]: cosine below {threshold:.3f}", threshold=threshold)
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    table.add_column(_("label"))
    table.add_column(_("probability"), justify="right")
    table.add_column("", width=BAR_WIDTH, style="green")
    table.add_column(_("cosine"), justify="right")
    if result.match_probabilities is not None:
        table.add_column(_("match"), justify="right")
    for label, probability, cosine, match in result[row][:top]:
        cells = [escape(label), f"{probability:.1%}", bar(probability), f"{cosine:.3f}"]
        table.add_row(*cells, *([] if match is None else [f"{match:.1%}"]))
    return table
