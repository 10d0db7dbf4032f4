"""The official module path of the tokenizer, for scripts that import it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.resources import files

from cn_clip.errors import UsageError
from cn_clip.tokenizer import Tokenizer
from cn_clip.translation import _

# What the official function joins again, in English.
_JOINED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class FullTokenizer(Tokenizer):
    """The tokenizer under its official name, with the official methods.

    Unlike the official one, ``tokenize`` replaces the quotes “ ” by ``"``, as in training.
    """

    def __init__(
        self, vocab_file: str | os.PathLike[str] | None = None, do_lower_case: bool = True
    ) -> None:
        """Read a vocabulary, one token per line; the default is that of all Chinese-CLIP models.

        Raises:
            UsageError: ``do_lower_case`` is false: the models were trained in lower case.
        """
        if not do_lower_case:
            raise UsageError(_("do_lower_case is False; the models know lower case only"))
        super().__init__(vocab_file)

    @staticmethod
    def convert_tokens_to_string(
        tokens: Iterable[str], clean_up_tokenization_spaces: bool = True
    ) -> str:
        """Return tokens as one text, with spaces between words."""
        text = " ".join(tokens).replace(" ##", "").strip()
        for apart, joined in _JOINED if clean_up_tokenization_spaces else ():
            text = text.replace(apart, joined)
        return text


def default_vocab() -> str:
    """Return the path of the vocabulary that all Chinese-CLIP models share."""
    return str(files("cn_clip").joinpath("assets/vocab.txt"))
