"""`steerctl export` and `steerctl import`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import IO, Annotated

import typer

from steerd.cli.common import progress_bar
from steerd.cli.ctl import ask, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json
from steerd.errors import SteerdError

_BATCH_LINES = 10_000


def export_registry(
    config: Config = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="As without: an export is JSON in any case.")] = True,  # noqa: ARG001
) -> None:
    """Write to standard output what was added: routes, leases and their quarantine, drains; one JSON object a line."""
    from steerd.control import client

    for piece in client.download(ask.run_dir(config), "export"):
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def import_registry(
    file: Annotated[
        Path, typer.Argument(help="What `export` wrote; - is standard input.", metavar="FILE", allow_dash=True)
    ],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Add what `export` wrote, ten thousand lines at a time; nothing is removed, and what is there stays."""
    from steerd.control import client

    run_dir = ask.run_dir(config)
    total = {"added": 0, "changed": 0, "unchanged": 0}
    number = 1
    with sys.stdin.buffer if str(file) == "-" else _opened(file) as lines, progress_bar("lines") as progress:
        size = Path(file).stat().st_size if str(file) != "-" and Path(file).is_file() else None
        sent = 0
        while batch := list(itertools.islice(lines, _BATCH_LINES)):
            text = b"".join(batch)
            done = client.request(run_dir, "POST", "import", query={"line": str(number)}, body=text)
            total = {name: count + done[name] for name, count in total.items()}
            number += len(batch)
            sent += len(text)
            if progress is not None:
                # Of lines to come nobody knows the number, but their share of the file.
                progress(number - 1, round((number - 1) * size / sent) if size else 0)
    show.said(total, ", ".join(f"{count:,} {name}" for name, count in total.items()), as_json)


def _opened(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise SteerdError(f"{file} cannot be read: {error.strerror}.") from error
