"""The nursery: a process that has imported what workers are made of, and forks them. `python -m steerd.nursery PID`,
started by the main process, whose number this is, and which speaks to it through standard input (steerd.orders).

A worker out of the nursery is there at once, and its code is the same memory as that of the others; one that is an
interpreter of its own takes 0.25 s, at each start and whenever one has died, and 20 MB. The main process cannot fork
them itself: its threads' locks and its LMDB environment must not be taken along.

It has one thread and owns nothing. It ends with the main process, and its workers end with it; if it is killed, the
main process starts another.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import selectors
import signal
import socket
import sys
import traceback
from typing import NamedTuple, NoReturn

from steerd import orders, worker
from steerd.orders import Kill, Start, WorkerSettings

_PR_SET_PDEATHSIG = 1
_LONGEST_ORDER = 1 << 16


class _Child(NamedTuple):
    pid: int
    descriptor: int
    """A pidfd."""
    pipe: int


class Nursery:
    """Takes orders until there are no more."""

    def __init__(self, taking: socket.socket) -> None:
        self._orders = taking
        self._selector = selectors.DefaultSelector()
        self._selector.register(taking, selectors.EVENT_READ)
        self._children: dict[int, _Child] = {}

    def run(self) -> None:
        """Returns when the main process has ended."""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._bury(key.data)
                elif not self._take_order():
                    return

    def _take_order(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._orders, _LONGEST_ORDER, 1)
        if not data:
            return False
        match orders.decode(data):
            case Start(settings):
                self._start(settings, descriptors[0])
            case Kill(pid) if pid in self._children:
                os.kill(pid, signal.SIGKILL)
        return True

    def _start(self, settings: WorkerSettings, pipe: int) -> None:
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # no memory or no process to be had: that may pass
            self._tell(pipe, orders.ended(error.errno or 1))
            return
        if not pid:
            self._become_worker(settings, pipe, parent)
        child = _Child(pid, os.pidfd_open(pid), pipe)
        self._children[pid] = child
        self._selector.register(child.descriptor, selectors.EVENT_READ, child)
        with contextlib.suppress(BrokenPipeError):
            os.write(pipe, orders.born(pid))

    def _become_worker(self, settings: WorkerSettings, pipe: int, parent: int) -> NoReturn:
        status = 1
        try:
            die_with(parent)
            # Whoever waits for the end of another worker, or of the orders, must not wait for this one.
            for child in self._children.values():
                os.close(child.pipe)
                os.close(child.descriptor)
            self._selector.close()
            self._orders.close()
            status = worker.serve(settings, pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _bury(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        self._selector.unregister(child.descriptor)
        os.close(child.descriptor)
        del self._children[child.pid]
        self._tell(child.pipe, orders.ended(os.waitstatus_to_exitcode(status)))

    @staticmethod
    def _tell(pipe: int, last: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # the main process has ended, and so will this
            os.write(pipe, last)
        os.close(pipe)


def die_with(parent: int) -> None:
    """A queue has one owner: a worker without its main process would keep the next one's workers out."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def main() -> None:
    """See above."""
    die_with(int(sys.argv[1]))
    # Both are the main process's to handle.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # What is here stays; were it looked at by collections in workers, each would get a copy of its own.
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as taking:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, sys.stdin.fileno())
        os.close(null)
        Nursery(taking).run()


if __name__ == "__main__":
    main()
