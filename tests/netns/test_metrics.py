"""What monitors and the log say is what happened: exact counts, bounded labels, and what survives what.

Topology: tests/netns/gateway.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from steerd.model import Extension, Reason
from steerd.telemetry.counters import Counters
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host
from tests.unit.test_metrics import ALERTS, DASHBOARD, queries

CONFIG = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.early]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = { pool = "tenants", by = "extension", port = 8080 }
[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["tls", "http"]
routes = [{ when = { "http.host" = "a.example" }, target = ["10.64.0.1:8080", "[fd00:64::1]:8080"] }]
"""
METRICS = '[gateway.metrics]\nlisten = "127.0.0.1:9464"\n'
ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
Samples = dict[tuple[str, ...], float]


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        yield made


def start(lab: Gateway, listen: str = "127.0.0.1:9464", more: str = "") -> None:
    lab.configure(CONFIG + f'[gateway.metrics]\nlisten = "{listen}"\n', more)
    lab.start()
    lab.respond(("10.64.0.0", 16, 8080), ("fd00:64::", 16, 8080))


def scrape(lab: Gateway, listen: str = "127.0.0.1:9464") -> str:
    """As Prometheus would have it, once what was asked for last is a second old."""
    path = listen.removeprefix("unix:")
    place = f"--unix-socket {path} http://steerd" if listen.startswith("unix:") else f"http://{listen}"
    return lab.host.sh(f"sleep 1.1; curl -sSf -g --max-time 20 {place}/metrics")


