"""An exported model on disk: its config, graphs and golden vectors. This module needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from cn_clip.backends import ParameterCount
from cn_clip.cache import cache_folder
from cn_clip.config import ModelConfig, read_config_json
from cn_clip.errors import CheckpointError
from cn_clip.format_version import FIELD, Format
from cn_clip.translation import _

Runtime = Literal["onnx", "openvino"]
GraphPrecision = Literal["float32", "float16", "int8"]
"""Precision of the stored weights; ``float16`` weights are computed with in float32."""

FORMAT = Format("export", 1)
CONFIG, GOLDEN = "config.json", "golden/golden.json"


@dataclass(frozen=True, slots=True)
class Graph:
    """One tower: the graph's file, and the names of its input and output."""

    file: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and hash of one file of an export."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Deviation:
    """Largest 1 - cosine to the float32 original, over the golden images and texts."""

    image: float
    text: float


@dataclass(frozen=True, slots=True)
class Exported:
    """The content of an export's ``config.json``.

    Attributes:
        runtime: the graph format: ONNX, or OpenVINO's IR.
        precision: of the stored weights.
        fingerprint: identifies this export's embeddings.
        derived_from: fingerprint of the float32 original.
        model: the model's config.
        logit_scale: the factor on cosines before a softmax.
        parameters: number of parameters.
        image: the image graph: float32 (batch, 3, S, S) to (batch, D).
        text: the text graph: int64 (batch, length) to (batch, D), 0 for padding.
        files: by name relative to the folder.
        deviation: measured when it was exported.
        opset: ONNX operator set, None for another format.
    """

    runtime: Runtime
    precision: GraphPrecision
    fingerprint: str
    derived_from: str
    model: ModelConfig
    logit_scale: float
    parameters: ParameterCount
    image: Graph
    text: Graph
    files: Mapping[str, FileDigest]
    deviation: Deviation
    opset: int | None = None


@dataclass(frozen=True, slots=True)
class GoldenVectors:
    """Images uint8 (N, 3, S, S) and token ids (M, L), with float32 embeddings (N, D), (M, D)."""

    pixels: npt.NDArray[np.uint8]
    image_embeddings: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64]
    text_embeddings: npt.NDArray[np.float32]


def is_export(path: Path) -> bool:
    """Whether a path is a folder that ``cn-clip export`` wrote."""
    config = path / CONFIG
    if not os.path.isfile(config):
        return False
    values = read_config_json(config)
    return isinstance(values, dict) and str(values.get(FIELD)).startswith("cn-clip export ")


