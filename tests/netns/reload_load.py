"""A client for tests of reloads: who answered which connection, and when.

    python -m tests.netns.reload_load KIND VERSION KEYS THREADS SEED

Until its standard input ends it makes connections, one after the other in each of THREADS, each for one of KEYS names:
"early" by the port extension KEY + 1 in the SYN, "late" by the HTTP host `kKEY.example`, "query" by that name in a DNS
query (who hears nothing asks again after two seconds, from another port, as resolvers do). The TCP daemons are those of
tests/netns/ledger.py, the UDP ones tests/netns/udp_responder.py. Or it is KIND "standing": KEYS connections of each of
"early", "late" and "flow" (UDP), all open from the beginning to the end, on which something is said every 0.2 s.

Prints "ready", and at the end one JSON object, a `Told`; times are of CLOCK_MONOTONIC, which all hosts share.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field

from steerd.model import Extension
from steerd.wire import portext
from tests.netns.datagram_flood import query
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, NUMBERS
from tests.netns.late_load import exchange

PORTS = {"early": 443, "late": 80, "query": 53, "flow": 500}
TIMEOUT = 20.0
AGAIN_SECONDS, TRIES = 2.0, 8
PAUSE = 0.05
EVERY_SECONDS = 0.2


@dataclass
class Told:
    """What became of the connections."""

    answers: list[tuple[int, float, float, str]] = field(default_factory=list)
    """Key, the moment before the client said what decides, the moment of the answer, and the daemon's address."""
    failed: list[str] = field(default_factory=list)
    said: int = 0
    """How often something was said on a standing connection, and answered."""


def host(key: int) -> str:
    return f"k{key}.example"


def opened(kind: str, version: int, key: int) -> socket.socket:
    """A socket for one connection, not yet connected."""
    protocol = socket.SOCK_STREAM if kind in ("early", "late") else socket.SOCK_DGRAM
    made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, protocol)
    made.settimeout(TIMEOUT)
    extension = Extension(key + 1, 0)
    if kind == "early" and version == 4:
        made.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, portext.encode_ipv4(extension, NUMBERS))
    elif kind == "early":
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, portext.encode_ipv6(extension, NUMBERS))
    return made


class Client:
    """All connections of one kind."""

    def __init__(self, kind: str, version: int, keys: int, seed: int) -> None:
        self.kind, self.version, self.keys, self.seed = kind, version, keys, seed
        self.told = Told()
        self.stop = threading.Event()
        self._turns = itertools.count()

    def _to(self, kind: str) -> tuple[str, int]:
        return ENDPOINT4 if self.version == 4 else ENDPOINT6, PORTS[kind]

    def _request(self, key: int, word: str) -> bytes:
        return f"GET /{self.kind}/{self.version}/{self.seed}/{word} HTTP/1.1\r\nHost: {host(key)}\r\n\r\n".encode()

    # ---- one connection after the other ----

    def load(self, thread: int) -> None:
        """Until it is told to stop."""
        chosen = random.Random(f"{self.seed}/{thread}")
        ask = self._ask if self.kind == "query" else self._connect
        while not self.stop.is_set():
            key = chosen.randrange(self.keys)
            began = time.monotonic()
            try:
                ask(key, chosen)
            except OSError as error:
                took = time.monotonic() - began
                self.told.failed.append(
                    f"{self.kind} IPv{self.version} key {key} at {began:.3f}: {error} ({took:.3f} s)"
                )
            time.sleep(PAUSE)

    def _connect(self, key: int, chosen: random.Random) -> None:
        with opened(self.kind, self.version, key) as client:
            began = time.monotonic()
            client.connect(self._to(self.kind))
            if self.kind == "late":
                began = time.monotonic()
            request = self._request(key, str(next(self._turns)))
            name, _ = exchange(client, request, chosen.choice(("fin", "reset")))
            self.told.answers.append((key, began, time.monotonic(), name))

    def _ask(self, key: int, _chosen: random.Random) -> None:
        for _ in range(TRIES):
            with opened(self.kind, self.version, key) as client:
                client.settimeout(AGAIN_SECONDS)
                client.connect(self._to(self.kind))
                began = time.monotonic()
                client.send(query(host(key)))
                with contextlib.suppress(TimeoutError):
                    name = client.recv(2048).split(b" ", 1)[0].decode()
                    self.told.answers.append((key, began, time.monotonic(), name))
                    return
        raise TimeoutError("no answer to any of the queries")

    # ---- those that stand ----

    def stand(self) -> None:
        """Open all, say "ready", and say something on each again and again."""
        standing = [(kind, *self._begin(kind, key)) for kind in ("early", "late", "flow") for key in range(self.keys)]
        print("ready", flush=True)
        while not self.stop.is_set():
            for kind, client, daemon in standing:
                try:
                    self._say(kind, client, daemon, b"%d " % self.told.said)
                    self.told.said += 1
                except OSError as error:
                    self.told.failed.append(f"standing {kind} IPv{self.version} to {daemon}: {error}")
            self.stop.wait(EVERY_SECONDS)
        for _, client, _ in standing:
            client.close()

    def _begin(self, kind: str, key: int) -> tuple[socket.socket, str]:
        client = opened(kind, self.version, key)
        client.connect(self._to(kind))
        if kind == "flow":
            client.send(f"k{key}.".encode())
            return client, client.recv(2048).split(b" ", 1)[0].decode()
        name, _ = exchange(client, self._request(key, f"standing-{kind}-{key}"), "stay")
        return client, name

    @staticmethod
    def _say(kind: str, client: socket.socket, daemon: str, word: bytes) -> None:
        client.send(word)
        answer = client.recv(2048)
        if kind == "flow":
            name, *_, word_back, end = answer.split(b" ")
            if (name.decode(), word_back + b" ", end) != (daemon, word, b""):
                raise ConnectionError(f"{answer!r} instead of {word!r}")
        elif answer != word:
            raise ConnectionError(f"{answer!r} instead of {word!r}")


def main() -> None:
    kind, (version, keys, threads, seed) = sys.argv[1], map(int, sys.argv[2:6])
    client = Client(kind, version, keys, seed)
    if kind == "standing":
        runs = [threading.Thread(target=client.stand)]
    else:
        runs = [threading.Thread(target=client.load, args=(number,)) for number in range(threads)]
        print("ready", flush=True)
    for run in runs:
        run.start()
    sys.stdin.read()
    client.stop.set()
    for run in runs:
        run.join()
    print(json.dumps(asdict(client.told)), flush=True)


if __name__ == "__main__":
    main()
