"""The API's view of what is configured and who has what: services, endpoints, pools, aliases, targets, all routes,
status; and explain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from steerd import config
from steerd.control.api import status
from steerd.control.registry import Registry
from steerd.model import Target
from tests.unit.test_api import Bare, Served, serving

TEXT = """
[pools.tenants]
prefixes = ["10.64.0.0/29", "fd00:64::/126"]
[pools.vast]
prefixes = ["fd01::/40"]
mode = "anyip"
[services.names]
endpoints = ["203.0.113.10:53/udp", "203.0.113.10:53/tcp"]
inspect = ["dns"]
default = "10.64.0.2:53"
[services.ports]
endpoints = ["203.0.113.9:1000-2000/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = { pool = "tenants", by = "extension", port = 8080 }
[services.quic]
endpoints = ["[2001:db8::10]:443/udp"]
inspect = ["quic"]
unmatched = "drop"
routes = [{ when = { "quic.sni" = "a.example" }, target = "[fd00:64::1]:443" }]
[services.web]
endpoints = ["203.0.113.10:443/tcp"]
inspect = ["http"]
on_silence = "10.64.0.3:25"
routes = [
    { when = { "http.host" = "a.example" }, target = "10.64.0.1:80" },
    { when = { "http.host" = "b.example" }, target = { address = "192.0.2.7:same", external = true } },
]
[services.web.sessions]
key = "http.cookie.id"
on_new_source = "allow"
"""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(str(tmp_path))
    made.publish(config.parse(TEXT, "steerd.toml"))
    yield made
    made.close()


@pytest.fixture
def api(tmp_path: Path, registry: Registry) -> Iterator[Served]:
    with serving(registry, tmp_path) as served:
        yield served
    assert served.faults == []


def got(api: Served, url: str) -> Any:
    status, found = api.ask("GET", url)
    assert status == 200, found
    return found


def everything(api: Served, url: str, what: str, limit: int) -> list[Any]:
    """All of a list, in pages of so many."""
    found: list[Any] = []
    page = got(api, f"{url}limit={limit}")
    while True:
        assert len(page[what]) <= limit
        found += page[what]
        if page["next"] is None:
            return found
        page = got(api, f"{url}limit={limit}&after={page['next']}")


def test_services(api: Served) -> None:
    assert got(api, "/v1/services/web") == {
        "name": "web",
        "endpoints": ["203.0.113.10:443/tcp"],
        "inspect": ["http"],
        "default": [],
        "choose": None,
        "unmatched": "reset",
        "unextended": "inspect",
        "on_silence": ["10.64.0.3:25"],
        "extension_pool": None,
        "sessions": "http.cookie.id",
        "static_routes": 2,
        "dynamic_routes": 0,
    }
    ports = got(api, "/v1/services/ports")
    assert (ports["extension_pool"], ports["sessions"], ports["static_routes"]) == ("tenants", None, 0)
    for limit in (1, 3, 1000):
        listed = everything(api, "/v1/services?", "services", limit)
        assert [service["name"] for service in listed] == ["names", "ports", "quic", "web"]
    assert listed[1] == ports
    assert api.ask("GET", "/v1/services/none")[0] == 404


def test_endpoints(api: Served) -> None:
    for limit in (1, 2, 1000):
        listed = everything(api, "/v1/endpoints?", "endpoints", limit)
        assert [(each["endpoint"], each["service"], each["decides"]) for each in listed] == [
            ("203.0.113.9:1000-2000/tcp", "ports", "syn"),
            ("203.0.113.10:53/tcp", "names", "first payload"),
            ("203.0.113.10:53/udp", "names", "every datagram"),
            ("203.0.113.10:443/tcp", "web", "first payload"),
            ("[2001:db8::10]:443/udp", "quic", "first datagrams"),
        ]
    assert (listed[0]["address"], listed[0]["first_port"], listed[0]["last_port"]) == ("203.0.113.9", 1000, 2000)
    assert listed[4]["protocol"] == "udp"
    assert [each["is_here"] for each in listed] == [False, True, True, True, True]
    assert api.ask("GET", "/v1/endpoints?after=x")[1]["field"] == "after"


def test_pools_and_aliases(api: Served) -> None:
    for name in ("a", "b"):
        assert api.ask("PUT", f"/v1/leases/{name}", {"pool": "tenants"})[0] == 201
    assert api.ask("DELETE", "/v1/leases/a")[0] == 200
    tenants, vast = got(api, "/v1/pools")["pools"]
    assert tenants == {
        "name": "tenants",
        "prefixes": ["10.64.0.0/29", "fd00:64::/126"],
        "mode": "addresses",
        "ipv4": 8,
        "ipv6": 4,
        "leased": 1,
        "quarantined": 1,
    }
    assert (vast["ipv4"], vast["ipv6"]) == (0, (1 << 63) - 1)
    for limit in (1, 3, 1000):
        listed = everything(api, "/v1/aliases?pool=tenants&", "aliases", limit)
        assert [(alias["index"], alias["state"], alias["lease"]) for alias in listed] == [
            (0, "quarantined", "a"), (1, "named", None), (2, "named", None), (3, "named", None), (4, "leased", "b"),
            (5, "free", None), (6, "free", None), (7, "free", None),
        ]  # fmt: skip
    assert listed[0]["addresses"] == ["10.64.0.0", "fd00:64::"]
    assert listed[4]["addresses"] == ["10.64.0.4"]
    for state, indices in (("leased", [4]), ("quarantined", [0])):
        listed = everything(api, f"/v1/aliases?pool=tenants&state={state}&", "aliases", 1)
        assert [alias["index"] for alias in listed] == indices
    assert len(got(api, "/v1/aliases?pool=vast&limit=7")["aliases"]) == 7
    (far,) = got(api, f"/v1/aliases?pool=vast&after={(1 << 63) - 1}&limit=1")["aliases"]
    assert far["addresses"] == ["fd01::8000:0:0:0"]
    assert api.ask("GET", "/v1/aliases?pool=none")[0] == 404
    assert api.ask("GET", "/v1/aliases")[1]["field"] == "pool"


def test_targets(api: Served) -> None:
    assert api.ask("PUT", "/v1/leases/a", {"pool": "tenants"})[0] == 201
    whole = everything(api, "/v1/targets?", "targets", 1000)
    # Two blocks of extension_pool, and the targets that are named.
    assert len(whole) == 8 + 4 + 5
    assert len({target["id"] for target in whole}) == len(whole)
    assert [target["id"] for target in whole] == sorted(target["id"] for target in whole)
    by_name = {target["target"]: target for target in whole}
    assert by_name["192.0.2.7:same"]["pool"] is None
    assert by_name["[fd00:64::1]:443"]["pool"] == "tenants"
    assert {name for name, target in by_name.items() if target["lease"] == "a"} == {
        "10.64.0.0:8080",
        "[fd00:64::]:8080",
    }
    assert [(target["drained"], target["dead"]) for target in whole[:3]] == [(True, []), (False, ["tcp"]), (False, [])]
    for limit in (1, 5):
        assert everything(api, "/v1/targets?", "targets", limit) == whole
    assert got(api, f"/v1/targets?after={(1 << 32) - 1}") == {"targets": [], "next": None}


def test_routes_of_all_services(api: Served) -> None:
    assert api.ask("PUT", "/v1/services/names/routes", {"when": {"dns.qname": "x"}, "target": "10.64.0.2:53"})[0] == 201
    assert api.ask("PUT", "/v1/services/web/routes", {"when": {"http.host": "z"}, "target": "10.64.0.2:80"})[0] == 201
    for limit in (1, 2, 3, 1000):
        listed = everything(api, "/v1/routes?", "routes", limit)
        assert [(route["service"], *route["when"].values()) for route in listed] == [
            ("names", "x"), ("quic", "a.example"), ("web", "a.example"), ("web", "b.example"), ("web", "z"),
        ]  # fmt: skip
    assert api.ask("GET", "/v1/routes?after=web:x")[1]["field"] == "after"
    # A service that is gone by the next page.
    assert [route["service"] for route in got(api, "/v1/routes?after=quia:s7")["routes"]] == [
        "quic",
        "web",
        "web",
        "web",
    ]


def test_status(api: Served) -> None:
    assert api.ask("PUT", "/v1/leases/a", {"pool": "tenants"})[0] == 201
    found = got(api, "/v1/status")
    assert found["file"] == "steerd.toml"
    assert found["holds"] == {
        "services": 4,
        "endpoints": 5,
        "pools": 2,
        "aliases": (1 << 63) - 1,
        "static_routes": 3,
        "dynamic_routes": 0,
        "leases": 1,
        "quarantined": 0,
        "targets": 5,
        "unheard_targets": 0,
    }
    assert found["machine"]["conntrack"] == {"entries": 7, "limit": 262144}
    assert found["machine"]["workers"][0]["is_bound"] is False


def test_status_counts_targets_on_which_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that a connection wakes, are in no pool, or keep the client's port."""
    text = TEXT.replace(
        'default = "10.64.0.2:53"',
        'default = { address = "10.64.0.2:53", wake = ["/bin/true"], user = "nobody" }',
    )

    class Deaf(Bare):
        def listening(self, targets: Sequence[Target]) -> list[list[int]]:
            return [[] for _ in targets]

    registry = Registry(str(tmp_path))
    registry.publish(config.parse(text, "steerd.toml"))
    with serving(registry, tmp_path, machine=Deaf()) as served:
        holds = got(served, "/v1/status")["holds"]
        assert (holds["targets"], holds["unheard_targets"]) == (5, 3)
        monkeypatch.setattr(status, "MAX_LOOKED_AT", 4)
        assert got(served, "/v1/status")["holds"]["unheard_targets"] is None
    registry.close()


def test_explain(api: Served) -> None:
    to = {"to": "203.0.113.10:443", "client": "198.51.100.7:5000"}
    status, answer = api.ask("POST", "/v1/explain", to | {"keys": {"http.host": "A.example"}})
    assert (status, answer["note"]) == (200, "By what is in force now.")
    (told,) = answer["explanations"]
    assert (told["outcome"], told["reason"], told["target"]) == ("steer", "route", "10.64.0.1:80")
    assert (told["client"], told["endpoint"]) == ("198.51.100.7:5000", "203.0.113.10:443/tcp")
    assert told["matched"] == ["http.host=a.example (services.web.routes[0])"]
    assert told["steps"][0].keys() == {"about", "text"}
    # What was put a moment ago counts.
    body = {"when": {"http.host": "new.example"}, "target": "10.64.0.4:80"}
    assert api.ask("PUT", "/v1/services/web/routes", body)[0] == 201
    (told,) = api.ask("POST", "/v1/explain", to | {"keys": {"http.host": "new.example"}})[1]["explanations"]
    assert told["target"] == "10.64.0.4:80"
    payload = b"GET / HTTP/1.1\r\nHost: b.example\r\n\r\n".hex()
    (told,) = api.ask("POST", "/v1/explain", to | {"hex": [payload]})[1]["explanations"]
    assert (told["target"], told["parsers"][0]["parser"]) == ("192.0.2.7:443", "http")
    (told,) = api.ask("POST", "/v1/explain", {"to": "203.0.113.9:1500", "extension": 3})[1]["explanations"]
    assert (told["reason"], told["target"]) == ("arithmetic", "10.64.0.2:8080")


@pytest.mark.parametrize(
    ("question", "field", "said"),
    [
        ({}, "to", "either it or hex says"),
        ({"to": "x"}, "to", "to must be ADDRESS:PORT"),
        ({"to": "fe80::1%" + "z" * 500 + ":1"}, "to", "to must be ADDRESS:PORT"),
        ({"to": "203.0.113.10:" + "9" * 5000}, "to", "to must be ADDRESS:PORT"),
        ({"to": "203.0.113.10:443", "client": "[::1]:1"}, "client", "client and to are of two address families"),
        ({"to": "203.0.113.10:443/sctp"}, "to", "neither tcp nor udp"),
        ({"to": "203.0.113.10:443", "keys": {"portext.dst": "x"}}, "keys", "from 0 to 65535"),
        ({"to": "203.0.113.10:443", "keys": {"proxy.source": "x"}}, "keys", "proxy.source=x: "),
        ({"to": "203.0.113.10:443", "extension": 65536}, "extension", "<= 65535"),
        ({"hex": ["zz"]}, "hex", "two hexadecimal digits a byte"),
        ({"hex": ["00"]}, "hex", "no IP packet"),
        ({"hex": ["00"] * 257}, "hex", "length <= 256"),
        ({"sni": "a"}, "to", "go with to"),
    ],
)
def test_a_question_that_makes_no_sense(api: Served, question: object, field: str, said: str) -> None:
    status, problem = api.ask("POST", "/v1/explain", question)
    assert (status, problem["code"], problem["field"]) == (400, "invalid", field)
    assert said in problem["message"]
