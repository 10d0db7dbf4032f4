"""Messages that are no literals of the code, for extraction: see generate_catalogue.py.

The help comes from docstrings, titles and metrics from TOML files, some reasons from the system.
"""

from __future__ import annotations

from unittest import mock

from generate_cli import commands, help_text

from cn_clip.cli import app
from cn_clip.eval.protocols import protocols
from cn_clip.eval.zeroshot import datasets
from cn_clip.translation import SYSTEM_REASONS


def help_messages() -> list[str]:
    """Return each text that the help of a command passes to ``translate``, and the others."""
    messages: dict[str, None] = {}

    def record(message: str) -> str:
        messages[message] = None
        return message

    with mock.patch("cn_clip.cli.help.translate", record):
        for words in commands(app):
            help_text(words)
    specs = protocols().values()
    titles = [text for spec in specs for text in (spec.title, spec.metric)]
    metrics = [info.metric for info in datasets().values()]
    return [*dict.fromkeys((*messages, *titles, *metrics, *SYSTEM_REASONS))]
