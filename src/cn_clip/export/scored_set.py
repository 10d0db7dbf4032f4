"""An evaluation set of pairs or labelled images, as one number for a model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from cn_clip.data.sources.open import open_mix
from cn_clip.embedder import Embedder
from cn_clip.errors import CNClipError, ImageError, UsageError
from cn_clip.eval.dataset import EvalSet, eval_set_of
from cn_clip.eval.labelled import LABELS, LabelledImages, read_labelled
from cn_clip.eval.retrieval import measure
from cn_clip.eval.zeroshot import DatasetInfo, datasets, evaluate_zeroshot, read_templates
from cn_clip.translation import N_, _


class ScoredSet:
    """Scores models by the mean of the six recalls of pairs, or by accuracy on labelled images.

    Attributes:
        metric: what ``score`` returns.
        failed: a message for each unreadable row or image, which are excluded, once scored.
    """

    def __init__(self, spec: str) -> None:
        """Read the rows of a set; no image is opened.

        Args:
            spec: KIND:PATH of pairs, as for ``cn-clip eval retrieval``, or a folder with
                ``label_cn.txt``, as for ``cn-clip eval zeroshot``.
        """
        self._data: EvalSet | LabelledImages
        self.failed: list[str] = []
        if os.path.isfile(os.path.join(spec, LABELS)):
            self._data = read_labelled(Path(spec))
            info = datasets().get(Path(spec).resolve().name, DatasetInfo())
            self._templates = read_templates(info.templates)
            self.metric = N_("accuracy")
        else:
            self._data = eval_set_of(open_mix([spec]))
            self.metric = N_("mean recall")

    def score(self, embedder: Embedder) -> float:
        """Return the score of a model, from 0 to 1."""
        if isinstance(self._data, LabelledImages):
            scores = evaluate_zeroshot(embedder, self._data, self._templates)
            self.failed = scores.failed
            return scores.top1
        result = measure(embedder, self._data)
        self.failed = result.failed
        return result.recall.mean_recall

    def check_unseen(self, images: Sequence[Path]) -> None:
        """Check that no file for calibration is an image of the set.

        Raises:
            UsageError: a file is.
            ImageError: a file cannot be read.
        """
        if not images:
            return
        given = {path: _digest(_read(path)) for path in images}
        hashes = {_digest(content) for content in self._contents()}
        both = [path for path, digest in given.items() if digest in hashes]
        if both:
            raise UsageError(
                _(
                    "{count:,} of the images for calibration are in the evaluation set, such as "
                    "{path}; give others, or none for the sample in the package",
                    count=len(both),
                    path=both[0],
                )
            )

    def _contents(self) -> Iterator[bytes]:
        """Yield the bytes of each readable image; the others are reported by ``score``."""
        for index in range(len(self._data.images)):
            with suppress(CNClipError, OSError):
                if isinstance(self._data, LabelledImages):
                    yield self._data.images[index].read_bytes()
                else:
                    yield self._data.image_bytes(index)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(
            _("{name} cannot be read: {reason}", name=path, reason=error.strerror)
        ) from None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
