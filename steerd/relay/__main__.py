"""The relay's process: `python -m steerd.relay`, started by the daemon.

On standard input it is told what to listen on, one line of JSON each time: a list of engine.Listen, all of them. It
answers each with one line on standard output: what could not be had, `{"ADDRESS PORT": why}`. When standard input ends,
the main process is gone or lets it go: it stops listening, and ends with its last connection.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys

import msgspec

from steerd.errors import SteerdError
from steerd.kernel import capabilities
from steerd.kernel.capabilities import Capability
from steerd.relay.engine import Listen, Relay
from steerd.telemetry import logs

_CHUNK = 1 << 16


class _Commands:
    """What is told on standard input."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._read = bytearray()
        self._decode = msgspec.json.Decoder(list[Listen]).decode
        self.has_ended = False
        os.set_blocking(sys.stdin.fileno(), False)
        relay.watch(sys.stdin.fileno(), select.EPOLLIN, lambda _events: self._on_input())

    def _on_input(self) -> None:
        try:
            data = os.read(sys.stdin.fileno(), _CHUNK)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._relay.forget(sys.stdin.fileno())
            self._relay.listen([])
            self.has_ended = True
            return
        self._read += data
        while (end := self._read.find(b"\n")) >= 0:
            line = bytes(self._read[:end])
            del self._read[: end + 1]
            failed = self._relay.listen(self._decode(line))
            with contextlib.suppress(BrokenPipeError):
                os.write(sys.stdout.fileno(), msgspec.json.encode(failed) + b"\n")


def _allow_many_descriptors() -> None:
    """As many as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # the sandbox forbids it, and was told how many there are to be
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Serve until there is nothing left to serve."""
    # These go to all processes of a terminal; this one ends by itself, with its last connection.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    log = logs.configure(process="relay")
    try:
        _allow_many_descriptors()
        capabilities.limit({Capability.NET_BIND_SERVICE} & capabilities.permitted(), None)
        relay = Relay(log)
    except (SteerdError, OSError) as error:
        log.error("relay cannot start", why=str(error))
        sys.exit(1)
    commands = _Commands(relay)
    while not commands.has_ended or relay.streams:
        relay.turn()
    relay.close()


if __name__ == "__main__":
    main()
