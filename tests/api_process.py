"""The API by itself, in a process: a real registry, and neither kernel nor daemon behind it.

    python -m tests.api_process DIRECTORY

Its sockets and its registry are in DIRECTORY. It says `ready`, writes what went wrong to standard error, and ends when
its standard input does.
"""

from __future__ import annotations

import asyncio
import sys

from steerd import config
from steerd.control.api import Api, Context
from steerd.control.registry import Registry
from tests.unit.test_api import Bare

TEXT = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.tv]
endpoints = ["203.0.113.10:554/tcp", "[2001:db8::10]:554/tcp"]
inspect = ["rtsp"]
default = "10.64.0.200:554"
[services.tv.sessions]
key = "rtsp.session"
on_new_source = "move"
entries = [{ id = "toml", target = "10.64.0.2:554" }]
[services.web]
endpoints = ["203.0.113.10:443/tcp", "203.0.113.10:443/udp"]
inspect = ["tls", "http", "regex", "quic"]
routes = [{ when = { "tls.sni" = "a.example" }, target = "10.64.0.1:443" }]
"""


async def serve(directory: str) -> None:
    """Serve until standard input ends."""
    registry = Registry(directory)
    registry.publish(config.parse(TEXT, "steerd.toml"))

    def complain(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    api = Api(Context(registry, Bare()), directory, complain, complain)
    await api.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await api.stop()
    registry.close()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
