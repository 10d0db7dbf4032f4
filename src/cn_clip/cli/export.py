"""``cn-clip export``: a model as graphs for other runtimes."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal, cast

from rich.markup import escape
from rich.table import Table

from cn_clip.cli.show import Flag, console, list_failed, print_json
from cn_clip.config import full_precision
from cn_clip.errors import UsageError
from cn_clip.translation import _, translate

if TYPE_CHECKING:
    from cn_clip.backends.exported import GraphPrecision
    from cn_clip.export import ExportResult
    from cn_clip.export.fastest import Choice


def export(
    *,
    model: str = "mini",
    to: Literal["onnx", "openvino", "tensorrt", "coreml"] = "onnx",
    out: str | None = None,
    precision: Literal["float32", "float16", "int8", "fp32", "fp16"] | None = None,
    max_recall_drop: float | None = None,
    dataset: str | None = None,
    images: str | None = None,
    smooth_quant_alpha: float | None = None,
    official_names: Flag = False,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Export a model as graphs that run without torch, verified against the original.

    Writes two graphs (image and text, any batch size and text length), the tokenizer, the
    preprocessing and golden vectors, with which the export can be tested in any language. Real
    images and texts run through the export and the original; if they differ, nothing is written.

    Parameters
    ----------
    model
        A name from `cn-clip models`, org/name on a hub, or the path of a checkpoint.
    to
        The format: onnx, for ONNX Runtime, OpenVINO and others; openvino, for OpenVINO alone;
        tensorrt, onnx with a script that builds engines; coreml, onnx with Core ML models. The
        last two need --out; the script and the Core ML models are not run here.
    out
        A new folder. Default: the cache folder, where --backend finds the export of this model.
    precision
        Of the stored weights: float32 if not given. float16 halves the files and computes in
        float32. int8 also computes in int8; its loss of recall depends on the model.
    max_recall_drop
        Instead of --precision: write the fastest precision that loses at most this many points on
        --dataset, of the mean of the six recalls or of the accuracy.
    dataset
        KIND:PATH of pairs, as for `cn-clip eval retrieval`, or a folder of labelled images, as for
        `cn-clip eval zeroshot`.
    images
        A folder of images to compare, besides the sample in the package, and to calibrate int8 on,
        instead of the sample: at least 32, none of --dataset.
    smooth_quant_alpha
        For int8 in OpenVINO: the share of the difficulty that SmoothQuant moves from activations
        to weights, 0 to 1; -1 for none. Default: 0.5.
    official_names
        Name files, inputs and outputs as the official exporter does.
    overwrite
        Replace OUT if this command wrote it.
    json
        Print JSON instead of a table.
    """
    from cn_clip.image.decode import find_images

    if (max_recall_drop is None) != (dataset is None):
        raise UsageError(
            _("--max-recall-drop and --dataset are one measurement; give both, or neither")
        )
    files = find_images([images]) if images else []
    if max_recall_drop is not None and dataset is not None:
        if precision is not None:
            raise UsageError(_("--max-recall-drop finds the precision; drop --precision"))
        if to == "tensorrt" or to == "coreml":
            raise UsageError(
                _("--max-recall-drop measures onnx or openvino here, not {format}", format=to)
            )
        from cn_clip.export import check_packages

        check_packages(to, None)
        from cn_clip.export.fastest import export_fastest

        choice = export_fastest(
            model,
            out,
            dataset=dataset,
            max_recall_drop=max_recall_drop,
            to=to,
            images=files,
            smooth_quant_alpha=smooth_quant_alpha,
            official_names=official_names,
            overwrite=overwrite,
        )
        for message in choice.refused:
            print(_("cn-clip: warning: {message}", message=message), file=sys.stderr)
        if json:
            print_json(asdict(choice))
        else:
            console().print(_trials(choice, max_recall_drop))
            console().print(_table(choice.result, _recall(choice)))
        list_failed(choice.failed)
        return 1 if choice.failed else 0
    from cn_clip.export import export as run  # slow to import

    result = run(
        model,
        out,
        to=to,
        precision=cast("GraphPrecision", full_precision(precision or "float32")),
        images=files,
        smooth_quant_alpha=smooth_quant_alpha,
        official_names=official_names,
        overwrite=overwrite,
    )
    if json:
        print_json(asdict(result))
    else:
        console().print(_table(result, _("not measured; give --max-recall-drop and --dataset")))
    return 0


def _trials(choice: Choice, max_drop: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(_("precision"))
    for column in (
        _("images/s"),
        _("texts/s"),
        "MB",
        _("least cosine"),
        translate(choice.metric),
        _("drop, at most {drop:g}", drop=max_drop),
        _("holds"),
    ):
        table.add_column(column, justify="right")
    for trial in choice.trials:
        table.add_row(
            _("{precision} (chosen)", precision=trial.precision)
            if trial == choice.chosen
            else trial.precision,
            f"{trial.images_per_second:,.1f}",
            f"{trial.texts_per_second:,.0f}",
            f"{trial.bytes / 1e6:,.1f}",
            f"{trial.parity.smallest_cosine:.4f}",
            f"{100 * choice.score - trial.drop:.1f}",
            f"{trial.drop:.2f}",
            _("yes") if trial.holds else _("no"),
            style="bold" if trial == choice.chosen else None,
        )
    return table


def _recall(choice: Choice) -> str:
    chosen = choice.chosen
    score = f"{translate(choice.metric)} {100 * choice.score - chosen.drop:.1f} %"
    if chosen.precision == chosen.stored:
        return score
    return _('{score}, loaded with precision "bfloat16"', score=score)


def _table(result: ExportResult, recall: str) -> Table:
    parity = result.parity
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for key, value in {
        _("model"): result.model,
        _("wrote"): f"{os.path.normpath(result.out)} ({result.runtime}, {result.precision}, "
        f"{result.bytes / 1e6:,.1f} MB)",
        _("images"): _(
            "cosine to the original at least {image_cosine:.6f}, mean {parity_image_cosine:.6f}, "
            "of {images}",
            image_cosine=parity.image_cosine[0],
            parity_image_cosine=parity.image_cosine[1],
            images=parity.images,
        ),
        _("texts"): _(
            "cosine to the original at least {text_cosine:.6f}, mean {parity_text_cosine:.6f}, of "
            "{texts}",
            text_cosine=parity.text_cosine[0],
            parity_text_cosine=parity.text_cosine[1],
            texts=parity.texts,
        ),
        _("top 10"): _(
            "{top10_agreement:.1%} of the 10 best images of a text are the same",
            top10_agreement=parity.top10_agreement,
        ),
        _("recall"): recall,
    }.items():
        table.add_row(key, escape(value))
    if result.never_run:
        table.add_row(
            _("never run"),
            _("{never_run}; only the ONNX graphs were verified", never_run=result.never_run),
        )
    return table
