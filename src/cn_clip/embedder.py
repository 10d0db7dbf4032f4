"""``Embedder``: image and text embeddings, whatever backend runs the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import numpy.typing as npt

from cn_clip import hub
from cn_clip.backends import Backend, ParameterCount
from cn_clip.backends.exported import (
    GraphPrecision,
    Runtime,
    cached_export,
    is_export,
    read_exported,
)
from cn_clip.backends.pipeline import (
    ImagePreparation,
    PreparedImage,
    batches_by_length,
    is_tensor,
    iter_images,
    prepare_ahead,
    tensor_values,
    unit_length,
)
from cn_clip.config import MODELS, BackendName, ModelConfig, Precision, full_precision
from cn_clip.errors import ImageError, UnknownModelError, UsageError
from cn_clip.fingerprint import Fingerprint, derived
from cn_clip.image.decode import MAX_PIXELS, ImageInput
from cn_clip.preprocessing import Preprocess, Tokenize
from cn_clip.processes import usable_cpus
from cn_clip.progress import ProgressOption, counted
from cn_clip.tokenizer import Tokenizer, default_tokenizer
from cn_clip.translation import _

if TYPE_CHECKING:
    from torch import Tensor

    from cn_clip.model.clip import CLIP

Embeddings = npt.NDArray[np.float32]

_TEXTS_PER_BATCH = 256
# Precisions of cached exports that serve a precision of ``load``, the first that exists.
_STORED: dict[str, tuple[GraphPrecision, ...]] = {
    "auto": ("float32", "float16", "int8"),
    "bfloat16": ("float32", "float16", "int8"),
    "int8+bfloat16": ("int8",),
}
_TOKENS_PER_BATCH = 4096
_TEXTS_PER_CHUNK = 65_536  # tokenized and sorted by length together


class Embedder:
    """A loaded model: embeds images and Chinese texts as unit vectors in one space.

    Images are decoded in threads while the model runs. Texts are batched by length. Results keep
    the order of the inputs. Thread-safe.

    Attributes:
        backend: runs the two towers.
        config: the model's architecture and preprocessing.
        tokenizer: counts truncated texts in ``Tokenizer.truncated``.
        batch_size: images per batch.
        fast_decode, max_pixels: how images are decoded.
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
        trainable: Callable[[], CLIP] | None = None,
    ) -> None:
        """Create an embedder from a backend.

        Args:
            backend: runs the towers.
            config: config of the backend's model.
            fingerprint: called once, on first use, because it reads all weights.
            tokenizer: the default is the tokenizer shared by all Chinese-CLIP models.
            fast_decode: decode large JPEG files at reduced size.
            max_pixels: larger images are refused before they are decoded.
            batch_size: images per batch.
            trainable: returns a new float32 copy of the model, for ``trainable_model``.
        """
        _check_batch_size(batch_size)
        if max_pixels < 1:
            raise UsageError(
                _(
                    "max_pixels {max_pixels} is below 1; the default is {limit}",
                    max_pixels=max_pixels,
                    limit=MAX_PIXELS,
                )
            )
        self.backend, self.config = backend, config
        self.tokenizer = tokenizer or default_tokenizer()
        self.batch_size = batch_size
        self.fast_decode, self.max_pixels = fast_decode, max_pixels
        self.prepare_image: Callable[[ImageInput], PreparedImage] = ImagePreparation(
            config, fast_decode, max_pixels
        )
        self._fingerprint = fingerprint
        self._trainable = trainable
        self._threads: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    @classmethod
    def from_model(
        cls,
        model: CLIP,
        *,
        fast_decode: bool = False,
        max_pixels: int = MAX_PIXELS,
        batch_size: int = 32,
    ) -> Embedder:
        """Wrap a ``CLIP`` in memory; it keeps its device and precision."""
        from cn_clip.backends.torch import TorchBackend, model_fingerprint

        return cls(
            TorchBackend(model),
            model.config,
            fingerprint=partial(model_fingerprint, model, fast_decode=fast_decode),
            fast_decode=fast_decode,
            max_pixels=max_pixels,
            batch_size=batch_size,
            trainable=partial(_float32_copy, model),
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_threads": None}

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
        """The learned factor on cosines before a softmax."""
        return self.backend.logit_scale

    @property
    def context_length(self) -> int:
        """Maximum number of tokens, [CLS] and [SEP] included; longer texts are truncated."""
        return self.config.context_length

    @property
    def parameter_count(self) -> ParameterCount:
        """Number of parameters of the image tower and of the whole model."""
        return self.backend.parameter_count

    @property
    def fingerprint(self) -> str:
        """Hash of weights, precision and preprocessing: it changes if embeddings may change."""
        return self._fingerprints.value

    @property
    def derived_from(self) -> str | None:
        """Fingerprint of the float32 original, if this is another precision or runtime of it."""
        return self._fingerprints.derived_from

    @cached_property
    def _fingerprints(self) -> Fingerprint:
        return self._fingerprint()

    @cached_property
    def preprocess(self) -> Preprocess:
        """The function from one image to the pixels that the model takes, a float32 tensor
        (3, S, S). It can be pickled, for the workers of a ``DataLoader``."""
        return Preprocess(ImagePreparation(self.config, self.fast_decode, self.max_pixels))

    @cached_property
    def tokenize(self) -> Tokenize:
        """The function from texts to token ids, an int64 tensor (N, ``context_length``). It can be
        pickled, for the workers of a ``DataLoader``."""
        return Tokenize(self.tokenizer, self.context_length)

    def trainable_model(self) -> CLIP:
        """Return a new float32 copy of the model, in eval mode, whose parameters have gradients.

        Training it changes nothing here; ``Embedder.from_model`` embeds with it.

        Raises:
            UsageError: the model is an export.
        """
        if self._trainable is None:
            raise UsageError(
                _(
                    "{name} is an export, which cannot be trained; load the original checkpoint",
                    name=self.name,
                )
            )
        return self._trainable().eval().requires_grad_(True)

    def embed_images(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int | None = None,
        progress: ProgressOption = False,
    ) -> Embeddings:
        """Return unit vectors, float32 (N, D), of images. EXIF orientation is applied.

        Args:
            images: one image or any number of them: paths, bytes, PIL images, arrays (H, W, 3) or
                uint8 tensors (3, H, W). A folder is all images in it, in the order of
                ``cn_clip.find_images([folder])``. Float tensors (3, S, S) or (N, 3, S, S) are
                outputs of ``preprocess``.
            batch_size: images per batch; the default is that of the embedder.
            progress: True shows a bar on stderr; a function is called with (done, total).

        Raises:
            ImageError: an image is unreadable; the message names it.
            UsageError: ``batch_size`` is below 1.
        """
        return self._embed_images(images, batch_size, progress, raise_errors=True)[0]

    def embed_readable(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int | None = None,
        progress: ProgressOption = False,
    ) -> tuple[Embeddings, dict[int, ImageError]]:
        """Embed the readable images; return their embeddings (N, D) and the errors by index.

        Embeddings are in the order of ``images``, without those that have an error. Arguments as
        for ``embed_images``.
        """
        return self._embed_images(images, batch_size, progress, raise_errors=False)

    def embed_texts(
        self,
        texts: str | Iterable[str] | Tensor,
        *,
        batch_size: int | None = None,
        progress: ProgressOption = False,
    ) -> Embeddings:
        """Return unit vectors, float32 (N, D), of texts.

        Args:
            texts: one text or any number of them, or token ids (N, L) from ``tokenize``.
            batch_size: texts per batch; by default they are batched by length.
            progress: True shows a bar on stderr; a function is called with (done, total).

        Raises:
            UsageError: a text is not a string, an id is not in the vocabulary, or ``batch_size``
                is below 1.
        """
        if not isinstance(texts, Iterable):
            raise UsageError(
                _("{texts!r:.60} is neither a string nor a list of strings", texts=texts)
            )
        given = [texts] if isinstance(texts, str) else texts
        embeddings = [np.empty((0, self.dim), dtype=np.float32)]
        total = len(given) if isinstance(given, Sized) else None
        with counted(progress, _("embedding texts"), total) as advance:
            for chunk in self._prepared_chunks(given):
                embeddings.append(self._embed_ids(chunk, batch_size, advance))
        return np.concatenate(embeddings)

    def _prepared_chunks(self, texts: Iterable[str] | Tensor) -> Iterator[list[list[int]]]:
        """Yield the token ids of many texts at a time."""
        if is_tensor(texts):
            yield self._ids_of(tensor_values(texts))
            return
        remaining = iter(cast(Iterable[str], texts))
        while chunk := list(islice(remaining, _TEXTS_PER_CHUNK)):
            yield self.prepare_texts(chunk)

    def _ids_of(self, ids: npt.NDArray[np.int64]) -> list[list[int]]:
        """Return the rows (N, L) of a tensor of token ids, without padding."""
        limit = len(self.tokenizer.vocab)
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.min(initial=0) < 0:
            raise UsageError(
                _(
                    "a tensor of {dtype} and shape {shape} is not token ids (N, L); give the "
                    "output of tokenize",
                    dtype=ids.dtype,
                    shape=ids.shape,
                )
            )
        if ids.shape[1] > self.config.text.max_positions or ids.max(initial=0) >= limit:
            raise UsageError(
                _(
                    "the token ids reach {largest} in {length} columns; the model has {limit} "
                    "tokens and {positions} positions",
                    largest=int(ids.max(initial=0)),
                    length=ids.shape[1],
                    limit=limit,
                    positions=self.config.text.max_positions,
                )
            )
        lengths = np.where(ids != 0, np.arange(1, ids.shape[1] + 1), 1).max(axis=1, initial=1)
        return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]

    def prepare_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without padding, for ``embed_prepared_texts``."""
        return self.tokenizer.encode(texts, self.context_length)

    def embed_prepared_images(self, images: Sequence[PreparedImage]) -> Embeddings:
        """Return unit vectors (N, D) of images from ``prepare_image``, in one batch."""
        return unit_length(self.backend.run_images(np.stack(images)))

    def embed_prepared_texts(self, ids: Sequence[Sequence[int]]) -> Embeddings:
        """Return unit vectors (N, D) of texts from ``prepare_texts``, in batches by length."""
        return self._embed_ids(ids)

    def _embed_ids(
        self,
        ids: Sequence[Sequence[int]],
        batch_size: int | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Embeddings:
        rows, tokens = _TEXTS_PER_BATCH, _TOKENS_PER_BATCH
        if batch_size is not None:
            _check_batch_size(batch_size)
            rows, tokens = batch_size, batch_size * self.config.text.max_positions
        out = np.empty((len(ids), self.dim), dtype=np.float32)
        lengths = [len(text_ids) for text_ids in ids]
        for batch, length in batches_by_length(lengths, max_rows=rows, max_tokens=tokens):
            padded = self.tokenizer.pad([ids[i] for i in batch], length)
            mask = np.arange(length) < np.array([lengths[i] for i in batch])[:, None]
            out[batch] = unit_length(self.backend.run_texts(padded, mask))
            advance(len(batch))
        return out

    def _embed_images(
        self,
        images: ImageInput | Iterable[ImageInput],
        batch_size: int | None,
        progress: ProgressOption,
        *,
        raise_errors: bool,
    ) -> tuple[Embeddings, dict[int, ImageError]]:
        size = self.batch_size if batch_size is None else batch_size
        _check_batch_size(size)
        embeddings = [np.empty((0, self.dim), dtype=np.float32)]
        batch: list[PreparedImage] = []
        errors: dict[int, ImageError] = {}
        sources, total = iter_images(images)
        with (
            counted(progress, _("embedding images"), total) as advance,
            closing(prepare_ahead(self._pool(), self.prepare_image, sources, 2 * size)) as ahead,
        ):
            for index, prepared in enumerate(ahead):
                if isinstance(prepared, ImageError):
                    if raise_errors:
                        raise prepared
                    errors[index] = prepared
                    advance(1)
                    continue
                # Pixels and normalised pixels cannot be in one array.
                if len(batch) == size or (batch and batch[0].dtype != prepared.dtype):
                    embeddings.append(self.embed_prepared_images(batch))
                    advance(len(batch))
                    batch = []
                batch.append(prepared)
            if batch:
                embeddings.append(self.embed_prepared_images(batch))
                advance(len(batch))
        return np.concatenate(embeddings), errors

    def _pool(self) -> ThreadPoolExecutor:
        """Return the decoding threads; they are reused, but never by a forked process."""
        if self._threads is None or self._process != os.getpid():
            workers = min(4, usable_cpus())
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="cn_clip-decode")
            self._process = os.getpid()
        return self._threads


def _float32_copy(model: CLIP) -> CLIP:
    return deepcopy(model).float()


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UsageError(
            _("batch_size {batch_size} is below 1; the default is 32", batch_size=batch_size)
        )


def load(
    name_or_path: str | os.PathLike[str] = hub.EMBEDDED,
    *,
    backend: BackendName = "auto",
    device: str = "auto",
    precision: Precision = "auto",
    fast_decode: bool = False,
    max_pixels: int = MAX_PIXELS,
    download_root: str | os.PathLike[str] | None = None,
) -> Embedder:
    """Load a model for embedding.

    Args:
        name_or_path: ``"mini"`` (in the package, no download), an official name such as
            ``"ViT-B-16"``, the path of an official ``.pt`` file, of a folder or export that this
            package wrote or of a Hugging Face ``ChineseCLIPModel``, or ``"org/name"`` of a
            repository that has one. The model is detected from the file.
        backend: ``"torch"`` for checkpoints; ``"onnx"`` or ``"openvino"`` for exports, see
            ``cn_clip.export``. ``"auto"`` is the fastest installed one for an export.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; ``"auto"`` takes a GPU if there is
            one.
        precision: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"fp32"``, ``"bf16"``,
            ``"fp16"``; for exports ``"int8"`` and, in OpenVINO, ``"int8+bfloat16"`` too: bfloat16
            in the layers that are not int8. ``"auto"`` is float16 on CUDA and float32 elsewhere.
        fast_decode: decode large JPEG files at reduced size. Faster; embeddings differ slightly.
        max_pixels: images with more pixels are refused before they are decoded; 2**27 by default.
        download_root: the folder that is searched first, and downloaded to.

    Raises:
        UnknownModelError: no such name and no such path; the nearest name is suggested.
        MissingWeightsError: the weights are neither on this machine nor downloadable.
        CheckpointError: the file is damaged, refused or not a known model.
        UsageError: the device, backend or precision is not available.
    """
    if backend not in get_args(BackendName):
        known = ", ".join(get_args(BackendName))
        raise UsageError(
            _("unknown backend {backend!r}; available: {known}", backend=backend, known=known)
        )
    precision = cast(Precision, full_precision(precision))
    in_torch = backend in ("auto", "torch") and not is_export(
        Path(os.path.expanduser(name_or_path))
    )
    if in_torch and device not in ("auto", "cpu"):  # fail before anything is read or downloaded
        from cn_clip.backends.torch import pick_device

        pick_device(device)
    path = locate(name_or_path, download_root=download_root)
    if backend in ("onnx", "openvino") and not is_export(path):
        path = _cached_export(path, os.fspath(name_or_path), backend, precision)
    if is_export(path):
        return _load_export(path, backend, device, precision, fast_decode, max_pixels)
    expected = MODELS.get(os.fspath(name_or_path).replace("/", "-"))
    from cn_clip.backends.torch import (  # torch takes a second to import
        TorchBackend,
        file_fingerprint,
        load_model,
        model_fingerprint,
    )

    model = load_model(path, expected=expected, device=device, precision=precision)
    torch_backend = TorchBackend(model)

    fingerprint: Callable[[], Fingerprint] = (
        partial(model_fingerprint, model, fast_decode=fast_decode)
        if torch_backend.precision == "float32"
        else partial(file_fingerprint, path, torch_backend.precision, fast_decode=fast_decode)
    )
    return Embedder(
        torch_backend,
        model.config,
        fingerprint=fingerprint,
        fast_decode=fast_decode,
        max_pixels=max_pixels,
        trainable=partial(load_model, path, expected=expected, device=device, precision="float32"),
    )


def locate(
    name_or_path: str | os.PathLike[str], *, download_root: str | os.PathLike[str] | None = None
) -> Path:
    """Return the file or folder of a model; arguments and errors are those of ``load``."""
    reference = os.fspath(name_or_path)
    if not reference.strip():
        raise UsageError(
            _(
                "the model name is empty; give a path or one of: {names}",
                names=", ".join(hub.names()),
            )
        )
    name = reference.replace("/", "-")  # OpenAI writes ViT-B/16
    if name in hub.names():
        return hub.locate(name, download_root=download_root)
    if os.path.exists(reference):
        return Path(reference)
    _refuse_unfinished_run(reference)
    if hub.is_repository(reference):
        return hub.locate(reference, download_root=download_root)
    return _existing_path(reference)


def _refuse_unfinished_run(reference: str) -> None:
    """Raise a ``UsageError`` for the missing result of a training run, such as ``run/final``."""
    path = Path(reference)
    if path.name == "final" and os.path.isfile(path.parent / "recipe.toml"):
        raise UsageError(
            _(
                "{path} does not exist yet: the training run in {run} has not finished; continue "
                "it with its command and --resume auto",
                path=reference,
                run=path.parent,
            )
        )


def exported_model(name_or_path: str | os.PathLike[str]) -> Path | None:
    """Return the float32 export of a checkpoint in the cache folder, which starts without torch.

    None if there is none, or ONNX Runtime is not installed. Arguments and errors as ``load``.
    """
    if find_spec("onnxruntime") is None:
        return None
    path = locate(name_or_path)
    if is_export(path):
        return None
    export = cached_export(path, "onnx", "float32")
    return export if is_export(export) else None


def _cached_export(path: Path, model: str, backend: str, precision: str) -> Path:
    """Return the export that ``cn-clip export`` without ``--out`` made of a checkpoint."""
    stored = _STORED.get(precision, (cast(GraphPrecision, precision),))
    folders = [
        cached_export(path, cast(Runtime, runtime), kept)
        for kept in stored
        for runtime in dict.fromkeys(("onnx", backend))  # OpenVINO runs ONNX exports too
    ]
    found = next(filter(is_export, folders), None)
    if found is not None:
        return found
    raise UsageError(
        _(
            "{model} has not been exported for backend {backend!r}; run once: cn-clip export "
            "--model {model} --to {backend} --precision {stored}",
            model=model,
            backend=backend,
            stored=stored[0],
        )
    )


def _load_export(
    path: Path, backend: str, device: str, precision: str, fast_decode: bool, max_pixels: int
) -> Embedder:
    if backend == "torch":
        raise UsageError(
            _(
                '{path} is an export, which torch cannot run; use backend "auto", or give the '
                "original checkpoint",
                path=path,
            )
        )
    from cn_clip.backends.choice import open_export

    exported = read_exported(path)
    graphs = open_export(path, exported, backend, device=device, precision=precision)
    variants = [graphs.precision] if graphs.precision != exported.precision else []
    variants += ["fast_decode"] if fast_decode else []
    value = derived(exported.fingerprint, variants).value
    return Embedder(
        graphs,
        exported.model,
        fingerprint=lambda: Fingerprint(value, exported.derived_from),
        fast_decode=fast_decode,
        max_pixels=max_pixels,
    )


def _existing_path(reference: str) -> Path:
    try:
        path = Path(reference).expanduser()
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, no such user
        raise UsageError(
            _("{reference!r:.80} is not a valid path: {error}", reference=reference, error=error)
        ) from None
    if hub.is_openai_name(reference):
        raise UnknownModelError(_("model"), reference, hub.names())
    if path.suffix or "/" in reference or os.sep in reference:
        raise UsageError(_("no such file or folder: {reference!r}", reference=reference))
    raise UnknownModelError(_("model"), reference, hub.names())
