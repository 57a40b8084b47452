"""What a worker tells the kernel to steer by itself, and when it tells it nothing; nf_tables is a stand-in."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from steerd.core.engine import Engine
from steerd.core.marks import MarkLayout
from steerd.errors import KernelError
from steerd.kernel.nftables import Element, Nftables
from steerd.model import Extension
from steerd.offload import Offload
from steerd.telemetry.counters import EPOCH_WORD, Counters, Extra, LogSwitch
from steerd.wire import packet as wire
from steerd.wire import portext

NUMBERS = portext.Numbers()
TCP_OPTIONS = b"\x02\x04\x05\xb4\x04\x02\x08\x0a\x00\x00\x00\x01\x00\x00\x00\x00\x01\x03\x03\x07"
FULL = KernelError("nf_tables took no element for offload4 of table inet steerd: Too many open files in system")
NO_MEMORY = OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


def syn(extension: int) -> wire.Packet:
    tcp = struct.pack("!HHIIBBHHH", 40000, 443, 1, 0, 0xA0, 2, 64240, 0, 0) + TCP_OPTIONS
    head = struct.pack("!BBHHHBBH4s4s", 0x47, 0, 68, 0, 0, 64, 6, 0, bytes((198, 51, 100, 1)), bytes((203, 0, 113, 10)))
    packet = wire.parse(head + portext.encode_ipv4(Extension(extension, 0), NUMBERS) + tcp)
    assert packet is not None
    return packet


class Worker:
    """The kernel as a worker sees it, and what it told it."""

    def __init__(self, directory: Path) -> None:
        self.counters = Counters.create(directory / "counters", 1)
        self.counters.log = LogSwitch(0, 0)
        self.refusal: Exception | None = None
        self.asked = 0
        self._offload = Offload(self.counters, 0, cast(Nftables, self))
        self._offload.refresh(
            cast(Engine, SimpleNamespace(lasting_target=lambda _packet: 16)), MarkLayout(8, 31), NUMBERS
        )

    def insert(self, _elements: Sequence[Element]) -> None:
        self.asked += 1
        if self.refusal is not None:
            raise self.refusal

    def decide(self, *extensions: int) -> None:
        """First the verdicts on a few packets, and then what is to be done behind them."""
        wanted = [packet for packet in map(syn, extensions) if self._offload.wants(packet)]
        for packet in wanted:
            self._offload.tell(packet, lambda: None, lambda _target_id: True)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def test_each_extension_is_told_once_in_an_epoch(worker: Worker) -> None:
    worker.decide(1, 2)
    worker.decide(1, 2)
    assert (worker.asked, worker.counters.total(Extra.OFFLOADED)) == (2, 2)
    worker.counters.header[EPOCH_WORD] += 1
    worker.decide(1)
    assert worker.asked == 3


@pytest.mark.parametrize("refusal", [FULL, NO_MEMORY])
def test_a_kernel_that_refuses_is_told_no_more_until_the_next_epoch(worker: Worker, refusal: Exception) -> None:
    worker.refusal = refusal
    worker.decide(1, 2, 3)
    worker.decide(4, 5, 6)
    assert (worker.asked, worker.counters.total(Extra.OFFLOADED)) == (1, 0)
    worker.refusal = None
    worker.counters.header[EPOCH_WORD] += 1
    worker.decide(5)
    assert worker.counters.total(Extra.OFFLOADED) == 1
