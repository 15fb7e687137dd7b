"""Prints help as plain text, and suggests corrections for wrong command lines."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand

# Heading of the options without a group; groups with their own heading come after them.
_UNGROUPED = "Options"

# Click's names of types, as the help shows them.
_VALUES = {"path": "PATH", "list[Path]": "PATH", "str": "NAME", "int": "N", "int range": "N", "float": "N"}

# Words that people type instead of a command's name.
_MEANT = {
    "train": ("pretrain", "align", "finetune"),
    "fit": ("finetune",),
    "fine-tune": ("finetune",),
    "tune": ("finetune",),
    "contrast": ("align",),
    "test": ("evaluate",),
    "eval": ("evaluate",),
    "score": ("evaluate",),
    "predict": ("generate",),
    "infer": ("generate",),
    "inference": ("generate",),
    "report": ("generate",),
    "prepare": ("preprocess",),
    "import": ("convert",),
    "export": ("convert",),
    "info": ("doctor",),
    "recipes": ("recipe",),
    "list": ("recipe",),
}
_TAKE_SETTINGS = ("pretrain", "align", "finetune", "plan", "evaluate", "generate", "preprocess")


class HelpfulCommand(TyperCommand):
    """A command with help that is easy to copy: unwrapped examples, whole option names, no placeholder for flags."""

    def __init__(self, *arguments: Any, help: str | None = None, **options: Any) -> None:
        paragraphs = inspect.cleandoc(help or "").split("\n\n")
        # Click wraps the lines of a paragraph, except after this mark.
        kept = ["\b\n" + text if text.startswith("Example") else text for text in paragraphs]
        super().__init__(*arguments, help="\n\n".join(kept) or None, **options)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, the options and the groups of options, each under its heading."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], _UNGROUPED: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                groups["Arguments"].append((record[0].partition(" <")[0], record[1]))
            else:
                heading = getattr(parameter, "rich_help_panel", None) or _UNGROUPED
                groups.setdefault(heading, []).append((re.sub(r"<(.+)>", _value, record[0]), record[1]))
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _value(found: re.Match[str]) -> str:
    return _VALUES.get(found[1], found[1])


def use_plain_help(app: typer.Typer) -> None:
    """Uses `HelpfulCommand` for all commands of an application and its groups, and adds `-h`."""
    app.rich_markup_mode = None
    app.info.context_settings = {"help_option_names": ["-h", "--help"]}
    for command in app.registered_commands:
        command.cls = HelpfulCommand
    for group in app.registered_groups:
        if group.typer_instance is not None:
            use_plain_help(group.typer_instance)


def what_to_type(error: Any, arguments: Sequence[str], commands: Sequence[str]) -> tuple[str, str | None]:
    """Returns the message of a usage error and a suggestion, or None if there is no similar command or option.

    Args:
        error: Click's exception.
        arguments: Arguments after `emrrg`.
        commands: Names of the program's commands.
    """
    kind = type(error).__name__
    if kind == "BadParameter" and (message := _wrong_number(error, arguments)):
        return message, None
    # Click adds its own guesses to the message of an unknown option.
    message = error.message if kind == "NoSuchOption" else error.format_message()
    path = error.ctx.command_path if getattr(error, "ctx", None) else "emrrg"
    command = path.removeprefix("emrrg").strip().partition(" ")[0]
    if message.startswith("No such command"):
        message, advice = message.partition(" Did you mean")[0], None
        names = list(getattr(error.ctx.command, "commands", commands)) if error.ctx else list(commands)
        if close := _close(message.split("'")[1], names):
            advice = f"Did you mean {', '.join(f'`{path} {name}`' for name in close)}?"
        elif names:
            advice = f"The commands of `{path}` are: {', '.join(names)}."
        return message, advice
    if kind == "NoSuchOption":
        if close := get_close_matches(error.option_name, error.possibilities or (), cutoff=0.8):
            return message, f"Did you mean {' or '.join(close)}?"
        if command not in _TAKE_SETTINGS:
            return message, None
        name = error.option_name.lstrip("-").replace("-", "_")
        key = "data.root" if name in ("data", "root", "dataset") and command != "preprocess" else name
        place = next((i for i, text in enumerate(arguments) if text.partition("=")[0] == error.option_name), 0)
        value = arguments[place].partition("=")[2] or next(iter(arguments[place + 1 :]), "VALUE")
        return message, f"Change recipe settings with key=value, without dashes: {key}={shlex.quote(value)}"
    return message, None


def _wrong_number(error: Any, arguments: Sequence[str]) -> str | None:
    """Says what the option takes if it takes a number, else None. Typer's own words depend on its version."""
    option = error.param
    if option is None or not re.search("Input should be|is not a valid integer|is not in the range", error.message):
        return None
    places = (option, getattr(option, "type", None))  # newer and older versions
    least, most = (
        next((n for one in places if (n := getattr(one, name, None)) is not None), None) for name in ("min", "max")
    )
    allowed = "" if least is None else f", {least} or more" if most is None else f" from {least} to {most}"
    given = ""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, sign, value = argument.partition("=")
        given = (value if sign else following) if name in option.opts else given
    return f"{option.opts[0]} must be a whole number{allowed}, got {given or 'nothing'}"


def _close(word: str, names: Sequence[str]) -> list[str]:
    """Returns names that are similar to a word or often meant by it."""
    known = [name for name in _MEANT.get(word.lower(), ()) if name in names]
    beginning = [name for name in names if len(word) > 1 and name.startswith(word.lower())]
    return known or beginning or get_close_matches(word.lower(), names)
