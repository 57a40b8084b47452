"""Clients that connect one after the other, each to another extension, and check who answers; until standard input
ends. Prints {"right": n, "wrong": n, "failed": n}. To be run on the client's host.
"""

from __future__ import annotations

import json
import select
import socket
import sys
from collections import Counter
from itertools import cycle

from steerd.model import Extension
from steerd.wire import portext
from tests.netns.gateway import ENDPOINT4, NUMBERS

# A SYN that is dropped while workers are away is sent again after 1, 3, 7 and 15 seconds.
_PATIENCE = 30


def ask(extension: int) -> str:
    with socket.socket() as client:
        client.settimeout(_PATIENCE)
        client.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, portext.encode_ipv4(Extension(extension, 0), NUMBERS))
        try:
            client.connect((ENDPOINT4, 443))
            answer = client.recv(256)
        except OSError:
            return "failed"
    return "right" if answer.startswith(f"10.64.0.{extension - 1} 8080 ".encode()) else "wrong"


def main() -> None:
    counts = Counter({"right": 0, "wrong": 0, "failed": 0})
    for extension in cycle(range(1, 17)):
        counts[ask(extension)] += 1
        if select.select([sys.stdin], [], [], 0.02)[0]:
            break
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
