"""`steerd`: run the daemon, check a configuration, explain what it does, take everything away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from steerd.cli import common, options
from steerd.cli.options import DEFAULT_CONFIG, ConfigFile

THIS_SYSTEM = Path("/")

app = common.new_app()


@app.callback()
def _options(_version: common.Version = False) -> None:
    """Many daemons behind one address and port: decides once where a connection goes, and the kernel carries it."""


@app.command()
def run(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """Run the daemon in the foreground: it logs to standard error, reloads on SIGHUP, stops on SIGTERM.

    Started as root it becomes the user `gateway.user`, with the few capabilities that it needs.
    """
    from steerd import config as configuration
    from steerd import daemon, privileges

    config = configuration.load(file)
    standing = privileges.settle(config)  # before the progress bar, which is a thread
    with common.progress_bar("aliases") as progress:
        daemon.run(config, standing, progress)


@app.command()
def prepare(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """As root, before a daemon that is started as another user: hand its directories over to that user."""
    from steerd import config as configuration
    from steerd import privileges

    privileges.prepare(configuration.load(file))


@app.command()
def check(
    file: ConfigFile = DEFAULT_CONFIG,
    on_machine: Annotated[bool, typer.Option("--live", help="Look at this machine too (as root).")] = False,
) -> None:
    """Say `ok`, or one line for every mistake (exit status 2). Changes nothing."""
    from steerd import config as configuration
    from steerd.errors import ConfigError

    config = configuration.load(file)
    if on_machine:
        from steerd.cli import live

        problems = live.check(config)
        if problems:
            raise ConfigError(str(file), problems)
    typer.echo("ok")


@app.command()
def explain(
    file: ConfigFile,
    capture: options.CaptureFile = None,
    hexadecimal: options.Hex = None,
    to: options.To = None,
    client: options.From = None,
    sni: options.Sni = None,
    host: options.Host = None,
    path: options.PathOf = None,
    key: options.Key = None,
    extension: options.DstExtension = None,
    source_extension: options.SrcExtension = None,
    live_seconds: options.Live = None,
    as_json: options.Json = False,
) -> None:
    """Say step by step what would become of a connection, by the configuration alone. Needs neither root nor a daemon.

    Exit status: 0 steered, 1 not steered, 2 bad configuration or usage.
    """
    from steerd import config as configuration
    from steerd.cli import explain as explaining

    question = explaining.asked(
        capture, hexadecimal, live_seconds, to, client, sni, host, path, key, extension, source_extension
    )
    status = explaining.explain(configuration.load(file), question, from_registry=False, as_json=as_json)
    raise typer.Exit(status)


@app.command()
def setup(
    root: Annotated[
        Path, typer.Option(metavar="DIR", help="The root directory of another system, such as an image.")
    ] = THIS_SYSTEM,
    remove: Annotated[bool, typer.Option("--remove", help="Take the service away again, not its data.")] = False,
    print_only: Annotated[bool, typer.Option("--print", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """After `pip install`, as root: the user, an example configuration, and the systemd service."""
    from steerd.cli.setup import Setup

    plan = Setup(root)
    for step in plan.remove() if remove else plan.install():
        typer.echo(("would " if print_only else "") + step.what)
        if not print_only:
            step.do()
    if remove:
        typer.echo("left: /etc/steerd, /var/lib/steerd, the user steerd; table and aliases until: steerd down")
    else:
        typer.echo("all is set up: write /etc/steerd/steerd.toml, then: systemctl enable --now steerd")


@app.command()
def down(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """Remove the nft table and all aliases. The daemon must be stopped; connections that are steered now will break."""
    from steerd import config as configuration
    from steerd import daemon, privileges
    from steerd.errors import SteerdError

    config = configuration.load(file)
    if os.geteuid() != 0 and privileges.lacking(config):
        raise SteerdError("steerd down must run as root: it removes the nft table and the aliases.")
    # What is in run_dir is that user's doing: root would follow its links.
    privileges.settle(config)
    changes = daemon.down(config)
    typer.echo(f"table inet steerd and {changes.removed} aliases removed")


@app.command("polkit-rule")
def polkit_rule(
    file: ConfigFile = DEFAULT_CONFIG,
    user: Annotated[str, typer.Option(help="As whom steerd runs.")] = "steerd",
) -> None:
    """Print the polkit rule that lets steerd, if it is not root, start and stop the units that FILE wakes, and no
    others. Put it into /etc/polkit-1/rules.d/50-steerd.rules."""
    from steerd import config as configuration
    from steerd.control import polkit
    from steerd.errors import SteerdError

    text = polkit.rule(configuration.load(file), user)
    if not text:
        raise SteerdError(f"{file} names no unit to wake, so there is nothing to allow.")
    typer.echo(text, nl=False)


def main() -> None:
    """The console script."""
    common.run(app, "steerd")


if __name__ == "__main__":
    main()
