"""A kernel that refuses to forget what it was told to steer by itself: nobody is kept from going on, and it is told
again."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from structlog.testing import CapturingLogger
from structlog.typing import FilteringBoundLogger

from steerd import config
from steerd.control.registry import Registry
from steerd.errors import KernelError
from steerd.main.epochs import Epochs
from steerd.main.table import Table
from steerd.telemetry.counters import EPOCH_WORD, Counters

CONFIG = """
[pools.p]
prefixes = ["10.64.0.0/30"]
[services.main]
endpoints = ["203.0.113.10:443/tcp"]
inspect = ["port-extension"]
"""


class Kernel:
    """Stands for ruleset.forget_offloaded."""

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.epochs: list[int] = []

    def forget_offloaded(self, _nftables: object, epoch: int) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.epochs.append(epoch)


class Lab:
    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = Kernel()
        monkeypatch.setattr("steerd.main.epochs.ruleset", self.kernel)
        monkeypatch.setattr("steerd.main.epochs.Nftables", object)
        self.counters = Counters.create(directory / "counters", 1)
        self.log = CapturingLogger()
        self.epochs = Epochs(self.counters, cast(FilteringBoundLogger, self.log))


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "refusal", [KernelError("no answer in 2 s"), OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))]
)
def test_what_was_refused_is_owed_until_it_is_done(lab: Lab, refusal: Exception) -> None:
    lab.kernel.refusal = refusal
    lab.epochs.begin()
    lab.epochs.make_good()
    assert [call.method_name for call in lab.log.calls] == ["error", "error"]
    assert lab.counters.header[EPOCH_WORD] == 0, "workers add nothing to what was not emptied"
    lab.kernel.refusal = None
    for _ in range(2):
        lab.epochs.make_good()
    assert lab.kernel.epochs == [lab.counters.header[EPOCH_WORD]] == [1]


def test_whoever_takes_an_alias_meanwhile_has_it_alone(lab: Lab, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path))
    registry.on_answers_changed(lab.epochs.begin)
    lab.kernel.refusal = KernelError("no answer in 2 s")
    registry.publish(config.parse(CONFIG, "steerd.toml"))
    leases = [
        registry.leases.add(
            name, "p", service="main", when={"portext.dst": number}, source=None, port=80, ttl=None, now=1.0
        )
        for number, name in enumerate(("a", "b"), 1)
    ]
    assert len(lab.log.calls) == 3
    assert len({address for lease in leases for address in lease.addresses}) == 2
    registry.close()


def test_it_is_made_good_even_if_the_table_cannot_be_looked_after(lab: Lab) -> None:
    def refuse() -> None:
        raise KernelError("no answer in 2 s")

    lab.kernel.refusal = KernelError("no answer in 2 s")
    lab.epochs.begin()
    lab.kernel.refusal = None
    table = SimpleNamespace(_epochs=lab.epochs, _let_go=refuse, _log=lab.log)
    assert Table._mend(cast(Table, table), 7) == 7
    assert lab.kernel.epochs == [1]
