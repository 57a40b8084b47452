"""Arguments and options that several commands have, of `steerd` and of `steerctl`. Light, for the sake of completion:
what commands need beside typer they import themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerd import paths

DEFAULT_CONFIG = paths.CONFIG

ConfigFile = Annotated[Path, typer.Argument(help="The configuration, in TOML.", metavar="FILE")]
Config = Annotated[
    Path, typer.Option(help="The daemon's configuration, in TOML.", metavar="FILE", envvar="STEERD_CONFIG")
]

# ---- explain ----

CaptureFile = Annotated[
    Path | None, typer.Argument(help="A capture (pcap, pcapng) of what clients send.", metavar="PCAP")
]
Hex = Annotated[
    list[str] | None,
    typer.Option(
        "--hex",
        help="An IP packet in hexadecimal digits; with --to, a first payload or a datagram. May be repeated.",
        metavar="BYTES",
    ),
]
To = Annotated[
    str | None,
    typer.Option(help="The endpoint, as in 203.0.113.10:443/tcp; extended ports are possible.", metavar="ADDRESS"),
]
From = Annotated[str | None, typer.Option("--from", help="The client, as in 198.51.100.7:5000.", metavar="ADDRESS")]
Sni = Annotated[str | None, typer.Option(help="The server name in a TLS, QUIC or DTLS hello.")]
Host = Annotated[str | None, typer.Option(help="The host of an HTTP request.")]
PathOf = Annotated[str | None, typer.Option("--path", help="The path of an HTTP request.")]
Key = Annotated[
    list[str] | None,
    typer.Option("--key", help="Any key that a parser gives, as in tls.alpn=h2; may be repeated.", metavar="KEY=VALUE"),
]
DstExtension = Annotated[int | None, typer.Option("--extension", help="Destination extension.", min=0, max=65535)]
SrcExtension = Annotated[int | None, typer.Option("--source-extension", help="Source extension.", min=0, max=65535)]
Live = Annotated[
    float | None,
    typer.Option("--live", help="Look at what arrives here for so many seconds, or until Ctrl-C (as root).", min=0.1),
]

# ---- all ----

Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
