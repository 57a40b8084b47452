"""One of the demo's clients: connects to extended ports one after the other and holds every answer against its name.

    python -m tests.demo.client FIRST LAST STEP CLIENT-ADDRESS FIRST-ALIAS ALIAS-PORT FIRST-EXTENDED-PORT

Of the extended ports FIRST .. LAST it takes every STEP-th whose TCP port is not 0. It prints "N REACHED WRONG" now and
then and at the end (N: how many it has tried), and says on standard error what was wrong.
"""

from __future__ import annotations

import ipaddress
import sys

from steerd.model import Extension
from steerd.wire import portext
from tests.netns.load import ask

_REPORT_EVERY = 250
_TRIES = 3


def main() -> None:
    first, last, step, client, first_alias, alias_port, first_extended = sys.argv[1:]
    base = ipaddress.ip_address(first_alias)
    tried = reached = wrong = 0
    for extended_port in range(int(first), int(last) + 1, int(step)):
        if extended_port % 65536 == 0:
            continue
        tried += 1
        expected = f"{base + (extended_port - int(first_extended))} {alias_port} {client} "
        for attempt in range(_TRIES):
            try:
                extension, port = portext.split(extended_port)
                line = ask(4, port, Extension(extension, 0))
            except OSError as error:
                if attempt == _TRIES - 1:
                    print(f"extended port {extended_port}: {error}", file=sys.stderr)
                continue
            if line.startswith(expected):
                reached += 1
            else:
                wrong += 1
                print(f"extended port {extended_port}: expected {expected!r}, got {line!r}", file=sys.stderr)
            break
        if tried % _REPORT_EVERY == 0:
            print(tried, reached, wrong, flush=True)
    print(tried, reached, wrong, flush=True)


if __name__ == "__main__":
    main()
