"""Export of a model for another runtime, verified before it is handed over."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
from PIL import Image

from cn_clip.backends.choice import open_export
from cn_clip.backends.exported import (
    GOLDEN,
    Deviation,
    Exported,
    Graph,
    GraphPrecision,
    Runtime,
    cached_export,
    hash_file,
    read_exported,
    write_exported,
)
from cn_clip.backends.self_test import golden_deviation
from cn_clip.backends.torch import TorchBackend
from cn_clip.config import ModelConfig, full_precision
from cn_clip.embedder import Embedder, load, locate
from cn_clip.errors import CheckpointError, UsageError
from cn_clip.export import coreml, tensorrt
from cn_clip.export.convert import convert_graphs
from cn_clip.export.graphs import OPSET, write_graphs
from cn_clip.export.int8_inputs import Calibration, calibration_of
from cn_clip.export.parity import REQUIRED_COSINE, Parity, Reference
from cn_clip.fingerprint import Fingerprint, derived
from cn_clip.image.decode import ImageInput
from cn_clip.outputs import atomic_folder, claim, entries, own_folder
from cn_clip.publish import map_write_errors
from cn_clip.sample import embedded_sample, golden_sample
from cn_clip.translation import N_, _, translate
from cn_clip.weights.folder_config import preprocessor_config

Format = Literal["onnx", "openvino", "tensorrt", "coreml"]
"""What is written. The last two come with ONNX graphs, which are verified in their place."""

_NEVER_RUN: dict[Format, tuple[str, str]] = {
    "tensorrt": (
        N_("{path}, which builds the TensorRT engines"),
        f"{tensorrt.FOLDER}/{tensorrt.SCRIPT}",
    ),
    "coreml": (N_("the Core ML models in {path}"), coreml.FOLDER),
}
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = {  # of transformers and transformers.js
    "tokenizer_class": "PreTrainedTokenizerFast",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}


@dataclass(frozen=True, slots=True)
class ExportResult:
    """An export that was written.

    Attributes:
        model: name of the original.
        out: the folder.
        format: what was asked for.
        runtime: of the graphs that were verified.
        precision: of the stored weights.
        fingerprint: identifies the embeddings of the graphs.
        derived_from: fingerprint of the float32 original.
        bytes: size of all files.
        parity: agreement of the graphs with the original.
        never_run: what else was written, and neither run nor verified; None if nothing.
    """

    model: str
    out: str
    format: Format
    runtime: Runtime
    precision: GraphPrecision
    fingerprint: str
    derived_from: str
    bytes: int
    parity: Parity
    never_run: str | None


def export(
    model: str | os.PathLike[str] = "mini",
    out: str | os.PathLike[str] | None = None,
    *,
    to: Format = "onnx",
    precision: GraphPrecision = "float32",
    images: Iterable[ImageInput] = (),
    texts: Iterable[str] = (),
    smooth_quant_alpha: float | None = None,
    official_names: bool = False,
    overwrite: bool = False,
) -> ExportResult:
    """Write a model's two graphs, tokenizer, preprocessing and golden vectors to a folder.

    The export and the original then embed the same images and texts. If any cosine is below
    ``REQUIRED_COSINE``, nothing is left behind.

    Args:
        model: as for ``cn_clip.load``; not an export.
        out: the folder; without it, the place in the cache folder where
            ``cn_clip.load(model, backend=...)`` looks.
        to: the format of the graphs. ``"tensorrt"`` is ONNX with a script that builds engines,
            ``"coreml"`` is ONNX with Core ML models beside it; the ONNX graphs are verified, the
            rest is not run.
        precision: of the stored weights. ``"int8"`` computes in int8 too.
        images: compared besides the sample in the package. int8 is calibrated on them instead of
            the sample.
        texts: compared besides the sample in the package.
        smooth_quant_alpha: of SmoothQuant, from 0 to 1, for transformers in int8 in OpenVINO; -1
            turns it off. None is 0.5.
        official_names: name files, inputs and outputs as the official exporter does.
        overwrite: replace ``out`` if this function wrote it.

    Raises:
        UsageError: an option is unknown, or ``out`` exists or holds other files.
        CheckpointError: the model cannot be exported, or the export differs from the original.
    """
    precision = cast(GraphPrecision, full_precision(precision))
    for option, value, known in (
        ("format", to, get_args(Format)),
        ("precision", precision, get_args(GraphPrecision)),
    ):
        if value not in known:
            raise UsageError(
                _(
                    "unknown {option} {value!r}; available: {known}",
                    option=option,
                    value=value,
                    known=", ".join(known),
                )
            )
    _check_format(to, precision, out)
    runtime: Runtime = "openvino" if to == "openvino" else "onnx"
    check_packages(runtime, precision)
    path = locate(model)
    if out is None:
        target, overwrite = cached_export(path, runtime, precision), True
    else:
        target = Path(out)
    check_alpha(smooth_quant_alpha, runtime, precision)
    images, texts = list(images), list(texts)
    inputs = [path, *(image for image in images if isinstance(image, str | os.PathLike))]
    own = own_folder("export")
    target = claim(target, own, kind="folder", inputs=inputs, overwrite=overwrite)
    original = load(model, backend="torch", device="cpu", precision="float32")
    sample = embedded_sample()
    calibration = calibration_of(original, images, texts) if precision == "int8" else None
    reference = Reference(original, [*sample.images, *images], [*sample.texts, *texts])
    graphs = graph_names(target.name, precision, official_names)
    if set(target.name) & set("\\:") and official_names:
        raise UsageError(
            _(
                "{name} cannot name graphs because of its : or \\; give another folder",
                name=target.name,
            )
        )
    with map_write_errors(target), atomic_folder(target, "export") as folder:
        backend = original.backend
        assert isinstance(backend, TorchBackend)
        write_graphs(backend.model, folder, *graphs)
        exported = finish_export(
            original, folder, runtime, precision, graphs, calibration, smooth_quant_alpha, to
        )
        exported = read_exported(folder)
        parity = reference.compare(as_embedder(folder, exported, original.config, test=False))
        if not parity.smallest_cosine >= REQUIRED_COSINE[precision]:
            raise CheckpointError(
                _(
                    "{target} was not written: the smallest cosine to the original is "
                    "{smallest_cosine:.6f}, {required_cosine} is required",
                    target=target,
                    smallest_cosine=parity.smallest_cosine,
                    required_cosine=REQUIRED_COSINE[precision],
                )
            )
    return ExportResult(
        model=original.name,
        out=str(target),
        format=to,
        runtime=runtime,
        precision=precision,
        fingerprint=exported.fingerprint,
        derived_from=exported.derived_from,
        bytes=sum(file.bytes for file in exported.files.values()),
        parity=parity,
        never_run=_never_run(to),
    )


def check_packages(runtime: Runtime, precision: GraphPrecision | None) -> None:
    """Raise a ``UsageError`` if a package is missing that an export needs."""
    needed = ["onnx", "onnxscript", "onnxruntime"]
    if runtime == "openvino":
        needed += ["openvino"] if precision in ("float32", "float16") else ["openvino", "nncf"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            _(
                "export needs packages that are missing: pip install {names}",
                names=" ".join(missing),
            )
        )


def check_alpha(alpha: float | None, to: Runtime, precision: GraphPrecision | None) -> None:
    """Raise a ``UsageError`` for an alpha of SmoothQuant that is out of range or without use."""
    if alpha is None:
        return
    if to != "openvino" or precision not in ("int8", None):
        raise UsageError(_("only int8 in OpenVINO uses SmoothQuant; drop its alpha"))
    if not (0 <= alpha <= 1 or alpha == -1):
        raise UsageError(
            _("the alpha {alpha} of SmoothQuant is not from 0 to 1, nor -1 for off", alpha=alpha)
        )


def _check_format(to: Format, precision: str, out: object) -> None:
    """Check the options of a format that is only written."""
    if to not in _NEVER_RUN:
        return
    if out is None:
        raise UsageError(
            _("--to {to} writes files for another machine; give a folder with --out", to=to)
        )
    if precision == "int8":
        raise UsageError(
            _(
                "--to {to} has no precision 'int8': its own tools quantise; give float32 or "
                "float16",
                to=to,
            )
        )
    if to == "coreml":
        coreml.check_coremltools()


def finish_export(
    original: Embedder,
    folder: Path,
    runtime: Runtime,
    precision: GraphPrecision,
    graphs: tuple[Graph, Graph],
    calibration: Calibration | None,
    smooth_quant_alpha: float | None,
    to: Format | None = None,
) -> Exported:
    """Turn a folder with float32 ONNX graphs into an export: convert them, add all other files."""
    image, text = convert_graphs(
        folder, graphs, runtime, precision, original.config, calibration, smooth_quant_alpha
    )
    backend = original.backend
    assert isinstance(backend, TorchBackend)
    if to == "tensorrt":
        tensorrt.write_tensorrt(folder / tensorrt.FOLDER, original.config, image, text, precision)
    elif to == "coreml":
        coreml.write_coreml(backend.model, folder / coreml.FOLDER, precision)
    original.tokenizer.save(folder / _TOKENIZER, original.context_length)
    _write_json(
        folder / "tokenizer_config.json",
        _TOKENIZER_CONFIG | {"model_max_length": original.context_length},
    )
    _write_json(folder / "preprocessor_config.json", preprocessor_config(original.config))
    _write_golden(original, folder)
    exported = Exported(
        runtime=runtime,
        precision=precision,
        fingerprint="",
        derived_from=original.derived_from or original.fingerprint,
        model=original.config,
        logit_scale=original.logit_scale,
        parameters=original.parameter_count,
        image=image,
        text=text,
        files={name: hash_file(folder / name) for name in entries(folder)},
        deviation=Deviation(0.0, 0.0),
        opset=OPSET if runtime == "onnx" else None,
    )
    backend = open_export(folder, exported, runtime, device="cpu", test=False)
    exported = replace(
        exported,
        fingerprint=_fingerprint(exported).value,
        deviation=golden_deviation(folder, exported, backend),
    )
    write_exported(folder, exported)
    return exported


def _fingerprint(exported: Exported) -> Fingerprint:
    variants: list[str] = [exported.runtime, exported.precision]
    if exported.precision == "int8":  # it depends on the calibration images too
        variants += [exported.files[graph.file].sha256 for graph in (exported.image, exported.text)]
    return derived(exported.derived_from, variants)


def as_embedder(
    folder: Path,
    exported: Exported,
    config: ModelConfig,
    precision: str = "auto",
    *,
    test: bool = True,
) -> Embedder:
    """Open an export in its runtime, on the CPU."""
    backend = open_export(
        folder, exported, exported.runtime, device="cpu", precision=precision, test=test
    )
    fingerprint = Fingerprint(exported.fingerprint, exported.derived_from)
    return Embedder(backend, config, fingerprint=lambda: fingerprint)


def graph_names(
    prefix: str, precision: GraphPrecision, official_names: bool
) -> tuple[Graph, Graph]:
    """Return file, input and output names of the image and the text graph."""
    if not official_names:
        return (
            Graph("image.onnx", "pixel_values", "image_features"),
            Graph("text.onnx", "input_ids", "text_features"),
        )
    kind = {"float32": "fp32", "float16": "fp16", "int8": "int8"}[precision]
    return (
        Graph(f"{prefix}.img.{kind}.onnx", "image", "unnorm_image_features"),
        Graph(f"{prefix}.txt.{kind}.onnx", "text", "unnorm_text_features"),
    )


def _write_golden(original: Embedder, folder: Path) -> None:
    """Write a few images as prepared pixels, a few texts, and their embeddings."""
    sample = golden_sample()
    path = folder / GOLDEN
    path.parent.mkdir()
    prepared = [original.prepare_image(image) for image in sample.images]
    names = [f"{image.stem}.png" for image in sample.images]
    for name, pixels in zip(names, prepared, strict=True):
        Image.fromarray(np.moveaxis(pixels, 0, -1)).save(path.parent / name)
    texts = sample.queries
    ids = original.prepare_texts(texts)
    _write_json(
        path,
        {
            "images": [
                {"file": name, "embedding": embedding}
                for name, embedding in zip(
                    names, _rounded(original.embed_prepared_images(prepared)), strict=True
                )
            ],
            "texts": [
                {"text": text, "ids": text_ids, "embedding": embedding}
                for text, text_ids, embedding in zip(
                    texts, ids, _rounded(original.embed_prepared_texts(ids)), strict=True
                )
            ],
        },
    )


def _rounded(embeddings: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.8g}") for value in row] for row in embeddings]


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")


def _never_run(to: Format) -> str | None:
    if to not in _NEVER_RUN:
        return None
    message, path = _NEVER_RUN[to]
    return translate(message, path=path)
