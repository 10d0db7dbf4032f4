"""The fastest precision whose loss of recall on a given set is small enough."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cn_clip.backends.exported import Exported, GraphPrecision, Runtime
from cn_clip.backends.torch import TorchBackend
from cn_clip.cache import cache_folder
from cn_clip.embedder import Embedder, load, locate
from cn_clip.errors import CheckpointError, UsageError
from cn_clip.export import (
    ExportResult,
    as_embedder,
    check_alpha,
    export,
    finish_export,
    graph_names,
)
from cn_clip.export.calibration import calibration_of
from cn_clip.export.graphs import write_graphs
from cn_clip.export.parity import REQUIRED_COSINE, Parity, Reference
from cn_clip.export.scored_set import ScoredSet
from cn_clip.outputs import claim, own_folder
from cn_clip.sample import embedded_sample
from cn_clip.translation import _

_IMAGES, _ROUNDS = 16, 7  # of the measurement of speed
_NOISE = 0.03  # speeds that differ by less are equal; the smaller export is taken


@dataclass(frozen=True, slots=True)
class Trial:
    """One precision, measured.

    Attributes:
        stored: precision of the weights.
        precision: of the arithmetic too, such as ``"int8+bfloat16"``: that of ``cn_clip.load``.
        images_per_second: of prepared images, in batches of 16.
        texts_per_second: of the texts of the sample in the package.
        bytes: size of the export.
        parity: agreement with the original.
        drop: loss of the score to float32, in points; negative for a gain.
        holds: whether it holds the bar for the drop and those for the cosine.
    """

    stored: GraphPrecision
    precision: str
    images_per_second: float
    texts_per_second: float
    bytes: int
    parity: Parity
    drop: float
    holds: bool

    @property
    def seconds(self) -> float:
        """Seconds for one image and one text."""
        return 1 / self.images_per_second + 1 / self.texts_per_second


@dataclass(frozen=True, slots=True)
class Choice:
    """What was written, and all that was tried.

    Attributes:
        result: the export of the chosen precision.
        chosen: its trial. ``precision`` is what ``cn_clip.load`` needs.
        trials: all, float32 first.
        refused: messages for precisions that are wrong on this CPU.
        metric: ``"mean recall"`` or ``"accuracy"``.
        score: of float32, from 0 to 1.
        failed: messages for unreadable rows and images of the set, which are excluded.
    """

    result: ExportResult
    chosen: Trial
    trials: list[Trial]
    refused: list[str]
    metric: str
    score: float
    failed: list[str]


def export_fastest(
    model: str | os.PathLike[str] = "mini",
    out: str | os.PathLike[str] | None = None,
    *,
    dataset: str,
    max_recall_drop: float,
    to: Runtime = "onnx",
    images: Sequence[Path] = (),
    smooth_quant_alpha: float | None = None,
    official_names: bool = False,
    overwrite: bool = False,
) -> Choice:
    """Export a model in every precision, measure each, and write the fastest that holds a bar.

    Args:
        model: as for ``export``.
        out: as for ``export``.
        dataset: the evaluation set, see ``ScoredSet``.
        max_recall_drop: the largest loss to float32 in points: of the mean of the six recalls, or
            of the accuracy.
        to: the format of the graphs.
        images: files to calibrate int8 on, none of the evaluation set; empty for the sample in the
            package.
        smooth_quant_alpha: as for ``export``.
        official_names: as for ``export``.
        overwrite: as for ``export``.

    Raises:
        UsageError: an option is unknown, ``out`` exists or holds other files, or an image for
            calibration is in the evaluation set.
        DataError: the set cannot be read.
        CheckpointError: the model cannot be exported.
    """
    if to not in get_args(Runtime):
        raise UsageError(
            _(
                "unknown {option} {value!r}; available: {known}",
                option="format",
                value=to,
                known=", ".join(get_args(Runtime)),
            )
        )
    if not max_recall_drop >= 0:
        raise UsageError(
            _("a recall drop of {drop} points; give a number of at least 0", drop=max_recall_drop)
        )
    check_alpha(smooth_quant_alpha, to, None)
    path = locate(model)
    beside = cache_folder() / "exports"
    if out is not None:  # fail before hours of work
        check = own_folder("export")
        beside = claim(out, check, kind="folder", inputs=[path], overwrite=overwrite).parent
    scored = ScoredSet(dataset)
    scored.check_unseen(images)
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=beside) as work:
        trials, refused, score = _try_all(
            load(model, backend="torch", device="cpu", precision="float32"),
            Path(work).resolve(),
            to,
            scored,
            max_recall_drop,
            images,
            smooth_quant_alpha,
        )
    chosen = pick(trials)
    if chosen is None:
        raise CheckpointError(
            _(
                "no precision of {model} in {format} is close enough to the original; the smallest "
                "cosine of {precision} is {cosine:.6f}",
                model=model,
                format=to,
                precision=trials[0].precision,
                cosine=trials[0].parity.smallest_cosine,
            )
        )
    result = export(
        model,
        out,
        to=to,
        precision=chosen.stored,
        images=images,
        smooth_quant_alpha=smooth_quant_alpha if chosen.stored == "int8" else None,
        official_names=official_names,
        overwrite=overwrite,
    )
    return Choice(result, chosen, trials, refused, scored.metric, score, scored.failed)


def pick(trials: Sequence[Trial]) -> Trial | None:
    """Return the fastest trial that holds the bar; the smallest of those that are as fast."""
    holding = [trial for trial in trials if trial.holds]
    least = min((trial.seconds for trial in holding), default=0.0)
    equal = [trial for trial in holding if trial.seconds <= (1 + _NOISE) * least]
    return min(equal, key=lambda trial: trial.bytes, default=None)


def _try_all(
    original: Embedder,
    folder: Path,
    to: Runtime,
    scored: ScoredSet,
    max_drop: float,
    images: Sequence[Path],
    alpha: float | None,
) -> tuple[list[Trial], list[str], float]:
    """Measure every precision; return the trials, why others are refused, and float32's score."""
    sample = embedded_sample()
    reference = Reference(original, [*sample.images, *images], sample.texts)
    calibration = calibration_of(original, images, ())
    backend = original.backend
    assert isinstance(backend, TorchBackend)
    traced = folder / "traced"
    traced.mkdir()
    names = graph_names("", "float32", False)
    write_graphs(backend.model, traced, *names)
    exports: dict[GraphPrecision, Exported] = {}
    opened: dict[tuple[GraphPrecision, str], Embedder] = {}
    refused = []
    for stored in get_args(GraphPrecision):
        place = shutil.copytree(traced, folder / stored)
        exports[stored] = finish_export(
            original, place, to, stored, names, calibration if stored == "int8" else None, alpha
        )
        for precision in _arithmetic(to, stored):
            try:
                embedder = as_embedder(place, exports[stored], original.config, precision)
            except UsageError:  # the CPU does not have it
                continue
            except CheckpointError as error:  # the self-test: it is wrong on this CPU
                refused.append(str(error))
                continue
            opened[stored, embedder.backend.precision] = embedder
    speeds = _speeds(list(opened.values()), original)
    scores = [scored.score(embedder) for embedder in opened.values()]
    trials = []
    for ((stored, precision), embedder), speed, score in zip(
        opened.items(), speeds, scores, strict=True
    ):
        parity = reference.compare(embedder)
        drop = 100 * (scores[0] - score)
        trials.append(
            Trial(
                stored=stored,
                precision=precision,
                images_per_second=speed[0],
                texts_per_second=speed[1],
                bytes=sum(file.bytes for file in exports[stored].files.values()),
                parity=parity,
                drop=drop,
                holds=drop <= max_drop and parity.smallest_cosine >= _required_cosine(precision),
            )
        )
    return trials, refused, scores[0]


def _required_cosine(precision: str) -> float:
    return min(REQUIRED_COSINE[part] for part in precision.split("+"))


def _arithmetic(to: Runtime, stored: GraphPrecision) -> list[str]:
    """Return the precisions to load an export in; ONNX Runtime has one for each graph."""
    return ["auto", "bfloat16"] if to == "openvino" and stored != "float16" else ["auto"]


def _speeds(embedders: Sequence[Embedder], original: Embedder) -> list[tuple[float, float]]:
    """Return images and texts per second of each embedder, the best of interleaved rounds."""
    sample = embedded_sample()
    images = [original.prepare_image(image) for image in sample.images[:_IMAGES]]
    ids = original.prepare_texts(sample.texts)
    seconds = [(float("inf"), float("inf"))] * len(embedders)
    for _round in range(_ROUNDS):
        for n, embedder in enumerate(embedders):
            start = time.perf_counter()
            embedder.embed_prepared_images(images)
            middle = time.perf_counter()
            embedder.embed_prepared_texts(ids)
            end = time.perf_counter()
            seconds[n] = min(seconds[n][0], middle - start), min(seconds[n][1], end - middle)
    return [(len(images) / image, len(ids) / text) for image, text in seconds]
