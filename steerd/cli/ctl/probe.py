"""`steerctl probe`; what it does is cli.probe."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from steerd.cli.options import Json
from steerd.errors import SteerdError


def probe(
    host: Annotated[str, typer.Argument(help="Name or address.")],
    port: Annotated[int, typer.Argument(help="1..4294967295; above 65535 it is an extended port.", min=1)],
    extension: Annotated[
        int | None, typer.Option(help="Destination extension; default: the port's upper bits.")
    ] = None,
    source_extension: Annotated[int, typer.Option(help="Source extension.")] = 0,
    via: Annotated[Literal["ip", "tcp"], typer.Option(help="The header that carries the option.")] = "ip",
    max_hops: Annotated[int, typer.Option(help="Hops to try.")] = 30,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each answer.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Send SYNs that carry a port extension, hop by hop, and say in words what came back. Needs root."""
    from steerd.cli import probe as probing

    lines: list[str] = []
    try:
        status = probing.probe(
            host,
            port,
            extension=extension,
            source_extension=source_extension,
            via=via,
            max_hops=max_hops,
            timeout=timeout,
            out=lines.append if as_json else typer.echo,
        )
    except SteerdError:
        raise
    except OSError as error:
        raise SteerdError(f"{host} cannot be probed: {error.strerror}.") from error
    if as_json:
        typer.echo(json.dumps({"open": status == 0, "said": lines}))
    raise typer.Exit(status)
