"""`steerctl explain`; what it does is cli.explain."""

from __future__ import annotations

import os

import typer

from steerd.cli import options
from steerd.cli.common import UsageError
from steerd.cli.ctl import ask
from steerd.cli.options import DEFAULT_CONFIG, Config, Json


def explain(
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
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Say step by step what would become of a connection, by what is in force: the daemon's registry, if it can be
    read (as root), or else the daemon, if it can be asked (in the group steerd), or else the configuration alone.

    Exit status: 0 steered, 1 not steered, 2 bad configuration or usage.
    """
    from steerd import config as configuration
    from steerd import paths
    from steerd.cli import explain as explaining

    question = explaining.asked(
        capture, hexadecimal, live_seconds, to, client, sni, host, path, key, extension, source_extension
    )
    if config == paths.CONFIG and not os.access(config, os.R_OK) and question.asked.to is not None:
        # As of all commands: the daemon that runs with another file is there to be asked.
        status = explaining.explain_by_daemon(ask.run_dir(config), question.asked, as_json=as_json)
    elif config == paths.CONFIG and not config.exists():
        raise UsageError(f"There is no {config}: name the daemon's file with --config.")
    else:
        status = explaining.explain(configuration.load(config), question, from_registry=True, as_json=as_json)
    raise typer.Exit(status)
