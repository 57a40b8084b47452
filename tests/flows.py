"""What real programs send over UDP: the files in tests/vectors/udp, one datagram each.

`PARSER-PROGRAM-VERSION-WHAT.bin` is a flow of one datagram, `PARSER-PROGRAM-VERSION-WHAT-1.bin`, `-2.bin` and so on are
one of several, in the order in which they were sent.
"""

from __future__ import annotations

import re
from pathlib import Path

VECTORS = Path(__file__).parent / "vectors" / "udp"


def flow(name: str) -> list[bytes]:
    """The datagrams of a flow, by its name without numbers and `.bin`: `dns-dig-9.18.49-aaaa`."""
    alone = VECTORS / f"{name}.bin"
    if alone.exists():
        return [alone.read_bytes()]
    files = [VECTORS / f"{name}-{number}.bin" for number in range(1, len(list(VECTORS.glob(f"{name}-[0-9].bin"))) + 1)]
    assert files, f"There is no flow {name} in {VECTORS}."
    return [file.read_bytes() for file in files]


def flows(parser: str) -> list[str]:
    """The names of all flows of a parser."""
    return sorted({re.sub(r"-[0-9]$", "", file.stem) for file in VECTORS.glob(f"{parser}-*.bin")})


def only(name: str) -> bytes:
    """The datagram of a flow of one."""
    (datagram,) = flow(name)
    return datagram
