"""What a scrape says, and that the alert rules and the dashboard that are shipped ask for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from steerd.model import Reason
from steerd.telemetry import metrics
from steerd.telemetry.counters import Counters, Extra, Gauge, Meter

SHIPPED = resources.files("steerd") / "telemetry" / "monitoring"
ALERTS = (SHIPPED / "alerts.yml").read_text()
DASHBOARD = json.loads((SHIPPED / "dashboard.json").read_text())
OURS = re.compile(r"\bsteerd_[a-z_]+")
# Beside those of a sample: what Prometheus adds, and what the rules' own `by` makes.
OTHER_LABELS = {"instance", "job", "le"}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def counters(tmp_path: Path) -> Counters:
    made = Counters.create(tmp_path / "counters", 2)
    made.name_series([("web", ["tls", "port-extension"]), ("mail", [])])
    return made


def snapshot(counters: Counters) -> metrics.Snapshot:
    return metrics.Snapshot(
        version="1.2.3",
        counters=counters,
        queues=[metrics.Queue(3, {"queue_full": 1, "socket_full": 2}), metrics.Queue(None, {})],
        pools={"tenants": metrics.Pool({"ipv4": 256, "ipv6": 128}, 7, 9)},
        routes={"web": {"static": 2, "dynamic": 1_000_000}},
        sessions=5,
        kernel_packets={"diverted": 11},
        synproxy={"cookie_valid": 13},
        conntrack_entries=17,
        conntrack_max=262144,
    )


def scraped(shot: metrics.Snapshot) -> Samples:
    text, content_type = metrics.exposition(shot, "")
    assert content_type.startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(text.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_decisions_and_their_times(counters: Counters) -> None:
    Meter(counters, 0).count("web", "tls", Reason.ROUTE, 30_000)
    Meter(counters, 1).count("web", "tls", Reason.ROUTE, 50_000)
    Meter(counters, 1).count("web", "", Reason.TOO_SLOW, 2_000_000_000)
    Meter(counters, 1).count("", "", Reason.FAULT, 1_000)
    found = scraped(snapshot(counters))
    decisions = {labels: value for (name, labels), value in found.items() if name == "steerd_decisions_total"}
    assert decisions == {
        (("parser", "tls"), ("reason", "route"), ("service", "web")): 2,
        (("parser", ""), ("reason", "too_slow"), ("service", "web")): 1,
        (("parser", ""), ("reason", "fault"), ("service", "")): 1,
    }
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in found.items()
        if name == "steerd_decision_seconds_bucket" and ("service", "web") in labels
    }
    assert (buckets["2.5e-05"], buckets["5e-05"], buckets["0.1"], buckets["+Inf"]) == (0, 2, 2, 3)
    assert len(buckets) == 15
    assert found["steerd_decision_seconds_count", (("service", "web"),)] == 3
    assert found["steerd_decision_seconds_sum", (("service", "web"),)] == pytest.approx(2.00008)


def test_everything_else(counters: Counters) -> None:
    for worker in range(2):
        slot = counters.slot(worker)
        slot[Gauge.PENDING_CONNECTIONS], slot[Gauge.PENDING_FLOWS], slot[Gauge.PENDING_BYTES] = 1, 2, 1000
        slot[Extra.RESTARTS] = worker
        slot[Extra.HELD] = 4
        slot[Extra.NOT_LOGGED] = 8
    found = {
        (name, *(value for _, value in labels)): value
        for (name, labels), value in scraped(snapshot(counters)).items()
        if not (name == "steerd_worker_events_total" and not value)
    }
    assert found == {
        ("steerd_build_info", "1.2.3"): 1,
        ("steerd_worker_restarts_total", "0"): 0,
        ("steerd_worker_restarts_total", "1"): 1,
        ("steerd_worker_events_total", "held"): 8,
        ("steerd_log_suppressed_total",): 16,
        ("steerd_pending", "connections"): 2,
        ("steerd_pending", "flows"): 4,
        ("steerd_pending_bytes",): 2000,
        ("steerd_worker_up", "0"): 1,
        ("steerd_worker_up", "1"): 0,
        ("steerd_queue_depth", "0"): 3,
        ("steerd_queue_dropped_total", "queue_full", "0"): 1,
        ("steerd_queue_dropped_total", "socket_full", "0"): 2,
        ("steerd_aliases", "ipv4", "tenants"): 256,
        ("steerd_aliases", "ipv6", "tenants"): 128,
        ("steerd_leases", "tenants"): 7,
        ("steerd_quarantined", "tenants"): 9,
        ("steerd_routes", "static", "web"): 2,
        ("steerd_routes", "dynamic", "web"): 1_000_000,
        ("steerd_sessions",): 5,
        ("steerd_kernel_packets_total", "diverted"): 11,
        ("steerd_synproxy_total", "cookie_valid"): 13,
        ("steerd_conntrack_entries",): 17,
        ("steerd_conntrack_max",): 262144,
    }


def test_what_the_kernel_does_not_tell_is_left_out_and_the_rest_is_there(counters: Counters) -> None:
    whole = scraped(snapshot(counters))
    nothing = snapshot(counters)._replace(
        queues=None, kernel_packets=None, synproxy=None, conntrack_entries=None, conntrack_max=None
    )
    left_out = {name for name, _ in whole.keys() - scraped(nothing).keys()}
    assert left_out == {
        "steerd_worker_up", "steerd_queue_depth", "steerd_queue_dropped_total", "steerd_kernel_packets_total",
        "steerd_synproxy_total", "steerd_conntrack_entries", "steerd_conntrack_max",
    }  # fmt: skip


def test_who_asks_for_openmetrics_gets_it(counters: Counters) -> None:
    text, content_type = metrics.exposition(snapshot(counters), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


# ---- what is shipped ----


def queries(node: object) -> Iterator[str]:
    """Every expression of a dashboard."""
    if isinstance(node, dict):
        yield from (node[key] for key in ("expr", "query") if isinstance(node.get(key), str))
        for value in node.values():
            yield from queries(value)
    elif isinstance(node, list):
        for value in node:
            yield from queries(value)


@pytest.mark.parametrize("text", [ALERTS, "\n".join(queries(DASHBOARD))], ids=["alerts", "dashboard"])
def test_what_is_shipped_asks_for_metrics_and_labels_that_exist(counters: Counters, text: str) -> None:
    Meter(counters, 0).count("web", "tls", Reason.ROUTE, 30_000)
    there = scraped(snapshot(counters))
    asked = set(OURS.findall(text))
    assert len(asked) > 10
    assert asked <= {name for name, _ in there}
    labels = {label for _, pairs in there for label, _ in pairs} | OTHER_LABELS
    grouped = {name for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", text) for name in group.split(", ")}
    matched = set(re.findall(r"[{,]\s*(\w+)=?[=~!]", " ".join(re.findall(r"\{[^{}]*=[^{}]*\}", text))))
    assert grouped | matched <= labels
    reasons = {reason for words in re.findall(r'reason!?=~?"([^"]*)"', text) for reason in words.split("|")}
    assert reasons <= {reason.name.lower() for reason in Reason}
    events = {event for words in re.findall(r'event=~?"([^"]*)"', text) for event in words.split("|")}
    assert events <= {extra.name.lower() for extra in Extra}


def test_the_dashboard_is_one_that_grafana_can_draw() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "no two panels overlap"
    assert max(x for x, _ in cells) < 24
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    used = {name for query in queries(panels) for name in re.findall(r"\$(\w+)", query)}
    assert used <= variables
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
