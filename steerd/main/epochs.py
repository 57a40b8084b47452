"""Has the kernel forget what it was told to steer by itself, whenever an answer may have changed (core.offload)."""

from __future__ import annotations

import threading

from structlog.typing import FilteringBoundLogger

from steerd.errors import KernelError
from steerd.kernel import ruleset
from steerd.kernel.nftables import Nftables
from steerd.telemetry.counters import EPOCH_WORD, Counters


class Epochs:
    """The epochs between two changes. For any thread."""

    def __init__(self, counters: Counters, log: FilteringBoundLogger) -> None:
        self._words = counters.header
        self._log = log
        self._lock = threading.Lock()
        self._nftables = Nftables()
        self._is_owed = False

    def begin(self) -> None:
        """Something else is in force now. When this returns, the kernel answers nothing by what was decided before; if
        it refuses to forget, that is logged, and `make_good`, which the table's keeper calls each second, tries again.

        It does not raise then: what changed is on the disk already, so an answer that it is not would be wrong, and
        what the registry still has to note in memory (whose alias it is now) must not be left out.
        """
        with self._lock:
            epoch = (self._words[EPOCH_WORD] + 1) & 0xFFFFFFFF
            try:
                ruleset.forget_offloaded(self._nftables, epoch)
            except (KernelError, OSError) as error:
                self._is_owed = True
                self._log.error("the kernel may steer extensions as they were decided before a change", why=str(error))
                return
            self._words[EPOCH_WORD] = epoch
            self._is_owed = False

    def make_good(self) -> None:
        """Begin the epoch that could not be begun, if there is one."""
        if self._is_owed:
            self.begin()
