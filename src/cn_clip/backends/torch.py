"""The PyTorch Embedder."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from cn_clip import weights
from cn_clip.config import ModelConfig
from cn_clip.errors import ImageError, UsageError
from cn_clip.image import ImageInput, normalize, read_image, read_pixels
from cn_clip.model.clip import CLIP
from cn_clip.tokenizer import Tokenizer, default_tokenizer

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PREPARATION = 1  # counts changes of preprocessing or tokenization that change embeddings
_IMAGES_PER_BATCH = 32
_COPIED = 1 << 22  # pixels of a PIL image, of which a copy may wait for a thread
_TEXTS_PER_BATCH = 256
_TOKENS_PER_BATCH = 4096
_TEXTS_AT_ONCE = 65_536  # tokenized and sorted by length together


class TorchEmbedder:
    """Runs a ``CLIP`` on a device; see ``cn_clip.Embedder`` for what it promises."""

    def __init__(
        self, model: CLIP, *, tokenizer: Tokenizer | None = None, fast_decode: bool = False
    ) -> None:
        if model.config.vision.kind != "vit":  # convolutions are faster with channels last
            model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self.tokenizer = tokenizer or default_tokenizer()
        self.fast_decode = fast_decode
        self._device = model.text_projection.device

    @classmethod
    def from_path(
        cls,
        path: Path,
        *,
        expected: ModelConfig | None = None,
        device: str = "auto",
        precision: str = "auto",
        fast_decode: bool = False,
    ) -> TorchEmbedder:
        """Load a checkpoint, of the model ``expected``; the rest is as for ``cn_clip.load``."""
        target = pick_device(device)
        dtype = pick_precision(precision, target)
        checkpoint = weights.read(path)
        if expected is not None:
            weights.check_model(checkpoint.config, expected, path)
        model = weights.build(checkpoint, dtype=dtype).to(target)
        return cls(model.requires_grad_(False), fast_decode=fast_decode)

    @property
    def name(self) -> str:
        return self.model.config.name

    @property
    def dim(self) -> int:
        return self.model.config.embed_dim

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().float().exp())

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        config = self.model.config.to_dict() | {"name": None, "fast_decode": self.fast_decode}
        config |= {"vocab": self.tokenizer.vocab, "preparation": _PREPARATION}
        digest.update(json.dumps(config, sort_keys=True).encode())
        weights.add_to_digest(digest, self.model.state_dict())
        return digest.hexdigest()[:32]

    def embed_images(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        errors: dict[int, ImageError] | None = None,
    ) -> npt.NDArray[np.float32]:
        rows = [np.empty((0, self.dim), dtype=np.float32)]
        workers = min(4, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers, thread_name_prefix="cn_clip-decode") as pool:
            ahead = _ahead(pool, self._prepare, _each_image(images), 2 * _IMAGES_PER_BATCH)
            with closing(ahead) as prepared:
                readable = _readable(prepared, errors)
                while batch := list(islice(readable, _IMAGES_PER_BATCH)):
                    rows.append(self._run_images(np.stack(batch)))
        return np.concatenate(rows)

    def embed_texts(self, texts: str | Iterable[str]) -> npt.NDArray[np.float32]:
        if not isinstance(texts, Iterable):
            raise UsageError(f"{texts!r:.60} is neither a string nor a list of strings")
        every = iter([texts] if isinstance(texts, str) else texts)
        rows = [np.empty((0, self.dim), dtype=np.float32)]
        while some := list(islice(every, _TEXTS_AT_ONCE)):
            rows.append(self._embed_some_texts(some))
        return np.concatenate(rows)

    def _prepare(self, source: ImageInput) -> npt.NDArray[np.float32]:
        config = self.model.config
        pixels = read_pixels(
            source,
            config.vision.resolution,
            fast_decode=self.fast_decode,
            background=config.background,
        )
        return normalize(pixels, config.image_mean, config.image_std)

    # Not inference_mode: weights that training has shared out (FSDP2) could not be gathered in it.
    @torch.no_grad()
    def _run_images(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        features = self.model.encode_image(torch.from_numpy(pixels).to(self._device))
        return _unit(features)

    def _embed_some_texts(self, texts: list[str]) -> npt.NDArray[np.float32]:
        ids = self.tokenizer.encode(texts, self.model.config.context_length)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
        out = np.empty((len(ids), self.dim), dtype=np.float32)
        while by_length:
            longest = len(ids[by_length[0]])
            count = max(1, min(_TEXTS_PER_BATCH, _TOKENS_PER_BATCH // longest))
            batch, by_length = by_length[:count], by_length[count:]
            out[batch] = self._run_texts(self.tokenizer.pad([ids[i] for i in batch], longest))
        return out

    @torch.no_grad()
    def _run_texts(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return _unit(self.model.encode_text(torch.from_numpy(ids).to(self._device)))


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device of that name; ``"auto"`` is CUDA, then Apple's MPS, then the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        picked = torch.device(device)
        usable = picked.type != "meta" and bool(torch.ones(1, device=picked).cpu())
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError):
        usable = False  # each kind of device says in its own way, at length, that there is none
    if not usable:
        raise UsageError(
            f"device {str(device)!r} cannot be used here; torch {torch.__version__} has: "
            f"{', '.join(_devices())}"
        )
    return picked


def _devices() -> list[str]:
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; ``"auto"`` is float16 on CUDA and float32 elsewhere.

    Raises:
        UsageError: there is no such precision.
    """
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if precision not in _PRECISIONS:
        available = ", ".join(["auto", *_PRECISIONS])
        raise UsageError(f"unknown precision {precision!r}; available: {available}")
    return _PRECISIONS[precision]


