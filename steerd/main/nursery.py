"""The main process's side of the nursery (steerd.nursery), which starts the workers."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess

from steerd import orders
from steerd.kernel import python
from steerd.orders import READY, WorkerSettings

# Much longer than it takes to end a worker, and less than systemd waits for the end of a service.
_ANSWER_SECONDS = 10.0


class Newborn:
    """A worker that was asked for, and what the nursery says of it."""

    def __init__(self, nursery: Nursery, reader: asyncio.StreamReader, transport: asyncio.BaseTransport) -> None:
        self._nursery = nursery
        self._reader = reader
        self._transport = transport
        self.pid: int | None = None
        """None until it is born."""
        self.status: int | None = None
        """None until it has ended, and if nobody can say how."""

    async def is_ready(self) -> bool:
        """Wait until its queue is bound; False: it has ended before."""
        line = await self._next()
        while line and line != READY:
            line = await self._next()
        return bool(line)

    async def end(self) -> int | None:
        """Wait until it has ended; returns its exit status."""
        while await self._next():
            pass
        return self.status

    async def kill(self) -> None:
        """End it, if it has not ended, and wait for that; with the whole nursery, if that does not answer."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                while self.pid is None and await self._next():
                    pass
                if self.pid is not None and self.status is None:
                    self._nursery.kill(self.pid)
                await self.end()
        except TimeoutError:
            self._nursery.close()
            await self.end()
        finally:
            self._transport.close()

    async def _next(self) -> bytes:
        """What is said next of it; b"": no more."""
        line = await self._reader.readline()
        if line.startswith(b"born"):
            self.pid = orders.number(line)
        elif line.startswith(b"ended"):
            self.status = orders.number(line)
        return line


class Nursery:
    """Lives in the main process's event loop; made before it, so that workers can be had as soon as they may be."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(python.command("steerd.nursery", str(os.getpid())), stdin=theirs.fileno())

    def close(self) -> None:
        """End it, and what is left of its workers."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    async def start(self, settings: WorkerSettings) -> Newborn:
        """Have a worker. Raises OSError if there can be no process now."""
        reading, writing = os.pipe()
        try:
            order = orders.encode(orders.Start(settings))
            try:
                socket.send_fds(self._socket, [order], [writing])
            except OSError:  # the nursery was killed
                self.close()
                self._start()
                socket.send_fds(self._socket, [order], [writing])
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb")
        )
        return Newborn(self, reader, transport)

    def kill(self, pid: int) -> None:
        """End a worker, if it has not ended."""
        try:
            self._socket.send(orders.encode(orders.Kill(pid)))
        except OSError:  # the nursery was killed, and its workers with it
            return
