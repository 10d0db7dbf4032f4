"""Print texts that are no literals as marked messages, for extraction: see CONTRIBUTING.md.

The help comes from docstrings, and the titles of protocols from a TOML file.
"""

from __future__ import annotations

from unittest import mock

from generate_cli import commands, help_text

from cn_clip.cli import app
from cn_clip.eval.protocols import protocols


def help_messages() -> list[str]:
    """Return each text that the help of a command passes to ``translate``, and the titles."""
    messages: dict[str, None] = {}

    def record(message: str) -> str:
        messages[message] = None
        return message

    with mock.patch("cn_clip.cli.help.translate", record):
        for words in commands(app):
            help_text(words)
    return list(messages | dict.fromkeys(spec.title for spec in protocols().values()))


if __name__ == "__main__":
    for message in help_messages():
        print(f"_({message!r})")
