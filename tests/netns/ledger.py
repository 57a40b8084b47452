"""Daemons for tests, in one process, that keep a ledger of the requests that reached them.

    python -m tests.netns.ledger HOSTS PORT [any]

Daemon number n (below HOSTS) listens on the alias of `h{n}.example` (tests/netns/late_load.py), both families, and
answers like tests/netns/responder.py: with its own name, and with whatever the client sends. With "any" it may be asked
for whatever host. "listening" is printed once all listen. Each line of input is answered with "REQUESTS WRONG TWICE":
requests seen so far, those whose Host is another daemon's, and those that came in more than one connection; what was
wrong goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import sys
from collections import Counter

from tests.netns.late_load import alias
from tests.netns.responder import listen

_HOST = re.compile(rb"\r\nHost: h(\d+)\.example\r\n")


class Ledger:
    """What was asked, and how often."""

    def __init__(self, *, any_host: bool) -> None:
        self.requests: Counter[bytes] = Counter()
        self.wrong = 0
        self._any_host = any_host

    async def serve(self, number: int, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to daemon `number`."""
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            writer.write(name.encode() + b"\n")
            request = await reader.readuntil(b"\r\n\r\n")
            self._note(number, name, request)
            writer.write(request)
            while data := await reader.read(65536):
                writer.write(data)

    def _note(self, number: int, name: str, request: bytes) -> None:
        self.requests[request] += 1
        found = _HOST.search(request)
        if not self._any_host and (found is None or int(found[1]) != number):
            self.wrong += 1
            print(f"{name} was asked {request!r}", file=sys.stderr)
        if self.requests[request] == 2:
            print(f"{name} is asked again {request!r}", file=sys.stderr)

    @property
    def twice(self) -> int:
        return sum(times > 1 for times in self.requests.values())


async def main() -> None:
    hosts, port = map(int, sys.argv[1:3])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ledger = Ledger(any_host=sys.argv[3:] == ["any"])

    async def listen_as(number: int, version: int) -> None:
        name = alias(version, number)
        await asyncio.start_server(
            lambda reader, writer: ledger.serve(number, f"{name} {port}", reader, writer), sock=listen(name, port)
        )

    for number in range(hosts):
        for version in (4, 6):
            await listen_as(number, version)
    print("listening", flush=True)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while await lines.readline():
        print(len(ledger.requests), ledger.wrong, ledger.twice, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
