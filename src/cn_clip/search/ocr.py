"""Text in images, recognised by RapidOCR, whose package carries the PP-OCR models; offline."""

from __future__ import annotations

import importlib
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cn_clip.errors import ImageError, UsageError
from cn_clip.image.decode import ImageInput, describe, read_image
from cn_clip.translation import _

MAX_SIDE = 1280  # pixels of the longer side; larger images are reduced
# Smaller images are enlarged up to this shorter side: characters of 10 pixels are missed half as
# often (benchmarks/text_in_images.py).
_SMALL_SIDE, _FACTOR = 320, 2.0
MAX_TILES = 8  # of a long screenshot
_TILE_RATIO = 2.5  # longer side to shorter side, above which an image is cut into tiles
_OVERLAP = 0.1  # of a tile, so that a line at a border is whole in one of two
_MIN_SIDE = 8  # pixels: nothing is legible below

_DETECTOR = "PP-OCRv6_det_small.onnx"
_RECOGNISER = "PP-OCRv6_rec_small.onnx"


Box = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A recognised line of text.

    ``score`` is the mean probability of its characters, 0 to 1. ``box`` are its corners (x, y) in
    pixels of the image, clockwise from the top left of the text, which may be rotated.
    """

    text: str
    score: float
    box: Box


class TextReader:
    """Reads Chinese, Latin and Japanese text and digits in images. Thread-safe.

    The models are loaded once, 31 MB; ``recognize`` may run in several threads at once, each with
    ``threads`` threads of ONNX Runtime.

    Attributes:
        name: packages and models, for the stamp of stored texts: with another one, texts differ.
    """

    def __init__(self, *, threads: int = 1, min_score: float = 0.5) -> None:
        """Load the models.

        Args:
            threads: of one call of ``recognize``.
            min_score: lines with a lower score are dropped.

        Raises:
            UsageError: RapidOCR or ONNX Runtime is not installed, or does not load.
        """
        self._engine, version = _load(threads, min_score)
        self.name = f"rapidocr {version} {Path(_RECOGNISER).stem}"

    def recognize(self, image: ImageInput) -> list[Line]:
        """Return the lines of text of an image, from top to bottom and left to right.

        Images above ``MAX_SIDE`` pixels are reduced, small ones enlarged, and long screenshots read
        in tiles. An image without text has no lines.

        Args:
            image: a PIL image, or anything that ``cn_clip.image.decode.read_image`` reads.

        Raises:
            ImageError: the image is unreadable.
        """
        decoded = read_image(image, background="white").convert("RGB")
        lines = []
        for tile in _tiles(*decoded.size):
            part = decoded if tile.box == (0, 0, *decoded.size) else decoded.crop(tile.box)
            left, top = tile.box[:2]
            for line in self._recognize_tile(part, describe(image)):
                box = tuple((x + left, y + top) for x, y in line.box)
                if tile.owns(box):
                    lines.append(Line(line.text, line.score, box))
        return lines

    def _recognize_tile(self, image: Image.Image, name: str) -> list[Line]:
        if min(image.size) < _MIN_SIDE:
            return []
        pixels, scale = _resized(image)
        try:
            result = self._engine(pixels)
        except MemoryError:
            raise ImageError(
                _("{name} needs more memory than available; make it smaller first", name=name)
            ) from None
        # Pixels of a file reach a third-party pipeline here, which documents no exceptions.
        except Exception as error:
            reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
            raise ImageError(
                _("the text in {name} cannot be read ({reason})", name=name, reason=reason)
            ) from error
        if getattr(result, "txts", None) is None or getattr(result, "boxes", None) is None:
            return []
        return [
            Line(text, float(score), tuple((float(x) / scale, float(y) / scale) for x, y in box))
            for text, score, box in zip(result.txts, result.scores, result.boxes, strict=True)
        ]


def _load(threads: int, min_score: float) -> tuple[Any, str]:
    """Return RapidOCR's engine and version."""
    try:
        rapidocr = importlib.import_module("rapidocr")
        opencv = importlib.import_module("cv2")
        importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UsageError(
            _(
                "text in images needs {package}: pip install rapidocr onnxruntime",
                package=error.name or "rapidocr",
            )
        ) from None
    models = Path(str(rapidocr.__file__)).parent / "models"
    params = {
        # Paths, because RapidOCR downloads a model that is missing or changed.
        "Det.model_path": str(models / _DETECTOR),
        "Rec.model_path": str(models / _RECOGNISER),
        "Det.limit_type": "max",  # "min" enlarges small images
        "Det.limit_side_len": MAX_SIDE,
        "Global.max_side_len": MAX_SIDE,
        "Global.use_cls": False,  # lines that are upside down
        "Global.text_score": min_score,
        "Global.log_level": "critical",
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    try:
        engine = rapidocr.RapidOCR(params=params)
        blank = np.full((48, 96, 3), 255, np.uint8)
        engine(blank, use_det=False)  # models are loaded on first use; the setting stays
        engine(blank, use_det=True)
        version = importlib.import_module("importlib.metadata").version("rapidocr")
    # A third-party package, possibly damaged or of another version, is started here.
    except Exception as error:
        reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
        raise UsageError(
            _(
                "rapidocr does not start ({reason}); install it again: pip install -I "
                "'rapidocr>=3.10,<4' onnxruntime",
                reason=reason,
            )
        ) from error
    opencv.setNumThreads(threads)
    logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
    return engine, version


def _resized(image: Image.Image) -> tuple[npt.NDArray[np.uint8], float]:
    """Return BGR pixels (H, W, 3) in the size that is read, and the factor of the sides."""
    scale = min(MAX_SIDE / max(image.size), _FACTOR, max(1.0, _SMALL_SIDE / min(image.size)))
    if scale != 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1]), scale


@dataclass(frozen=True, slots=True)
class _Tile:
    """A part of an image, and the ``zone`` on its longer axis whose lines are kept.

    Tiles overlap, their zones do not: a line at the border of a tile is whole in the next one, and
    is kept there only.
    """

    box: tuple[int, int, int, int]
    axis: int
    zone: tuple[float, float]

    def owns(self, box: Box) -> bool:
        centre = sum(corner[self.axis] for corner in box) / len(box)
        return self.zone[0] <= centre < self.zone[1]


def _tiles(width: int, height: int) -> list[_Tile]:
    """Return the tiles of an image; one, unless it is long and large."""
    axis, longer, shorter = (1, height, width) if height >= width else (0, width, height)
    ideal = max(MAX_SIDE, _TILE_RATIO * shorter)  # pixels of the longer side
    count = min(MAX_TILES, math.ceil((longer / ideal - _OVERLAP) / (1 - _OVERLAP)))
    if count < 2:
        return [_Tile((0, 0, width, height), axis, (-math.inf, math.inf))]
    length = math.ceil(longer / (count - (count - 1) * _OVERLAP))
    starts = [round(n * (longer - length) / (count - 1)) for n in range(count)]
    borders = [(starts[n] + starts[n - 1] + length) / 2 for n in range(1, count)]
    zones = zip([-math.inf, *borders], [*borders, math.inf], strict=True)
    return [
        _Tile(
            (0, start, width, start + length) if axis else (start, 0, start + length, height),
            axis,
            zone,
        )
        for start, zone in zip(starts, zones, strict=True)
    ]
