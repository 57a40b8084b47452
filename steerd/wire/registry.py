"""Every payload parser by its name. A new one is a file that keeps the contract of `wire.parser`, and two lines here:
its import and its place in the tuple. Tests sweep this registry, so that a new parser is held to the contract as well.

`port-extension`, the other word that `inspect` knows, is not here: it reads headers (`wire.portext`), not payload.
"""

from __future__ import annotations

from steerd.wire import dns, http, http2, minecraft, mqtt, postgres, prefix, proxy, rdp, regex, rtsp, sip, ssh, tls
from steerd.wire.parser import Inspect, Parser

__all__ = ["REGISTRY", "Inspect", "Parser"]

REGISTRY: dict[str, Parser] = {
    parser.name: parser
    for parser in (
        http.PARSER,
        http2.PARSER,
        rtsp.PARSER,
        sip.PARSER,
        postgres.PARSER,
        mqtt.PARSER,
        minecraft.PARSER,
        rdp.PARSER,
        tls.PARSER,
        ssh.PARSER,
        dns.PARSER,
        proxy.PARSER,
        prefix.PARSER,
        regex.PARSER,
    )
}