def _each_image(images: ImageInput | Iterable[ImageInput]) -> Iterator[ImageInput]:
    """Let one picture stand for a list of one; a 4-dimensional array is a batch already."""
    if isinstance(images, np.ndarray):
        yield from [images] if images.ndim < 4 else images
    elif isinstance(images, str | os.PathLike | bytes | bytearray | Image.Image):
        yield images
    elif not isinstance(images, Iterable):
        raise ImageError(f"{images!r:.60} is neither a picture nor a list of pictures")
    else:
        yield from images


def _ahead(
    pool: ThreadPoolExecutor,
    prepare: Callable[[ImageInput], npt.NDArray[np.float32]],
    images: Iterator[ImageInput],
    depth: int,
) -> Generator[npt.NDArray[np.float32] | ImageError]:
    """Yield prepared pictures, or why they are not, in order; at most ``depth`` in hand."""

    def attempt(image: ImageInput) -> npt.NDArray[np.float32] | ImageError:
        try:
            return prepare(image)
        except ImageError as error:
            return error

    waiting: deque[Future[npt.NDArray[np.float32] | ImageError]] = deque()
    try:
        for image in images:
            if isinstance(image, Image.Image):
                # Opened lazily, it must be decoded by one thread; a bad one fails below again.
                if image.width * image.height > _COPIED:
                    waiting.append(_done(attempt(image)))
                else:
                    with suppress(ImageError):
                        image = read_image(image)
                    waiting.append(pool.submit(attempt, image))
            else:
                waiting.append(pool.submit(attempt, image))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # on an error or Ctrl-C, do not decode what nobody waits for
        for future in waiting:
            future.cancel()


def _done(
    result: npt.NDArray[np.float32] | ImageError,
) -> Future[npt.NDArray[np.float32] | ImageError]:
    future: Future[npt.NDArray[np.float32] | ImageError] = Future()
    future.set_result(result)
    return future


def _readable(
    prepared: Iterable[npt.NDArray[np.float32] | ImageError], errors: dict[int, ImageError] | None
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield what could be prepared; collect errors by index, or raise the first."""
    for index, result in enumerate(prepared):
        if not isinstance(result, ImageError):
            yield result
        elif errors is None:
            raise result
        else:
            errors[index] = result


def _unit(features: torch.Tensor) -> npt.NDArray[np.float32]:
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    return unit.cpu().numpy()