def write_exported(folder: Path, exported: Exported) -> None:
    """Write ``config.json``."""
    values = {FIELD: str(FORMAT)} | asdict(exported)
    values["parameters"] = exported.parameters._asdict()
    text = json.dumps(values, ensure_ascii=False, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def read_exported(folder: Path) -> Exported:
    """Read ``config.json`` of an export.

    Raises:
        CheckpointError: the config is damaged or of a newer version, or a file is missing or has
            another size.
    """
    path = folder / CONFIG
    values = read_config_json(path)
    if not isinstance(values, dict) or FIELD not in values:
        raise CheckpointError(
            _("{path} is not that of an export; make one with `cn-clip export`", path=path)
        )
    FORMAT.check(values[FIELD], path, CheckpointError, _("export the model again"))
    try:
        exported = Exported(
            runtime=_one_of(values["runtime"], get_args(Runtime)),
            precision=_one_of(values["precision"], get_args(GraphPrecision)),
            fingerprint=_string(values["fingerprint"]),
            derived_from=_string(values["derived_from"]),
            model=ModelConfig.from_dict(values["model"]),
            logit_scale=_number(values["logit_scale"]),
            parameters=ParameterCount(**{k: int(v) for k, v in values["parameters"].items()}),
            image=_graph(values["image"]),
            text=_graph(values["text"]),
            files={
                _file_name(name): FileDigest(int(v["bytes"]), _string(v["sha256"]))
                for name, v in values["files"].items()
            },
            deviation=Deviation(**{k: _number(v) for k, v in values["deviation"].items()}),
            opset=values.get("opset"),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            _(
                "{path} is damaged ({error_type}: {error}); export the model again",
                path=path,
                error_type=type(error).__name__,
                error=error,
            )
        ) from None
    _check_sizes(folder, exported)
    return exported


def check_hashes(folder: Path, exported: Exported) -> None:
    """Raise a ``CheckpointError`` if the content of a file changed since the export."""
    for name, digest in exported.files.items():
        if hash_file(folder / name).sha256 != digest.sha256:
            raise CheckpointError(
                _(
                    "{folder} changed since the export (its SHA-256 differs); export the model "
                    "again, or copy the folder again",
                    folder=folder / name,
                )
            )


def hash_file(path: Path) -> FileDigest:
    """Return size and SHA-256 of a file."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
            return FileDigest(os.fstat(stream.fileno()).st_size, digest.hexdigest())
    except OSError as error:
        raise CheckpointError(
            _("{path} cannot be read: {reason}", path=path, reason=error.strerror)
        ) from None


def read_golden(folder: Path, exported: Exported) -> GoldenVectors:
    """Read the golden vectors of an export.

    Raises:
        CheckpointError: they are damaged or do not fit the model.
    """
    path = folder / GOLDEN
    values = read_config_json(path)
    size, dim = exported.model.vision.resolution, exported.model.embed_dim
    try:
        names = [_file_name(v["file"]) for v in values["images"]]
        pixels = [_read_pixels(path.parent / name, size) for name in names]
        rows = [v["ids"] for v in values["texts"]]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, text_ids in zip(ids, rows, strict=True):
            row[: len(text_ids)] = text_ids
        golden = GoldenVectors(
            pixels=np.stack(pixels),
            image_embeddings=np.array([v["embedding"] for v in values["images"]], np.float32),
            ids=ids,
            text_embeddings=np.array([v["embedding"] for v in values["texts"]], np.float32),
        )
    except (
        KeyError,
        TypeError,
        ValueError,
        OSError,
        OverflowError,
        Image.DecompressionBombError,
    ) as error:
        raise CheckpointError(
            _("{path} is damaged ({error}); export the model again", path=path, error=error)
        ) from None
    if golden.pixels.shape[1:] != (3, size, size) or any(
        embeddings.shape[1:] != (dim,)
        for embeddings in (golden.image_embeddings, golden.text_embeddings)
    ):
        raise CheckpointError(
            _(
                "{path} does not fit the model in {config}; export the model again",
                path=path,
                config=CONFIG,
            )
        )
    return golden


def cached_export(checkpoint: Path, runtime: Runtime, precision: GraphPrecision) -> Path:
    """Return the folder, which may not exist, for an export without ``--out`` of a checkpoint.

    It is another folder once the checkpoint changed.
    """
    status = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _weights_of(checkpoint)]
    key = json.dumps([os.path.realpath(checkpoint), status])
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return cache_folder() / "exports" / f"{checkpoint.stem}-{runtime}-{precision}-{digest}"


def _weights_of(checkpoint: Path) -> list[Path]:
    if not checkpoint.is_dir():
        return [checkpoint]
    suffixes = (".bin", ".json", ".pt", ".safetensors")
    return sorted(p for p in checkpoint.iterdir() if p.suffix in suffixes and p.is_file())


def _check_sizes(folder: Path, exported: Exported) -> None:
    for name in (exported.image.file, exported.text.file, GOLDEN):
        if name not in exported.files:
            raise CheckpointError(
                _(
                    "{folder} lists no {name}; export the model again",
                    folder=folder / CONFIG,
                    name=name,
                )
            )
    for name, digest in exported.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(
                _("{path} is missing; copy the folder again, or export again", path=path)
            )
        if path.stat().st_size != digest.bytes:
            raise CheckpointError(
                _(
                    "{path} has {st_size:,} bytes, the export had {bytes:,}; copy the folder "
                    "again, or export again",
                    path=path,
                    st_size=path.stat().st_size,
                    bytes=digest.bytes,
                )
            )


def _read_pixels(path: Path, size: int) -> npt.NDArray[np.uint8]:
    with Image.open(path, formats=["PNG"]) as image:
        if image.size != (size, size):
            raise ValueError(f"{path.name} has {image.width} x {image.height} pixels")
        return np.ascontiguousarray(np.moveaxis(np.asarray(image.convert("RGB")), -1, 0))


def _graph(values: Mapping[str, Any]) -> Graph:
    return Graph(_file_name(values["file"]), _string(values["input"]), _string(values["output"]))


def _file_name(value: Any) -> str:
    parts = _string(value).split("/")
    if any(part in ("", ".", "..") or set(part) & {"\\", "\0", ":"} for part in parts):
        raise ValueError(_("{value!r} is not a file in the folder", value=value))
    return str(value)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(_("{value!r:.40} is not a string", value=value))
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(_("{value!r:.40} is not a finite number", value=value))
    return float(value)


def _one_of(value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise ValueError(_("{value!r:.40} is none of {known}", value=value, known=", ".join(known)))
    return value
