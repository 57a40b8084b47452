"""What all commands share: exit statuses, and that whatever goes wrong is a sentence on standard error."""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from steerd.errors import ConfigError, ForbiddenError, NoAnswerError, SteerdError


class Exit(enum.IntEnum):
    """Exit statuses of `steerd` and `steerctl`."""

    OK = 0
    """Done. Of explain: all of it is steered; of probe: the port is open."""
    FAILED = 1
    """Refused, not found, or failed. Of explain: something is not steered; of probe: the port is not open."""
    USAGE = 2
    """The command line or the configuration has a mistake; nothing was done."""
    NO_ANSWER = 3
    """The daemon does not answer: it does not run, or not with this configuration."""
    NOT_PERMITTED = 4
    """You may not: be root, or in the group steerd."""


class UsageError(SteerdError):
    """What was given on the command line makes no sense."""


def meanings(words: type[enum.Enum]) -> dict[str, str]:
    """What is written below each member of an enumeration, by the member's name in lower case."""
    return {name.lower(): text for name, text in texts(words).items()}


@functools.cache
def texts(of: type) -> dict[str, str]:
    """What is written below each name that a class defines, by name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(of))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for member, text in itertools.pairwise(definition.body):
        match member, text:
            case (
                ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(meaning))),
            ):
                found[name] = " ".join(meaning.split())
    return found


def epilog() -> str:
    """What stands below a program's help: its exit statuses."""
    said = meanings(Exit)
    return "\n\n".join(["Exit status:", *(f"{status.value}: {said[status.name.lower()]}" for status in Exit)])


def new_app(help_: str | None = None, *, completes: bool = False, alone: bool = False) -> typer.Typer:
    """A program, or a noun with verbs; without any of them it shows its help, unless it can stand `alone`. `completes`:
    a program that can tell shells how it goes on."""
    # Without markup, what typer says of wrong usage is plain text, and no frame cut to the terminal's width.
    made = typer.Typer(
        add_completion=completes,
        no_args_is_help=not alone,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    # Told None at once, typer would not take the docstring of the callback.
    if help_ is not None:
        made.info.help = help_
    return made


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"steerd {metadata.version('steerd')}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Say which version this is.", callback=_say_version, is_eager=True)
]


def run(app: Callable[..., object], name: str) -> None:
    """Run a program, and end with an exit status of `Exit`. What it raises becomes a sentence on standard error."""
    try:
        app(prog_name=name)
    except ConfigError as error:
        _end(str(error), Exit.USAGE)
    except UsageError as error:
        _end(f"{name}: {error}", Exit.USAGE)
    except NoAnswerError as error:
        _end(f"{name}: {error}", Exit.NO_ANSWER)
    except ForbiddenError as error:
        _end(f"{name}: {error}", Exit.NOT_PERMITTED)
    except BrokenPipeError:
        # Who read our output has enough of it. Python would write what is left when it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.OK)
    except (SteerdError, ValueError) as error:
        _end(f"{name}: {error}", Exit.FAILED)


def _end(sentence: str, status: Exit) -> None:
    typer.echo(sentence, err=True)
    sys.exit(status)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if done >= total:
                progress.stop()

        yield show
