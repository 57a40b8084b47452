"""`steerd`: run the daemon, check a configuration, explain what it does, take everything away."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from steerd import config as configuration
from steerd.cli import explain as explaining
from steerd.cli import live
from steerd.errors import ConfigError, SteerdError

DEFAULT_CONFIG = Path("/etc/steerd/steerd.toml")
EXIT_FAILED, EXIT_BAD_CONFIG = 1, 2

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
ConfigFile = Annotated[Path, typer.Argument(help="The configuration, in TOML.", metavar="FILE")]


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steerd {metadata.version('steerd')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Many daemons behind one address and port: decides once where a connection goes, and the kernel carries it."""


@app.command()
def run(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """Run the daemon in the foreground: it logs to standard error, reloads on SIGHUP, stops on SIGTERM.

    Started as root it becomes the user `gateway.user`, with the few capabilities that it needs.
    """
    from steerd import daemon, privileges

    config = configuration.load(file)
    standing = privileges.settle(config)  # before the progress bar, which is a thread
    with progress_bar("aliases") as progress:
        daemon.run(config, standing, progress)


@app.command()
def prepare(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """As root, before a daemon that is started as another user: hand its directories over to that user."""
    from steerd import privileges

    privileges.prepare(configuration.load(file))


@app.command()
def check(
    file: ConfigFile = DEFAULT_CONFIG,
    on_machine: Annotated[bool, typer.Option("--live", help="Look at this machine too (as root).")] = False,
) -> None:
    """Say `ok`, or one line for every mistake (exit status 2). Changes nothing."""
    config = configuration.load(file)
    if on_machine:
        problems = live.check(config)
        if problems:
            raise ConfigError(str(file), problems)
    typer.echo("ok")


@app.command()
def explain(
    file: ConfigFile,
    capture: explaining.CaptureFile = None,
    hexadecimal: explaining.Hex = None,
    to: explaining.To = None,
    client: explaining.From = None,
    sni: explaining.Sni = None,
    host: explaining.Host = None,
    path: explaining.PathOf = None,
    key: explaining.Key = None,
    extension: explaining.DstExtension = None,
    source_extension: explaining.SrcExtension = None,
    live_seconds: explaining.Live = None,
    as_json: explaining.Json = False,
) -> None:
    """Say step by step what would become of a connection, by the configuration alone. Needs neither root nor a daemon.

    Exit status: 0 steered, 1 not steered, 2 bad configuration or usage.
    """
    question = explaining.asked(
        capture, hexadecimal, live_seconds, to, client, sni, host, path, key, extension, source_extension
    )
    status = explaining.explain(configuration.load(file), question, from_registry=False, as_json=as_json)
    raise typer.Exit(status)


@app.command()
def down(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """Remove the nft table and all aliases. The daemon must be stopped; connections that are steered now will break."""
    from steerd import daemon

    changes = daemon.down(configuration.load(file))
    typer.echo(f"table inet steerd and {changes.removed} aliases removed")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if done >= total:
                progress.stop()

        yield show


def main() -> None:
    """The console script. Exit status: 0 fine, 1 failed, 2 bad configuration or usage."""
    try:
        app()
    except ConfigError as error:
        typer.echo(str(error), err=True)
        sys.exit(EXIT_BAD_CONFIG)
    except SteerdError as error:
        typer.echo(f"steerd: {error}", err=True)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
