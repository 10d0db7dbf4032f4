"""Help texts in the user's language: the docstrings of the commands, translated when printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cn_clip.translation import _, translate

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from cyclopts.help.specs import ColumnSpec
    from rich.console import Console, ConsoleOptions
    from rich.text import Text


@dataclass(frozen=True, slots=True)
class TranslatedHelp:
    """Cyclopts' help formatter, with translated texts."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        from cyclopts.help.formatters import DefaultFormatter

        title = translate(panel.title) if isinstance(panel.title, str) else panel.title
        translated = panel.copy(title=title, description=_translated(panel.description))
        DefaultFormatter(column_specs=_columns(console, options, panel))(
            console, options, translated
        )

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        from cyclopts.help.specs import DefaultStyled
        from rich.text import Text

        if usage:
            console.print(DefaultStyled(Text(_("Usage: "), style="cyclopts.usage") + usage))

    def render_description(self, console: Console, options: ConsoleOptions, text: Any) -> None:
        from rich.console import Group
        from rich.text import Text

        shown = _translated(text)
        if isinstance(shown, Text):  # alone, it would be joined with others, as if plain
            shown = Group(shown, "")
        if shown:
            console.print(shown)


def _columns(console: Console, options: ConsoleOptions, panel: HelpPanel) -> tuple[ColumnSpec, ...]:
    """Return cyclopts' columns, with a description of ours as the last."""
    from cyclopts.help.specs import get_default_command_columns, get_default_parameter_columns

    is_commands = panel.format == "command"
    columns = get_default_command_columns if is_commands else get_default_parameter_columns
    *others, description = columns(console, options, panel.entries)
    return (*others, description.copy(renderer=_described))


def _described(entry: HelpEntry) -> Any:
    """Return the description of an option with its choices and its default."""
    from cyclopts.help import InlineText

    facts = _facts(entry)
    text = _translated(entry.description)
    if isinstance(text, InlineText):
        for fact in facts:
            text.append(fact)
    elif text is not None:
        for fact in facts:
            text.append(" ").append_text(fact)
    return text


def _facts(entry: HelpEntry) -> list[Text]:
    from rich.text import Text

    facts = []
    if entry.choices:
        choices = _("[choices: {choices}]", choices=", ".join(entry.choices))
        facts.append(Text(choices, "cyclopts.choices"))
    if entry.default is not None:
        facts.append(Text(_("[default: {value}]", value=entry.default), "cyclopts.default"))
    if entry.required:
        facts.append(Text(_("[required]"), "cyclopts.required"))
    return facts


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
    return _with_code("\n\n".join(translations))


def _with_code(text: str) -> Text:
    """Return a text that may have code in backticks, as the only markup."""
    from cn_clip.cli.wrapping import WrappedText

    shown = WrappedText()
    for number, part in enumerate(text.strip().split("`")):
        shown.append(part, "markdown.code" if number % 2 else None)
    return shown
