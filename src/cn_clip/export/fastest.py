"""The fastest precision whose loss of recall on a given set is small enough."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import onnx

from cn_clip.backends.exported import Exported, Graph, GraphPrecision, Runtime, cached_export
from cn_clip.backends.torch import TorchBackend
from cn_clip.embedder import Embedder, load, locate
from cn_clip.errors import CheckpointError, UsageError
from cn_clip.export import (
    ExportResult,
    as_embedder,
    check_alpha,
    finish_export,
    graph_names,
)
from cn_clip.export.graphs import write_graphs
from cn_clip.export.int8_inputs import calibration_of
from cn_clip.export.parity import REQUIRED_COSINE, Parity, Reference
from cn_clip.export.precision import save_in_place
from cn_clip.export.scored_set import ScoredSet
from cn_clip.outputs import atomic_folder, claim, own_folder
from cn_clip.publish import map_write_errors, temporary_beside
from cn_clip.sample import embedded_sample
from cn_clip.translation import _

_STORED: tuple[GraphPrecision, ...] = get_args(GraphPrecision)
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
        drop: loss of the score to the original in torch, in points; negative for a gain.
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
        trials: of all precisions that work on this CPU.
        refused: messages for precisions that are wrong on this CPU.
        metric: ``"mean recall"`` or ``"accuracy"``.
        score: of the original in torch, from 0 to 1.
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
        max_recall_drop: the largest loss to the original in points: of the mean of the six recalls,
            or of the accuracy.
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

    def target(stored: GraphPrecision) -> Path:
        return claim(
            cached_export(path, to, stored) if out is None else out,
            own_folder("export"),
            kind="folder",
            inputs=[path, *images],
            overwrite=overwrite or out is None,
        )

    targets = {stored: target(stored) for stored in _STORED}  # fail before hours of work
    names = {
        stored: graph_names(place.name, stored, official_names) for stored, place in targets.items()
    }
    beside = Path(os.path.realpath(targets["float32"]))
    scored = ScoredSet(dataset)
    scored.check_unseen(images)
    with map_write_errors(beside):
        beside.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(beside) as work:
            original = load(model, backend="torch", device="cpu", precision="float32")
            exports = _Exports(original, work, to, names, images, smooth_quant_alpha)
            trials, refused, score = _try_all(exports, scored, max_recall_drop, images)
            chosen = pick(trials)
            if chosen is None:
                raise CheckpointError(_why_none(str(model), to, trials, refused))
            place = target(chosen.stored)
            with map_write_errors(place), atomic_folder(place, "export") as folder:
                shutil.copytree(exports.place(chosen.stored), folder, dirs_exist_ok=True)
    exported = exports.made[chosen.stored]
    result = ExportResult(
        model=original.name,
        out=str(place),
        format=to,
        runtime=to,
        precision=chosen.stored,
        fingerprint=exported.fingerprint,
        derived_from=exported.derived_from,
        bytes=chosen.bytes,
        parity=chosen.parity,
        never_run=None,
    )
    return Choice(result, chosen, trials, refused, scored.metric, score, scored.failed)


def _why_none(model: str, to: Runtime, trials: Sequence[Trial], refused: Sequence[str]) -> str:
    if not trials:
        return _(
            "no precision of {model} in {format} works on this CPU: {reason}",
            model=model,
            format=to,
            reason=refused[0],
        )
    best = min(trials, key=lambda trial: trial.drop)
    return _(
        "no precision of {model} in {format} is close enough to the original; {precision} loses "
        "{drop:.2f} points, at a smallest cosine of {cosine:.6f}",
        model=model,
        format=to,
        precision=best.precision,
        drop=best.drop,
        cosine=best.parity.smallest_cosine,
    )


def pick(trials: Sequence[Trial]) -> Trial | None:
    """Return the fastest trial that holds the bar; the smallest of those that are as fast."""
    holding = [trial for trial in trials if trial.holds]
    least = min((trial.seconds for trial in holding), default=0.0)
    equal = [trial for trial in holding if trial.seconds <= (1 + _NOISE) * least]
    return min(equal, key=lambda trial: trial.bytes, default=None)


class _Exports:
    """Exports of one model in every precision, from one float32 trace."""

    def __init__(
        self,
        original: Embedder,
        folder: Path,
        to: Runtime,
        names: Mapping[GraphPrecision, tuple[Graph, Graph]],
        images: Sequence[Path],
        alpha: float | None,
    ) -> None:
        """Trace the model; ``folder`` is for temporary files."""
        backend = original.backend
        assert isinstance(backend, TorchBackend)
        self.original, self.made = original, dict[GraphPrecision, Exported]()
        self.to, self._folder, self._names, self._alpha = to, folder, names, alpha
        self._calibration = calibration_of(original, images, ())
        self._traced = folder / "traced"
        self._traced.mkdir()
        write_graphs(backend.model, self._traced, *names["float32"])

    def place(self, stored: GraphPrecision) -> Path:
        """Return the folder of an export."""
        return self._folder / stored

    def make(self, stored: GraphPrecision) -> None:
        """Write the export in one precision."""
        names, place = self._names[stored], self.place(stored)
        shutil.copytree(self._traced, place)
        for old, new in zip(self._names["float32"], names, strict=True):
            if new.file != old.file:
                save_in_place(onnx.load(place / old.file), place / new.file)
                (place / old.file).unlink()
                (place / f"{old.file}.data").unlink()
        calibration = self._calibration if stored == "int8" else None
        alpha = self._alpha if stored == "int8" else None
        self.made[stored] = finish_export(
            self.original, place, self.to, stored, names, calibration, alpha
        )


def _try_all(
    exports: _Exports, scored: ScoredSet, max_drop: float, images: Sequence[Path]
) -> tuple[list[Trial], list[str], float]:
    """Measure every precision; return trials, why others are refused, and the original's score."""
    sample, original = embedded_sample(), exports.original
    reference = Reference(original, [*sample.images, *images], sample.texts)
    opened: dict[tuple[GraphPrecision, str], Embedder] = {}
    refused = []
    for stored in _STORED:
        exports.make(stored)
        place, exported = exports.place(stored), exports.made[stored]
        for precision in _arithmetic(exports.to, stored):
            try:
                embedder = as_embedder(place, exported, original.config, precision)
            except UsageError:  # the CPU does not have it
                continue
            except CheckpointError as error:  # the self-test: it is wrong on this CPU
                refused.append(str(error))
                continue
            opened[stored, embedder.backend.precision] = embedder
    speeds = _speeds(list(opened.values()), original)
    base = scored.score(original)  # not float32's, which may be refused
    trials = []
    for ((stored, precision), embedder), speed in zip(opened.items(), speeds, strict=True):
        parity = reference.compare(embedder)
        drop = 100 * (base - scored.score(embedder))
        trials.append(
            Trial(
                stored=stored,
                precision=precision,
                images_per_second=speed[0],
                texts_per_second=speed[1],
                bytes=sum(file.bytes for file in exports.made[stored].files.values()),
                parity=parity,
                drop=drop,
                holds=drop <= max_drop and parity.smallest_cosine >= _required_cosine(precision),
            )
        )
    return trials, refused, base


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
