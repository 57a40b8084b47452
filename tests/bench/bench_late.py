"""Late steering by the name in a TLS ClientHello, against plain kernel DNAT, HAProxy, nginx stream and sslh.

Gateways and kinds: tests/bench/byname.py. A connection is connect, send a ClientHello, read the daemon's name (which is
checked), close. The hellos are those of real programs (tests/vectors) with the daemon's name written into them: curl's,
one segment, and for the kinds `..._browser` Chromium's, two segments, with the name in the first, and for
`..._shuffled` another one of Chromium's, which puts its extensions into any order, with the name in the second. The
daemon answers after as many bytes; nobody does any cryptography, so that what is left is what the gateway costs.

48 at a time for the rate, 1 and 32 at a time for latency (connect to first byte of the answer). `..._per_cpu_second`
compares connections for each second of CPU time, everybody included; `..._at_best` is the same as if the workers' own
code took no time at all, so that nothing but the kernel's work were left of them. sslh tries its list of names one by
one, so the length of the list is its cost; it has IPv4 here, and one thread.

**Where the time goes** (us of CPU a connection, IPv4, one segment, 48 at a time, 2 cores of an AMD EPYC, Linux 6.18;
figures of one run differ by a tenth from those of the next):

    everybody (/proc)       late 149 = client and server 83 + workers in the kernel 42 + in Python 24
                            DNAT 90, HAProxy 166 (itself 91, of which 79 in the kernel), nginx 166
    workers (perf, by call  Python 50, verdict 30 (the cookie, the kernel's own connection to the daemon), copy 23 (the
    chain: 110 in all; on   payload delivered, the daemon woken), recv 2, poll 1, switches and interrupts 4;
    a busy machine)         within these: nft rules 11, conntrack 4, routing again after translation 5

Deciding alone takes 14 us in a loop. Among the kernel's work it takes five times as much for the first packet of a
batch as for the fifteenth: the rest of Python's share is cold caches.

So the aims of 0.8 x DNAT and 1.5 x HAProxy are not reached, and no faster worker alone would reach them here: if Python
took no time at all (`..._at_best`), 0.69 and 1.30 would remain. A late connection is opened twice, by the client and to
the daemon, and its payload arrives twice; DNAT opens one.

A hello of two segments with the name in the first (`browser`) takes 48 us more: the second comes to the worker as well,
if it comes before the verdict, and is sent on. With the name in the second (`shuffled`) it takes 126 us more: the first
is held, and both are made anew.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tests.bench import byname, report
from tests.bench.byname import CAPTURED_NAME, NAME_TEMPLATE, kinds
from tests.bench.lab import PARTS, Run
from tests.bench.peers import Choice
from tests.bench.scenario import Goal, Result, rounds_of

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
HELLO = (VECTORS / "tls-curl-7.88.1-get.bin").read_bytes().replace(CAPTURED_NAME, NAME_TEMPLATE)
BROWSER_HELLO = (VECTORS / "tls-chromium-156.0.8078.79-first.bin").read_bytes().replace(CAPTURED_NAME, NAME_TEMPLATE)
SHUFFLED_HELLO = (
    (VECTORS / "tls-chromium-156.0.8078.79-late-sni.bin").read_bytes().replace(CAPTURED_NAME, NAME_TEMPLATE)
)
DAEMONS = Run("answer", len(HELLO), first=0, size=1024)
BROWSER_DAEMONS = Run("answer", len(BROWSER_HELLO), first=1024, size=256)
SHUFFLED_DAEMONS = Run("answer", len(SHUFFLED_HELLO), first=1280, size=256)
ROUNDS = rounds_of(9)
BROWSER_ROUNDS = rounds_of(5)
SYSTEMS = ("late", "dnat", "haproxy", "nginx", "sslh")
SYSTEMS6 = SYSTEMS[:4]
KINDS = (*kinds(SYSTEMS, HELLO), *kinds(SYSTEMS6, HELLO, "6", 6))
BROWSER = kinds(SYSTEMS6, BROWSER_HELLO, "_browser")
SHUFFLED = kinds(SYSTEMS6, SHUFFLED_HELLO, "_shuffled")


def run(console: Console) -> Result:
    """All kinds in turn; about four minutes."""
    with ExitStack() as stack:
        bench = byname.Bench(stack, console, Choice.TLS, [DAEMONS, BROWSER_DAEMONS, SHUFFLED_DAEMONS], SYSTEMS)
        throughput, latency = bench.opened(KINDS, DAEMONS, ROUNDS)
        browser = bench.opened(BROWSER, BROWSER_DAEMONS, BROWSER_ROUNDS)
        shuffled = bench.opened(SHUFFLED, SHUFFLED_DAEMONS, BROWSER_ROUNDS)
    figures = byname.figures(throughput, latency) | byname.figures(*browser) | byname.figures(*shuffled)
    figures["conditions"] = {
        "rounds": ROUNDS, "connections_a_round": byname.COUNT, "at_a_time": byname.PARALLEL, "daemons": DAEMONS.size,
        "names": bench.lab.size, "parts": PARTS, "hello_bytes": len(HELLO), "browser_hello_bytes": len(BROWSER_HELLO),
        "shuffled_hello_bytes": len(SHUFFLED_HELLO),
        "all_on_one_machine": True, "void_rounds": bench.lab.void,
    }  # fmt: skip
    ratios = byname.ratios(throughput, SYSTEMS) | byname.ratios(throughput, SYSTEMS6, "6")
    ratios |= byname.ratios(browser[0], SYSTEMS6, "_browser")
    ratios |= byname.ratios(shuffled[0], SYSTEMS6, "_shuffled")
    report.show_ratios(console, ratios)
    report.show(console, {**throughput, **browser[0], **shuffled[0]}, figures)
    goals = [Goal("late/dnat", 0.8), Goal("late/haproxy", 1.5), Goal("late6/dnat6", 0.8), Goal("late6/haproxy6", 1.5)]
    return Result("late", ratios, figures, goals, byname.charts(throughput, latency, figures, SYSTEMS))
