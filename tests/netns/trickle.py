"""Many slow transfers at once: a client that keeps late connections busy for as long as it is told, and checks it all.

    python -m tests.netns.trickle PORT HOSTS COUNT

COUNT connections, half of each family, each asking for one of HOSTS names as tests/netns/late_load.py does. On each, a
block of random bytes goes to the daemon and must come back (tests/netns/responder.py), twice a second. "open" is
printed once every connection has had its first block back. From then on each line of input is answered with the bytes
that came back so far, and with the end of input all connections are closed, and "GOOD BROKEN" is printed; what broke
goes to standard error.
"""

from __future__ import annotations

import asyncio
import random
import sys

from tests.netns.gateway import ENDPOINT4, ENDPOINT6
from tests.netns.late_load import alias

BLOCK = 64
PAUSE = 0.5
OPENED_AT_ONCE = 50


class Transfers:
    """All connections, and how far they are."""

    def __init__(self, port: int, hosts: int, count: int) -> None:
        self.port, self.hosts, self.count = port, hosts, count
        self.echoed = 0
        self._open = 0
        self._opening = asyncio.Semaphore(OPENED_AT_ONCE)
        self._end = asyncio.Event()

    async def run(self) -> int:
        """Serve standard input; returns how many connections held to the end."""
        transfers = [asyncio.create_task(self._transfer(number)) for number in range(self.count)]
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        while await lines.readline():
            print(self.echoed, flush=True)
        self._end.set()
        good = 0
        for done in await asyncio.gather(*transfers, return_exceptions=True):
            good += done is None
            if done is not None:
                print(repr(done), file=sys.stderr)
        return good

    async def _transfer(self, number: int) -> None:
        chosen = random.Random(number)
        version, host = 4 if number % 2 else 6, chosen.randrange(self.hosts)
        async with self._opening:
            reader, writer = await asyncio.open_connection(ENDPOINT4 if version == 4 else ENDPOINT6, self.port)
            request = f"GET /{number} HTTP/1.1\r\nHost: h{host}.example\r\n\r\n".encode()
            writer.write(request)
            name = (await reader.readline()).split()[0].decode()
            if name != alias(version, host):
                raise ValueError(f"{number}: h{host}.example answered by {name}")
            await self._expect(reader, request)
        self._open += 1
        if self._open == self.count:
            print("open", flush=True)
        while not self._end.is_set():
            await asyncio.sleep(PAUSE)
            block = chosen.randbytes(BLOCK)
            writer.write(block)
            await self._expect(reader, block)
        writer.write_eof()
        if rest := await reader.read():
            raise ValueError(f"{number}: {rest!r} came behind the end")
        writer.close()
        await writer.wait_closed()

    async def _expect(self, reader: asyncio.StreamReader, block: bytes) -> None:
        got = await reader.readexactly(len(block))
        if got != block:
            raise ValueError(f"{got!r} came back for {block!r}")
        self.echoed += len(block)


async def main() -> None:
    transfers = Transfers(*map(int, sys.argv[1:4]))
    good = await transfers.run()
    print(good, transfers.count - good, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
