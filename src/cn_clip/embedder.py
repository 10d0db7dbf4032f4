"""One way to turn pictures and texts into comparable vectors, whatever runs underneath."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cn_clip import hub
from cn_clip.config import MODELS, Backend, Precision
from cn_clip.errors import ImageError, UnknownModelError, UsageError
from cn_clip.image import ImageInput


class Embedder(Protocol):
    """A loaded model: pictures and Chinese texts to vectors of unit length in one space."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def dim(self) -> int:
        """Length D of an embedding."""

    @property
    def logit_scale(self) -> float:
        """The factor on cosines before a softmax, learned in training."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever embeddings may: made of weights, precision and preprocessing."""

    def embed_images(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        errors: dict[int, ImageError] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return unit vectors, float32 (N, D), of paths, bytes, PIL images or uint8 arrays.

        Any number: they are decoded beside the model and run in batches. EXIF orientation is
        applied. With ``errors``, pictures that cannot be used are left out of the rows, and
        collected there by their index.

        Raises:
            ImageError: one of them cannot be used, and there is no ``errors``; it is named.
        """

    def embed_texts(self, texts: str | Iterable[str]) -> npt.NDArray[np.float32]:
        """Return unit vectors, float32 (N, D). Any number; batched by length inside.

        Raises:
            UsageError: one of them is not a string.
        """


def load(
    name_or_path: str | os.PathLike[str] = hub.EMBEDDED,
    *,
    backend: Backend = "auto",
    device: str = "auto",
    precision: Precision = "auto",
    fast_decode: bool = False,
    download_root: str | os.PathLike[str] | None = None,
) -> Embedder:
    """Load a model for embedding.

    Args:
        name_or_path: ``"mini"`` (in the package, no download), an official name such as
            ``"ViT-B-16"``, the path of an official ``.pt`` file, of a folder that this package
            wrote or of a Hugging Face ``ChineseCLIPModel``, or ``"org/name"`` of a repository that
            holds one. Files say themselves which model they hold.
        backend: what runs the model.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; ``"auto"`` takes a GPU if there is
            one.
        precision: ``"auto"`` is float16 on CUDA and float32 elsewhere.
        fast_decode: decode large JPEG files at reduced size. Faster; embeddings differ slightly.
        download_root: where official files are looked for first, and fetched to.

    Raises:
        UnknownModelError: no such name and no such path; the nearest name is offered.
        MissingWeightsError: the weights are neither here nor to be fetched.
        CheckpointError: the file is damaged, refused or of no known model.
        UsageError: the device, backend or precision cannot be had.
    """
    if backend not in ("auto", "torch"):
        raise UsageError(f"unknown backend {backend!r}; available: auto, torch")
    if device not in ("auto", "cpu"):  # before anything is read, or even fetched
        from cn_clip.backends.torch import pick_device

        pick_device(device)
    given = os.fspath(name_or_path)
    if not given.strip():
        raise UsageError(
            f"the model's name is empty; give a path or one of: {', '.join(hub.names())}"
        )
    name = given.replace("/", "-")  # OpenAI writes ViT-B/16
    if name in hub.names():
        path = hub.locate(name, download_root=download_root)
    elif hub.is_repository(given) and not os.path.exists(given):
        path = hub.locate(given, download_root=download_root)
    else:
        path = _existing(given)
    from cn_clip.backends.torch import TorchEmbedder  # torch takes a second to import

    return TorchEmbedder.from_path(
        path,
        expected=MODELS.get(name),
        device=device,
        precision=precision,
        fast_decode=fast_decode,
    )


def embed_readable(
    embedder: Embedder, images: Sequence[ImageInput]
) -> tuple[npt.NDArray[np.float32], dict[int, ImageError]]:
    """Embed the pictures that can be read; return their rows, and the errors by index.

    Rows are in the order of ``images``, without those whose index is among the errors.
    """
    errors: dict[int, ImageError] = {}
    return embedder.embed_images(images, errors=errors), errors


def _existing(given: str) -> Path:
    try:
        path = Path(given).expanduser()
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, no such user
        raise UsageError(f"{given!r:.80} is no usable path: {error}") from None
    if path.suffix or "/" in given or os.sep in given:
        raise UsageError(f"no such file or folder: {given!r}")
    raise UnknownModelError("model", given, hub.names())
