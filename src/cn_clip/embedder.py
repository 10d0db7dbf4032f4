"""Images and texts to comparable vectors, whatever backend runs the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cn_clip import hub
from cn_clip.backends import Backend, ParameterCount
from cn_clip.backends.pipeline import (
    ImagePreparation,
    PreparedImage,
    batches_by_length,
    each_image,
    prepared_ahead,
    unit_length,
)
from cn_clip.config import MODELS, BackendName, ModelConfig, Precision
from cn_clip.errors import ImageError, UnknownModelError, UsageError
from cn_clip.fingerprint import Fingerprint
from cn_clip.image.decode import MAX_PIXELS, ImageInput
from cn_clip.tokenizer import Tokenizer, default_tokenizer

if TYPE_CHECKING:
    from cn_clip.model.clip import CLIP

Embeddings = npt.NDArray[np.float32]

_TEXTS_PER_BATCH = 256
_TOKENS_PER_BATCH = 4096
_TEXTS_AT_ONCE = 65_536  # tokenized and sorted by length together


class Embedder:
    """A loaded model: images and Chinese texts to vectors of unit length in one space.

    Images are decoded in threads beside the model and run in batches; texts are run in batches of
    similar length. Results keep the order of the inputs. Safe to use from several threads.

    Attributes:
        backend: runs the two towers.
        config: the model's shape and preprocessing.
        tokenizer: counts the texts it had to cut, in ``Tokenizer.truncated``.
        batch_size: images in a batch.
    """

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        *,
        fingerprint: Callable[[], Fingerprint],
        tokenizer: Tokenizer | None = None,
        fast_decode: bool = False,
        max_pixels: int = MAX_PIXELS,
        batch_size: int = 32,
    ) -> None:
        """Join a backend with the preparation of its inputs.

        Args:
            backend: runs the towers.
            config: of the model that it runs.
            fingerprint: called once, on first use: it reads all weights.
            tokenizer: by default the one of every Chinese-CLIP.
            fast_decode: decode large JPEG files at reduced size.
            max_pixels: larger images are refused before they are decoded.
            batch_size: images in a batch.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} is below 1; the default is 32")
        self.backend, self.config = backend, config
        self.tokenizer = tokenizer or default_tokenizer()
        self.batch_size = batch_size
        self.prepare_image: Callable[[ImageInput], PreparedImage] = ImagePreparation(
            config, fast_decode, max_pixels
        )
        self._fingerprint = fingerprint
        self._threads: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    @classmethod
    def from_model(
        cls, model: CLIP, *, fast_decode: bool = False, batch_size: int = 32
    ) -> Embedder:
        """Wrap a ``CLIP`` that is already in memory; it runs where and as it is."""
        from cn_clip.backends.torch import TorchBackend, model_fingerprint

        return cls(
            TorchBackend(model),
            model.config,
            fingerprint=lambda: model_fingerprint(model, fast_decode=fast_decode),
            fast_decode=fast_decode,
            batch_size=batch_size,
        )

    @property
    def name(self) -> str:
        """The model's name."""
        return self.config.name

    @property
    def dim(self) -> int:
        """Length D of an embedding."""
        return self.backend.dim

    @property
    def logit_scale(self) -> float:
        """The factor on cosines before a softmax, learned in training."""
        return self.backend.logit_scale

    @property
    def context_length(self) -> int:
        """Longest text in tokens, [CLS] and [SEP] included; longer ones are cut."""
        return self.config.context_length

    @property
    def parameter_count(self) -> ParameterCount:
        """Parameters of the image tower, and of the whole model."""
        return self.backend.parameter_count

    @property
    def fingerprint(self) -> str:
        """Changes whenever embeddings may: made of weights, precision and preprocessing."""
        return self._fingerprints.value

    @property
    def derived_from(self) -> str | None:
        """Fingerprint of the float32 model that this is another precision or runtime of."""
        return self._fingerprints.derived_from

    @cached_property
    def _fingerprints(self) -> Fingerprint:
        return self._fingerprint()

    def embed_images(self, images: ImageInput | Iterable[ImageInput]) -> Embeddings:
        """Return unit vectors, float32 (N, D), of paths, bytes, PIL images or uint8 arrays.

        Any number of them, or one alone. EXIF orientation is applied.

        Raises:
            ImageError: one of them cannot be used; it is named.
        """
        return self._embed_images(images, raise_errors=True)[0]

    def embed_readable(
        self, images: ImageInput | Iterable[ImageInput]
    ) -> tuple[Embeddings, dict[int, ImageError]]:
        """Embed the images that can be used; return their rows, and the errors by index.

        Rows are in the order of ``images``, without those whose index is among the errors.
        """
        return self._embed_images(images, raise_errors=False)

    def embed_texts(self, texts: str | Iterable[str]) -> Embeddings:
        """Return unit vectors, float32 (N, D). Any number; batched by length inside.

        Raises:
            UsageError: one of them is not a string.
        """
        if not isinstance(texts, Iterable):
            raise UsageError(f"{texts!r:.60} is neither a string nor a list of strings")
        every = iter([texts] if isinstance(texts, str) else texts)
        rows = [np.empty((0, self.dim), dtype=np.float32)]
        while some := list(islice(every, _TEXTS_AT_ONCE)):
            rows.append(self.embed_prepared_texts(self.prepare_texts(some)))
        return np.concatenate(rows)

    def prepare_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, unpadded, for ``embed_prepared_texts``."""
        return self.tokenizer.encode(texts, self.context_length)

    def embed_prepared_images(self, images: Sequence[PreparedImage]) -> Embeddings:
        """Return unit vectors (N, D) of images from ``prepare_image``, in one batch."""
        return unit_length(self.backend.run_images(np.stack(images)))

    def embed_prepared_texts(self, ids: Sequence[Sequence[int]]) -> Embeddings:
        """Return unit vectors (N, D) of texts from ``prepare_texts``, in batches by length."""
        out = np.empty((len(ids), self.dim), dtype=np.float32)
        lengths = [len(each) for each in ids]
        for batch, longest in batches_by_length(
            lengths, max_rows=_TEXTS_PER_BATCH, max_tokens=_TOKENS_PER_BATCH
        ):
            padded = self.tokenizer.pad([ids[i] for i in batch], longest)
            mask = np.arange(longest) < np.array([lengths[i] for i in batch])[:, None]
            out[batch] = unit_length(self.backend.run_texts(padded, mask))
        return out

    def _embed_images(
        self, images: ImageInput | Iterable[ImageInput], *, raise_errors: bool
    ) -> tuple[Embeddings, dict[int, ImageError]]:
        rows = [np.empty((0, self.dim), dtype=np.float32)]
        batch: list[PreparedImage] = []
        errors: dict[int, ImageError] = {}
        depth = 2 * self.batch_size
        with closing(
            prepared_ahead(self._pool(), self.prepare_image, each_image(images), depth)
        ) as ahead:
            for index, prepared in enumerate(ahead):
                if not isinstance(prepared, ImageError):
                    batch.append(prepared)
                elif raise_errors:
                    raise prepared
                else:
                    errors[index] = prepared
                if len(batch) == self.batch_size:
                    rows.append(self.embed_prepared_images(batch))
                    batch = []
        if batch:
            rows.append(self.embed_prepared_images(batch))
        return np.concatenate(rows), errors

    def _pool(self) -> ThreadPoolExecutor:
        """Return the decoding threads, which live as long as the embedder; a fork has its own."""
        if self._threads is None or self._process != os.getpid():
            workers = min(4, os.cpu_count() or 1)
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="cn_clip-decode")
            self._process = os.getpid()
        return self._threads


def load(
    name_or_path: str | os.PathLike[str] = hub.EMBEDDED,
    *,
    backend: BackendName = "auto",
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
    from cn_clip.backends.torch import (  # torch takes a second to import
        TorchBackend,
        file_fingerprint,
        load_model,
        model_fingerprint,
    )

    model = load_model(path, expected=MODELS.get(name), device=device, precision=precision)
    running = TorchBackend(model)

    def fingerprint() -> Fingerprint:
        if running.precision == "float32":
            return model_fingerprint(model, fast_decode=fast_decode)
        return file_fingerprint(path, running.precision, fast_decode=fast_decode)

    return Embedder(running, model.config, fingerprint=fingerprint, fast_decode=fast_decode)


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
