"""Help texts in the user's language: the docstrings of the commands, translated when printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cn_clip.translation import translate

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions


@dataclass(frozen=True, slots=True)
class TranslatedHelp:
    """Cyclopts' help formatter, with translated texts."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        from cyclopts.help.formatters import DefaultFormatter

        title = translate(panel.title) if isinstance(panel.title, str) else panel.title
        entries = [
            entry.copy(description=_translated(entry.description)) for entry in panel.entries
        ]
        translated = panel.copy(
            title=title, description=_translated(panel.description), entries=entries
        )
        DefaultFormatter()(console, options, translated)

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        from cyclopts.help.formatters import DefaultFormatter

        DefaultFormatter().render_usage(console, options, usage)

    def render_description(self, console: Console, options: ConsoleOptions, text: Any) -> None:
        from cyclopts.help.formatters import DefaultFormatter

        DefaultFormatter().render_description(console, options, _translated(text))


def _translated(text: Any) -> Any:
    """Translate each paragraph of a help text; anything that is not Markdown stays as it is."""
    from cyclopts.help import InlineText
    from rich.markdown import Markdown

    if not isinstance(text, InlineText) or not isinstance(text.primary_renderable, Markdown):
        return text
    paragraphs = text.primary_renderable.markup.split("\n\n")
    messages = [" ".join(paragraph.split()) for paragraph in paragraphs]
    translations = [translate(message) if message else "" for message in messages]
    if translations == messages:
        return text
    translated = InlineText.from_format(
        "\n\n".join(translations), format="markdown", force_empty_end=text.force_empty_end
    )
    for part in text.texts:
        translated.append(part)
    return translated
