"""`steerctl`: for operators. Looks at a running steerd, and probes an extended port from a client's side.

A noun is a file, with its verbs; `ask` is how the daemon is asked, `show` how answers look, `complete` what a shell
offers for names. With `--json`, one thing is one JSON object on a line, and a list is a JSON array on a line; what may
be very long (flows, an export) is one object a line instead. Keys are those of the API (control.api); none is ever
renamed or removed under /v1. Exit statuses: cli.common.Exit.

Modules are light, since a shell's completion imports all of them: what a command needs beside typer it imports itself.
"""

from __future__ import annotations

from collections.abc import Callable

from steerd.cli import common
from steerd.cli.ctl import (
    drains,
    explain,
    flows,
    leases,
    log,
    pools,
    probe,
    reload,
    routes,
    services,
    sessions,
    status,
    targets,
    top,
    transfer,
)

app = common.new_app(completes=True)


@app.callback(epilog=common.epilog())
def _options(_version: common.Version = False) -> None:
    """Looks at a running steerd, and changes what it does."""


COMMANDS: tuple[Callable[..., None], ...] = (
    status.status,
    top.top,
    services.services,
    services.endpoints,
    pools.pools,
    pools.aliases,
    targets.targets,
    drains.drain,
    drains.undrain,
    drains.drains,
    explain.explain,
    probe.probe,
    reload.reload,
)
for command in COMMANDS:
    app.command()(command)
for noun in (routes, leases, sessions):
    app.add_typer(noun.app, name=noun.NAME)
    app.add_typer(noun.app, name=noun.PLURAL, hidden=True)
app.add_typer(flows.app, name="flows")
app.add_typer(log.app, name="log")
app.command("export")(transfer.export_registry)
app.command("import")(transfer.import_registry)


def main() -> None:
    """The console script."""
    common.run(app, "steerctl")
