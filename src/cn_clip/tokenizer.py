"""Chinese text to token ids: BERT WordPiece over 21,128 tokens, with the `tokenizers` library.

The ids equal those that the published weights were trained with: the tokenizer itself lowercases
text and replaces the quotes “ ” by ``"``, so no caller has to.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from cn_clip.errors import UsageError
from cn_clip.translation import _

CONTEXT_LENGTH = 52

# Unicode blocks that BERT splits into single characters; kana and hangul are not among them.
_IDEOGRAPHS = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
    "\U0002f800-\U0002fa1f"
)

# A forked worker, such as a DataLoader's, tokenizes on one thread. Setting this silences the
# library's warning that its thread pool does not survive a fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        after_in_child=lambda: os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    )


class TruncationWarning(UserWarning):
    """A text was longer than the context length and was truncated."""


class Tokenizer:
    """Converts texts to token ids; can be shared between threads, pickled and forked.

    Attributes:
        vocab: token to id.
        truncated: number of texts truncated so far. The first one warns, the rest only count.
    """

    def __init__(self, vocab_file: str | os.PathLike[str] | None = None) -> None:
        """Read a vocabulary, one token per line; the default is that of all Chinese-CLIP models."""
        self._vocab_file = vocab_file
        self.vocab = _read_vocab(vocab_file)
        self.truncated = 0
        self._lock = threading.Lock()
        self._pad, self._cls, self._sep = (self.vocab[t] for t in ("[PAD]", "[CLS]", "[SEP]"))
        self._rust = _word_piece(self.vocab)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str | os.PathLike[str] | None]]:
        return Tokenizer, (self._vocab_file,)

    def __call__(
        self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH
    ) -> npt.NDArray[np.int64]:
        """Return ids of shape (N, ``context_length``): ``[CLS]`` text ``[SEP]``, padded with 0.

        Raises:
            UsageError: a text is not a string, or ``context_length`` is too small.
        """
        return self.pad(self.encode(texts, context_length), context_length)

    def encode(
        self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH
    ) -> list[list[int]]:
        """Return at most ``context_length`` ids per text, without padding."""
        if context_length < 2:
            raise UsageError(
                _(
                    "context_length {context_length} leaves no room for [CLS] and [SEP]; use 52",
                    context_length=context_length,
                )
            )
        max_pieces = context_length - 2
        truncated = 0
        rows = []
        for encoding in self._rust.encode_batch_fast(_lowered(texts), add_special_tokens=False):
            ids = encoding.ids
            truncated += len(ids) > max_pieces
            rows.append([self._cls, *ids[:max_pieces], self._sep])
        if truncated:
            self._count_truncated(truncated, context_length)
        return rows

    def pad(self, rows: Sequence[Sequence[int]], length: int) -> npt.NDArray[np.int64]:
        """Return ``rows`` as one array of shape (N, ``length``), padded with the padding id."""
        padded = np.full((len(rows), length), self._pad, dtype=np.int64)
        for padded_row, row in zip(padded, rows, strict=True):
            padded_row[: len(row)] = row
        return padded

    def save(self, path: str | os.PathLike[str], context_length: int = CONTEXT_LENGTH) -> None:
        """Write ``tokenizer.json`` for the `tokenizers` library, transformers and transformers.js.

        Its ids equal ours, except for a Greek final sigma, lone surrogates, and special tokens
        that are part of the text, such as "[MASK]".
        """
        exported = _word_piece(self.vocab)
        exported.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
        exported.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self._cls), ("[SEP]", self._sep)],
        )
        exported.enable_truncation(context_length)
        exported.save(os.fspath(path))

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text, such as ``['皮', '卡', '丘']``, without special tokens."""
        pieces: list[str] = self._rust.encode_batch(_lowered(text), add_special_tokens=False)[
            0
        ].tokens
        return pieces

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Return ids of tokens, as the official tokenizer; ``KeyError`` if one is unknown."""
        return [self.vocab[token] for token in tokens]

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Return tokens of ids, as the official tokenizer; ``KeyError`` if one is unknown."""
        return [self.inv_vocab[int(index)] for index in ids]

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Id to token, as in the official tokenizer."""
        return {index: token for token, index in self.vocab.items()}

    def vocab_size(self) -> int:
        """Return the number of tokens, as the official tokenizer."""
        return len(self.vocab)

    def _count_truncated(self, count: int, context_length: int) -> None:
        with self._lock:
            first = self.truncated == 0
            self.truncated += count
        if first:
            warnings.warn(
                _(
                    "{count} text(s) longer than {context_length} tokens were truncated; shorten "
                    "them, or raise context_length if the model was trained with more. Further "
                    "texts are only counted, in Tokenizer.truncated",
                    count=count,
                    context_length=context_length,
                ),
                TruncationWarning,
                stacklevel=4,
            )


@cache
def default_tokenizer() -> Tokenizer:
    """Return the tokenizer that all Chinese-CLIP models share, built once."""
    return Tokenizer()


def _read_vocab(path: str | os.PathLike[str] | None) -> dict[str, int]:
    source = files("cn_clip").joinpath("assets/vocab.txt") if path is None else Path(path)
    # Not splitlines(): one token is itself a line separator, U+2028.
    try:
        tokens = source.read_bytes().decode("utf-8").rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(
            _("the vocabulary {path} cannot be read: {error}", path=path, error=error)
        ) from None
    vocab = {token.strip(): index for index, token in enumerate(tokens)}
    missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in vocab]
    if missing:
        raise UsageError(
            _("{path} is not a BERT vocabulary: it has no {missing}", path=path, missing=missing[0])
        )
    return vocab


def _word_piece(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200)
    )
    # Not BertNormalizer and BertPreTokenizer: they drop private-use characters (in training these
    # were [UNK]), miss 256 ideographs and use an older Unicode version.
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("[“”]"), '"'),
            normalizers.Replace(Regex("(?![\\t\\n\\r])[\\p{Cc}\\p{Cf}\ufffd]"), ""),
            normalizers.Lowercase(),
            normalizers.NFD(),
            normalizers.Replace(Regex(r"\p{Mn}"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(rf"[\p{{P}}$+<=>^`|~{_IDEOGRAPHS}]"), "isolated"),
        ]
    )
    return tokenizer


def _lowered(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(
                _(
                    "text {index} is {text!r:.40} ({text_type}); expected a string",
                    index=index,
                    text=text,
                    text_type=type(text).__name__,
                )
            )
    # str.lower() handles a final sigma; the per-character lowering in Rust does not.
    lowered = [text.lower() for text in texts]
    try:
        "".join(lowered).encode()
    except UnicodeEncodeError:  # lone surrogates, from a badly decoded file: unknown characters
        lowered = [
            "".join("\ue000" if "\ud800" <= c <= "\udfff" else c for c in text) for text in lowered
        ]
    return lowered
