"""A worker (steerd.worker) without a kernel: what its own code takes for each packet, and nothing else.

Queue, nf_tables, raw sockets and conntrack are stand-ins that do nothing; registry, counters, engine and parsers are
the real ones, and so is the making of verdicts. For a process of its own, in which the stand-ins stay.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerd import late
from steerd import worker as worker_module
from steerd.control.doors import Porter
from steerd.control.states import States
from steerd.kernel import handshake, queue
from steerd.kernel.handshake import Handshake
from steerd.model import Reason
from steerd.orders import WorkerSettings
from steerd.telemetry.counters import Counters, LogSwitch
from steerd.worker import Worker

HIGHEST_ID = (1 << 20) - 1
_NETLINK_NETFILTER = 12


class _Nftables:
    def insert(self, _elements: object) -> None:
        pass

    def contains(self, _name: str, _key: bytes) -> bool:
        return False


class _Injector:
    def __init__(self, _mark: int) -> None:
        pass

    def send(self, _packet: bytes, _mark: int | None = None) -> None:
        pass

    def close(self) -> None:
        pass


class _Conntrack:
    def is_answered(self, _flow: object) -> bool:
        return False


class _NetfilterQueue:
    """Has a netlink socket, as the real one, but no queue."""

    def __init__(self) -> None:
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)

    def bind(self, _number: int, _on_packet: object, **_options: object) -> None:
        pass

    def get_fd(self) -> int:
        return self._netlink.fileno()


class _Netlink:
    def send(self, _data: bytes) -> None:
        pass


class Queued:
    """A packet as the queue hands it over."""

    mark = 0

    def __init__(self, id_: int, payload: bytes) -> None:
        self.id = id_
        self._payload = payload

    def get_payload(self) -> bytes:
        return self._payload


class Unplugged:
    """The worker of a registry that is filled."""

    def __init__(self, directory: str) -> None:
        stand_ins: list[tuple[Any, str, Any]] = [
            (worker_module, "Nftables", _Nftables),
            (handshake, "measure", lambda: Handshake(1460, 1440, 7)),
            (late, "Injector", _Injector),
            (late, "Conntrack", _Conntrack),
            (queue, "NetfilterQueue", _NetfilterQueue),
        ]
        for where, name, stand_in in stand_ins:
            setattr(where, name, stand_in)
        run = Path(directory) / f"run-{os.getpid()}"
        run.mkdir()
        self._counters = Counters.create(run / "counters", 1)
        self._counters.log = LogSwitch(logging.INFO, 0)
        self._states = States.create(str(run), HIGHEST_ID)
        self._porter = Porter(str(run))
        self.worker = Worker(
            WorkerSettings(0, 100, 4096, 1 << 20, directory, str(run), str(run / "counters"), "json", os.getpid())
        )
        verdicts: Any = _Netlink()
        self.worker._queue._netlink = verdicts
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000)

    def microseconds(self, packets: Sequence[bytes], reason: Reason, decisions: int) -> float:
        """CPU time for each decision, when the worker gets these packets, as many as are there at a time. Raises
        SystemExit if so many decisions with this reason are not what came of it."""
        queued = [Queued(number, packet) for number, packet in enumerate(packets)]
        on_packet, before = self.worker._on_packet, self._counters.total(reason)
        began = time.thread_time()
        for packet in queued:
            on_packet(packet)
        self.worker._reader.rest()
        self.worker._give()
        self.worker._datagram.rest()
        self.worker._watch_the_time()
        seconds = time.thread_time() - began
        made = self._counters.total(reason) - before
        if made != decisions:
            counted = {each.name: self._counters.total(each) for each in Reason if self._counters.total(each)}
            raise SystemExit(f"bench: {made} decisions instead of {decisions}: {counted}")
        return seconds / decisions * 1e6
