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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from steerd import late
from steerd import worker as worker_module
from steerd.control.doors import Porter
from steerd.control.states import States
from steerd.core.engine import Decision
from steerd.kernel import handshake, queue
from steerd.kernel.handshake import Handshake
from steerd.model import TCP, Answer, Reason
from steerd.orders import WorkerSettings
from steerd.telemetry.counters import Counters, LogSwitch
from steerd.wire import packet as wire
from steerd.wire.parser import History
from steerd.worker import Worker

HIGHEST_ID = (1 << 20) - 1
_NETLINK_NETFILTER = 12
_LOOPS = 20


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
        self.worker = Worker(WorkerSettings(0, 100, 4096, 1 << 20, directory, str(run), str(run / "counters"), "json"))
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

    def parts(self, flows: Sequence[Sequence[bytes]]) -> dict[str, float]:
        """CPU time for each of these flows (all its packets) that the parts of a decision take by themselves, each in a
        loop over all flows: the least of many loops. They are not all of it: what ties them together is the rest."""
        worker = self.worker
        read = [[packet for raw in flow if (packet := wire.parse(raw)) is not None] for flow in flows]
        worker._reader.advance()
        decided = [self._decide(packets) for packets in read]
        last = [packets[-1] for packets in read]

        def transaction() -> None:
            for _ in flows:
                worker._reader.advance()
                worker._reader.rest()

        def reading() -> None:
            for flow in flows:
                for raw in flow:
                    wire.parse(raw)

        def checksum() -> None:
            for flow, packets in zip(flows, read, strict=True):
                for raw, each in zip(flow, packets, strict=True):
                    if each.protocol == TCP and each.payload:
                        wire.is_damaged(each, raw)

        def engine() -> None:
            worker._reader.advance()
            for packets in read:
                self._decide(packets)
            worker._reader.rest()

        def record() -> None:
            for each, decision in zip(last, decided, strict=True):
                worker._record.begin()
                worker._record.decision(each, decision)

        def verdict() -> None:
            for decision in decided:
                worker._queue._verdict(queue.Ruling(1, decision.target_id))

        loops = {"transaction": transaction, "packet": reading, "checksum": checksum, "engine": engine,
                 "record": record, "verdict": verdict}  # fmt: skip
        return {name: min(_seconds(loop) for _ in range(_LOOPS)) / len(flows) * 1e6 for name, loop in loops.items()}

    def _decide(self, packets: Sequence[wire.Packet]) -> Decision:
        engine, last = self.worker._engine, packets[-1]
        if last.protocol != TCP:
            decision = engine.decide_datagrams(last, History(packet.payload for packet in packets))
        elif last.flags & wire.SYN:
            decision = engine.decide_syn(last)
        else:
            decision = engine.decide_first(last, last.payload)
        assert decision is not Answer.NEED_MORE
        return decision


def _seconds(loop: Callable[[], None]) -> float:
    began = time.thread_time()
    loop()
    return time.thread_time() - began
