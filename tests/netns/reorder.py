"""Reordering in the path: packets that come out of an NFQUEUE later than those that did not go through it.

    python -m tests.netns.reorder QUEUE

Who puts every n-th packet of a connection into the queue has it delayed until the next one comes, and so overtaken by
the n - 1 between them; or, if none comes, for PATIENCE seconds. Prints "bound" once it is.
"""

from __future__ import annotations

import select
import sys

from netfilterqueue import NetfilterQueue, Packet

PATIENCE = 0.001


def main() -> None:
    held: list[Packet] = []

    def release() -> None:
        while held:
            held.pop().accept()

    def hold(packet: Packet) -> None:
        release()
        held.append(packet)

    queue = NetfilterQueue()
    queue.bind(int(sys.argv[1]), hold)
    print("bound", flush=True)
    while True:
        if not select.select([queue.get_fd()], [], [], PATIENCE if held else None)[0]:
            release()
        queue.run(block=False)


if __name__ == "__main__":
    main()