def samples(text: str, name: str) -> Samples:
    """The samples of one name, by the values of their labels in the order of the labels' names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def decisions(lab: Gateway) -> Samples:
    """By parser, reason and service."""
    return samples(scrape(lab), "steerd_decisions_total")


def say(lab: Gateway, data: bytes, version: int = 4) -> None:
    """A connection to the late service, and its end; whatever that is."""
    with lab.socket(None, version=version) as client:
        client.connect((ENDPOINT[version], 80))
        with contextlib.suppress(OSError):  # reset, now or a moment ago
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):
                pass


def request(host: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def promtool(*arguments: str, text: str = "") -> None:
    done = subprocess.run(
        ["promtool", *arguments], input=text, capture_output=True, text=True, cwd=ROOT / "tests", check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("listen", ["[::1]:9464", "unix:{}/run/metrics.sock"])
def test_where_else_metrics_are_served(lab: Gateway, listen: str) -> None:
    listen = listen.format(lab.directory)
    start(lab, listen)
    lab.ask(Extension(1, 0), 443)
    assert samples(scrape(lab, listen), "steerd_decisions_total") == {("port-extension", "arithmetic", "early"): 1}
    if listen.startswith("unix:"):
        lab.stop()
        assert not Path(listen.removeprefix("unix:")).exists()


def test_counts_are_exact_and_outlive_workers_and_the_daemon(lab: Gateway) -> None:
    start(lab)
    for version, number in itertools.product((4, 6), range(1, 11)):
        assert lab.ask(Extension(number, 0), 443, version=version).startswith(("10.64.", "fd00:64:"))
        say(lab, request("a.example"), version)
    say(lab, request("b.example"))
    say(lab, b"\x16\x03\x01 and no TLS")
    say(lab, b"\r\n" * 30 + b"\0")
    expected = {
        ("port-extension", "arithmetic", "early"): 20,
        ("http", "route", "web"): 20,
        ("http", "unmatched", "web"): 1,
        ("", "unmatched", "web"): 2,
    }
    text = scrape(lab)
    promtool("check", "metrics", text=text)
    assert samples(text, "steerd_decisions_total") == expected
    assert samples(text, "steerd_decision_seconds_count") == {("early",): 20, ("web",): 23}
    times = samples(text, "steerd_decision_seconds_bucket")
    assert times["+Inf", "web"] == 23
    assert samples(text, "steerd_decision_seconds_sum")["web",] > 0
    assert samples(text, "steerd_worker_up") == {("0",): 1, ("1",): 1}
    assert samples(text, "steerd_queue_depth") == {("0",): 0, ("1",): 0}
    assert samples(text, "steerd_aliases") == {("ipv4", "tenants"): 256, ("ipv6", "tenants"): 256}
    assert samples(text, "steerd_routes") == {
        ("static", "early"): 0, ("dynamic", "early"): 0, ("static", "web"): 1, ("dynamic", "web"): 0,
    }  # fmt: skip
    counted = {name: count for (name,), count in samples(text, "steerd_kernel_packets_total").items()}
    assert counted == lab.counters()
    assert counted["diverted"] >= 43
    assert samples(text, "steerd_synproxy_total")["cookie_valid",] >= 20
    assert 0 < samples(text, "steerd_conntrack_entries")[()] <= samples(text, "steerd_conntrack_max")[()]

    lab.expected_warnings = ["worker died"]
    bound = lab.count_events("worker bound")
    for event in lab.events():
        if event["event"] == "worker bound":
            os.kill(event["pid"], signal.SIGKILL)
    lab.wait(lambda: lab.count_events("worker bound") == bound + 2, "both workers are back")
    assert decisions(lab) == expected
    # What no worker has decided before.
    lab.ask(Extension(11, 0), 443)
    expected["port-extension", "arithmetic", "early"] += 1
    lab.kill()
    lab.start()
    lab.ask(Extension(1, 0), 443)
    expected["port-extension", "arithmetic", "early"] += 1
    text = scrape(lab)
    assert samples(text, "steerd_decisions_total") == expected
    assert samples(text, "steerd_worker_restarts_total") == {("0",): 1, ("1",): 1}


def test_scrapes_while_traffic_runs_never_go_back_and_labels_stay_bounded_under_junk(lab: Gateway) -> None:
    start(lab)
    lab.allow_unasked = True
    rng = random.Random(1)
    done = threading.Event()

    def junk() -> None:
        while not done.is_set():
            version = rng.choice((4, 6))
            data = rng.choice((rng.randbytes(rng.randint(1, 200)), request(rng.randbytes(8).hex()), b"\x16\x03" * 9))
            say(lab, data, version)
            client = lab.socket(Extension(rng.randint(1, 65535), rng.randint(0, 65535)), version=version)
            with client, contextlib.suppress(ConnectionError):
                client.connect((ENDPOINT[version], 443))

    clients = [threading.Thread(target=junk) for _ in range(4)]
    for client in clients:
        client.start()
    seen: list[Samples] = []
    try:
        for _ in range(3):
            seen.append(decisions(lab))
    finally:
        done.set()
        for client in clients:
            client.join()
    for before, after in itertools.pairwise(seen):
        assert all(after[labels] >= count for labels, count in before.items())
        assert sum(after.values()) > sum(before.values())
    text = scrape(lab)
    promtool("check", "metrics", text=text)
    found = samples(text, "steerd_decisions_total")
    assert {service for _, _, service in found} <= {"early", "web", ""}
    assert {parser for parser, _, _ in found} <= {"", "port-extension", "tls", "http"}
    assert {reason for _, reason, _ in found} <= {reason.name.lower() for reason in Reason}
    counters = Counters.open(lab.directory / "run" / "counters")
    assert sum(found.values()) == sum(counters.total(reason) for reason in Reason)
    assert sum(samples(text, "steerd_decision_seconds_count").values()) == sum(found.values())


def test_undecided_connections_are_seen(lab: Gateway) -> None:
    start(lab)
    waiting = [lab.socket(None, version=version) for version in (4, 6)]
    for version, client in zip((4, 6), waiting, strict=True):
        client.connect((ENDPOINT[version], 80))
        client.sendall(b"GET / HTTP/1.1\r\n")

    def pending() -> tuple[float, float]:
        text = scrape(lab)
        return samples(text, "steerd_pending")["connections",], samples(text, "steerd_pending_bytes")[()]

    lab.wait(lambda: pending() == (2, 32), "both are seen")
    for client in waiting:
        client.sendall(b"Host: a.example\r\n\r\n")
        client.close()
    lab.wait(lambda: pending() == (0, 0), "none is left")


def test_who_only_connects_keeps_nobody_out(lab: Gateway) -> None:
    start(lab)
    with lab.host.entered():
        idle = [socket.create_connection(("127.0.0.1", 9464)) for _ in range(200)]
    assert "steerd_build_info" in scrape(lab)
    established = lab.host.sh("ss -Htn state established 'sport = :9464' | wc -l")
    assert int(established) <= 32
    for client in idle:
        client.close()


def test_a_place_that_is_taken_keeps_the_daemon_from_starting(lab: Gateway) -> None:
    with lab.host.entered():
        taken = socket.create_server(("127.0.0.1", 9464))
    with taken:
        lab.configure(CONFIG + METRICS)
        done = subprocess.run(
            lab.host.command(sys.executable, "-m", "steerd.cli.main", "run", str(lab.config)),
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
    assert done.returncode != 0
    assert "gateway.metrics.listen: 127.0.0.1:9464 cannot be listened on: Address already in use." in done.stderr


# ---- the log ----


def test_failed_decisions_are_logged_with_their_keys_and_not_more_than_so_many(lab: Gateway) -> None:
    start(lab)
    lab.allow_unasked = True
    tries = 60
    for number in range(tries):
        say(lab, request(f"tenant-{number}.example"), 4 + 2 * (number % 2))

    def told() -> tuple[int, int]:
        events = lab.events()
        lines = [event for event in events if event["event"] == "decision" and event["reason"] == "unmatched"]
        left_out = [event for event in events if event["event"] == "failed decisions that were not logged"]
        return len(lines), sum(event["decisions"] for event in left_out)

    lab.wait(lambda: sum(told()) == tries, "all are accounted for")
    first = next(event for event in lab.events() if event["event"] == "decision")
    assert (first["service"], first["reason"], first["parser"]) == ("web", "unmatched", "http")
    assert first["outcome"] == "reset"
    assert first["keys"]["http.host"] == "tenant-0.example"
    assert (first["target"], first["route"]) == (None, None)
    assert first["microseconds"] > 0
    lines, left_out = told()
    assert samples(scrape(lab), "steerd_log_suppressed_total")[()] == left_out == tries - lines


def test_the_access_log_is_switched_while_it_runs_and_names_the_route(lab: Gateway) -> None:
    start(lab)

    def switch(*words: str) -> str:
        return lab.host.sh(f"cd {ROOT}; {sys.executable} -m steerd.cli.ctl log {' '.join(words)} --config {lab.config}")

    def lines() -> list[dict[str, object]]:
        return [event for event in lab.events() if event["event"] == "decision"]

    say(lab, request("a.example"))
    assert lines() == []
    assert switch("access", "all") == "level: info\ndecisions: all\n"
    for version in (4, 6):
        say(lab, request("a.example"), version)
        lab.ask(Extension(3, 0), 443, version=version)
    lab.wait(lambda: len(lines()) == 4, "four decisions are logged")
    assert [(line["parser"], line["reason"], line["route"], line["target"]) for line in lines()] == [
        ("http", "route", "services.web.routes[0]", "10.64.0.1:8080"),
        ("port-extension", "arithmetic", None, "10.64.0.2:8080"),
        ("http", "route", "services.web.routes[0]", "[fd00:64::1]:8080"),
        ("port-extension", "arithmetic", None, "[fd00:64::2]:8080"),
    ]
    assert switch("level", "error") == "level: error\ndecisions: all\n"
    say(lab, request("a.example"))
    switch("level", "info")
    switch("access", "off")
    say(lab, request("a.example"))
    assert len(lines()) == 4
    # A reload that says nothing new of it leaves the switch alone.
    switch("access", "3")
    for body, expected in ((CONFIG, "one of 3, and those that failed"), (CONFIG.replace("a.ex", "b.ex"), "all")):
        lab.configure(body + METRICS, "access_log = 1" if expected == "all" else "")
        reloads = lab.count_events("reloaded")
        assert lab.daemon is not None
        lab.daemon.send_signal(signal.SIGHUP)
        lab.wait(lambda: lab.count_events("reloaded") > reloads, "the daemon has reloaded")  # noqa: B023
        assert switch() == f"level: info\ndecisions: {expected}\n"


def test_a_reader_of_the_log_that_is_stuck_holds_up_no_connection(lab: Gateway) -> None:
    lab.configure(CONFIG, "access_log = 1")
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
    with os.fdopen(reader) as log:
        lab.daemon = subprocess.Popen(
            lab.host.command(sys.executable, "-m", "steerd.cli.main", "run", str(lab.config)), stderr=writer, cwd=ROOT
        )
        os.close(writer)
        while json.loads(log.readline())["event"] != "ready":
            pass
        lab.respond(("10.64.0.0", 16, 8080), ("fd00:64::", 16, 8080))
        for version, number in itertools.product((4, 6), range(1, 16)):
            assert lab.ask(Extension(number, 0), 443, version=version)
        said = [json.loads(log.readline()) for _ in range(3)]
        assert {event["event"] for event in said} == {"decision"}
        # Each worker says how many of its lines were lost, with its next one.
        for version, number in itertools.product((4, 6), range(1, 8)):
            assert lab.ask(Extension(number, 0), 443, version=version)
        lab.daemon.send_signal(signal.SIGTERM)
        events = [json.loads(line) for line in log]
        assert lab.daemon.wait(60) == 0
    assert any(event["event"] == "log lines were lost" and event["lines"] > 0 for event in events)
    lab.daemon = None


# ---- what is shipped ----


def test_promtool_has_nothing_against_the_alert_rules(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(ALERTS)
    promtool("check", "rules", "--lint-fatal", str(tmp_path / "alerts.yml"))
    promtool("test", "rules", "alerts.yml")


def test_promtool_can_read_what_the_dashboard_asks_for(tmp_path: Path) -> None:
    asked = [query.replace("$__rate_interval", "1m") for query in queries(DASHBOARD["panels"])]
    assert len(asked) > 20
    rules = "".join(f"  - record: panel:{number}\n    expr: '{query}'\n" for number, query in enumerate(asked))
    (tmp_path / "rules.yml").write_text(f"groups:\n- name: dashboard\n  rules:\n{rules}")
    promtool("check", "rules", str(tmp_path / "rules.yml"))
