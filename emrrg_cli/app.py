"""The command line: its commands, the global options, and the one place where errors become messages and exit codes.

Nothing here imports torch, transformers or pydantic, and the commands do so inside their functions only, so that
`emrrg --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup
from typer.main import get_command

from emrrg_cli.commands.compare import compare
from emrrg_cli.commands.convert import convert
from emrrg_cli.commands.data import app as data_app
from emrrg_cli.commands.demo import demo
from emrrg_cli.commands.doctor import doctor
from emrrg_cli.commands.evaluate import evaluate
from emrrg_cli.commands.generate import generate
from emrrg_cli.commands.options import Invocation
from emrrg_cli.commands.plan import plan
from emrrg_cli.commands.preprocess import app as preprocess_app
from emrrg_cli.commands.recipe import app as recipe_app
from emrrg_cli.commands.training import align, finetune, pretrain
from emrrg_cli.commands.usage import use_plain_help, what_to_type
from emrrg_cli.console import err, lossy_stderr, printable_lines
from emrrg_cli.errors import EmrrgError, Interrupted
from emrrg_cli.signals import interrupted_in_imports
from emrrg_cli.training.launch import leave_processes, tell_launcher
from emrrg_cli.versions import installed_versions

# The help lists them in this order, that of the work; Typer would list groups after commands.
COMMANDS: dict[str, Callable[..., None] | typer.Typer] = {
    "demo": demo,
    "preprocess": preprocess_app,
    "data": data_app,
    "pretrain": pretrain,
    "align": align,
    "finetune": finetune,
    "evaluate": evaluate,
    "compare": compare,
    "generate": generate,
    "convert": convert,
    "plan": plan,
    "recipe": recipe_app,
    "doctor": doctor,
}
# Commands that run without arguments.
_NEED_NO_ARGUMENT = ("demo", "doctor")

# The processes that a command starts read it too.
DEBUG = "EMRRG_DEBUG"

# Depending on its version, Typer contains click or depends on it; its public exception leads to the right classes.
_WrongCall: Any = typer.BadParameter.__mro__[1]
_ClickError: Any = _WrongCall.__mro__[1]


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=list(COMMANDS).index)


app = typer.Typer(cls=_InOrder, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for _name, _command in COMMANDS.items():
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name, no_args_is_help=_name not in _NEED_NO_ARGUMENT)(_command)
use_plain_help(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"emrrg {installed_versions(['emrrg'])['emrrg'] or '(a checkout that is not installed)'}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show the traceback of an error; may stand anywhere. Same as {DEBUG}=1.")
    ] = False,
) -> None:
    """Chest X-ray report generation: a vision Mamba encoder, Partial LoRA and hybrid decoder layers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 wrong usage or recipe, 130 interrupted.

    Args:
        arguments: Arguments after `emrrg`; None: those of the process.
    """
    _open_closed_streams()
    with lossy_stderr(), interrupted_in_imports():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in given[: given.index("--") if "--" in given else None]:
        given.remove("--debug")
        os.environ[DEBUG] = "1"
    try:
        code = _run(given)
        sys.stdout.flush()  # a closed pipe must show here, where the error can still be handled
        return code
    except (EmrrgError, Interrupted) as error:
        _show_traceback()
        if tell_launcher(error):
            return error.exit_code
        label = "" if isinstance(error, Interrupted) else "error: "
        return _fail(error.message, error.hint, error.exit_code, label=label)
    except KeyboardInterrupt:
        _show_traceback()
        return _fail("interrupted", None, 130, label="")
    except SystemExit as error:
        # Rich raises SystemExit itself when its output is a closed pipe.
        if isinstance(error.__context__, BrokenPipeError):
            return 141
        raise
    except BaseException as error:
        # Libraries in Rust panic with an exception of their own, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 141
        _show_traceback()
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _fail(f"the name {str(error.filename)[:50]}... is longer than this system allows", None, 2)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:  # files have names
            _drop_stdout()
            return _fail(f"the results cannot be written to stdout: {error.strerror}", None, 1)
        first_line = next(iter(str(error).strip().splitlines()), "")
        what = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
        hint = None if _debugging() else "run again with --debug for the traceback"
        if tell_launcher(EmrrgError(f"unexpected: {what}", hint=hint), expected=False):
            return 1
        return _fail(what, hint, 1, label="unexpected error: ")
    finally:
        leave_processes()


def _run(arguments: Sequence[str]) -> int:
    try:
        command: Any = get_command(app)
        with command.make_context("emrrg", list(arguments), obj=Invocation(tuple(arguments), _run)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:  # Ctrl-C or end of input at a question
        raise KeyboardInterrupt from None
    except _ClickError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message(), err=True)
            return 2
        named = arguments[0] if arguments and arguments[0] in COMMANDS else ""  # an option without its value has no ctx
        command_path = (
            error.ctx.command_path if isinstance(error, _WrongCall) and error.ctx else f"emrrg {named}".strip()
        )
        message, advice = what_to_type(error, arguments, list(COMMANDS))
        return _fail(message, " ".join(filter(None, (advice, f"`{command_path} --help` shows how to use it."))), 2)
    return 0


def _fail(message: str, hint: str | None, code: int, *, label: str = "error: ") -> int:
    # As Text, since messages hold brackets that rich would read as markup; unwrapped, so that paths stay whole.
    # File names and texts of others may hold control characters, which a terminal would obey.
    err.print(Text.assemble((label, "bold red"), printable_lines(message)), soft_wrap=True)
    if hint:
        err.print(Text(printable_lines(hint)), soft_wrap=True)
    return code


def _debugging() -> bool:
    return os.environ.get(DEBUG, "").lower() not in ("", "0", "false")


def _show_traceback() -> None:
    if _debugging():
        traceback.print_exc()


def _open_closed_streams() -> None:
    """Opens streams that a shell has closed (`>&-`): libraries write to them, and no file must take their place."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))


def _drop_stdout() -> None:
    """Otherwise the interpreter prints a second error when it closes stdout."""
    with contextlib.suppress(OSError, ValueError):  # no descriptor where stdout is replaced
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_is_gone() -> bool:
    """Whether stdout is a closed pipe; the broken pipe may also be one to another process."""
    try:
        output = sys.stdout.fileno()
        watch = select.poll()
        watch.register(output, select.POLLOUT)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
        if gone:
            _drop_stdout()
        return gone
    except (AttributeError, OSError, ValueError):  # no poll on Windows, no descriptor where stdout is replaced
        return False
