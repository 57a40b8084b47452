"""Which of conntrack's entries are flows of ours, what is said of them, and `steerctl flows`."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from steerd import config
from steerd.cli import ctl
from steerd.control.flows import Chooser, wanted
from steerd.control.registry import Registry
from steerd.errors import NoAnswerError, RequestError, SteerdError
from steerd.model import TCP, UDP, Flow
from tests.unit.test_api import Bare, Served, serving

TEXT = """
[gateway]
run_dir = "{directory}"
state_dir = "{directory}"
[pools.tenants]
prefixes = ["10.64.0.0/28", "fd00:64::/124"]
[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp", "203.0.113.10:8000-8010/tcp"]
inspect = ["http"]
routes = [
    {{ when = {{ http.host = "a.example" }}, target = ["10.64.0.1:80", "[fd00:64::1]:80"] }},
    {{ when = {{ http.host = "b.example" }}, target = "10.64.0.2:same", source = "198.51.100.0/24" }},
    {{ when = {{ http.host = "c.example" }}, target = "10.64.0.3:80" }},
    {{ when = {{ http.host = "d.example" }}, target = "10.64.0.3:80" }},
    {{ when = {{ http.host = "e.example" }}, target = "10.64.0.9:80" }},
    {{ when = {{ http.host = "out.example" }}, target = {{ address = "192.0.2.7:80", external = true }} }},
]
default = "10.64.0.9:80"
[services.names]
endpoints = ["203.0.113.10:53/udp"]
inspect = ["dns"]
default = "10.64.0.4:53"
"""
A, B, C6 = "198.51.100.7", "203.0.113.77", "2001:db8:1::7"


class Known(NamedTuple):
    """An entry (control.flows.Entry)."""

    protocol: int
    flow: Flow
    delivered: Flow
    tcp_state: str | None = "established"
    seconds_left: int = 100
    started: float | None = None

    @property
    def is_over(self) -> bool:
        return self.tcp_state == "time_wait"


def known(client: str, port: int, endpoint: str, to: str, protocol: int = TCP, **more: object) -> Known:
    def ends(text: str) -> tuple[bytes, int]:
        host, _, number = text.rpartition(":")
        return ipaddress.ip_address(host.strip("[]")).packed, int(number)

    source = ipaddress.ip_address(client).packed
    return Known(protocol, Flow(source, port, *ends(endpoint)), Flow(source, port, *ends(to)), **more)  # type: ignore[arg-type]


ENTRIES = {
    "a": known(A, 1, "203.0.113.10:80", "10.64.0.1:80"),
    "a6": known(C6, 2, "[2001:db8::10]:80", "[fd00:64::1]:80"),
    "b": known(B, 3, "203.0.113.10:80", "10.64.0.2:80"),
    "c or d": known(A, 4, "203.0.113.10:8010", "10.64.0.3:80"),
    "e or default": known(A, 5, "203.0.113.10:80", "10.64.0.9:80"),
    "out": known(A, 6, "203.0.113.10:80", "192.0.2.7:80"),
    "name": known(A, 7, "203.0.113.10:53", "10.64.0.4:53", UDP, tcp_state=None),
    "over": known(A, 8, "203.0.113.10:80", "10.64.0.1:80", tcp_state="time_wait"),
    "leased": known(A, 9, "203.0.113.10:80", "10.64.0.0:8080"),
    # None of ours:
    "another port": known(A, 10, "203.0.113.10:8011", "10.64.0.1:80"),
    "another protocol": known(A, 11, "203.0.113.10:53", "10.64.0.4:53"),
    "another address": known(A, 12, "203.0.113.11:80", "10.64.0.1:80"),
    "somebody else's translation": known(A, 13, "203.0.113.10:80", "192.0.2.8:80"),
}
OURS = ["a", "a6", "b", "c or d", "e or default", "out", "name", "leased"]


class Machine(Bare):
    """A machine whose conntrack holds ENTRIES."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[str] = []
        self.asked: list[bytes] = []

    def entries(self, answered_by: bytes) -> Generator[Known, None, None]:
        self.asked.append(answered_by)
        yield from (each for each in ENTRIES.values() if answered_by in (b"", each.delivered.dst))

    def end_flows(self, answered_by: bytes, is_wanted: Callable[[Known], bool]) -> int:
        found = [each for each in self.entries(answered_by) if is_wanted(each)]
        self.ended += named(found)
        return len(found)


def named(found: list[Known]) -> list[str]:
    return [name for name, each in ENTRIES.items() if each in found]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    (tmp_path / "steerd.toml").write_text(TEXT.format(directory=tmp_path))
    made = Registry(str(tmp_path))
    made.publish(config.load(tmp_path / "steerd.toml"))
    when: dict[str, str | int] = {"http.host": "alice.example"}
    made.leases.add("alice", "tenants", service="web", when=when, source=None, port=8080, ttl=None, now=0)
    yield made
    made.close()


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def api(tmp_path: Path, registry: Registry, machine: Machine) -> Iterator[Served]:
    with serving(registry, tmp_path, machine=machine) as served:
        yield served
    assert served.faults == []


@pytest.mark.parametrize(
    ("client", "service", "target", "lease", "found"),
    [
        (None, None, None, None, OURS),
        (A, None, None, None, ["a", "c or d", "e or default", "out", "name", "leased"]),
        ("198.51.100.0/24", "names", None, None, ["name"]),
        ("2001:db8:1::/64", None, None, None, ["a6"]),
        ("::/0", None, None, None, ["a6"]),
        (None, "names", None, None, ["name"]),
        (None, None, "10.64.0.1", None, ["a"]),
        (None, None, "10.64.0.1:80", None, ["a"]),
        (None, None, "10.64.0.1:81", None, []),
        (None, None, "fd00:64::1", None, ["a6"]),
        (None, None, "[fd00:64::1]", None, ["a6"]),
        (None, None, "[fd00:64::1]:80", None, ["a6"]),
        (None, None, None, "alice", ["leased"]),
        (B, None, None, "alice", []),
    ],
)
def test_what_is_wanted(
    registry: Registry, client: str | None, service: str | None, target: str | None, lease: str | None, found: list[str]
) -> None:
    chooser = Chooser(registry, wanted(client, service, target, lease))
    assert named([each for each in ENTRIES.values() if chooser.service_of(each) is not None]) == found
    among = [each for each in ENTRIES.values() if chooser.only_target in (b"", each.delivered.dst)]
    assert named([each for each in among if chooser.service_of(each) is not None]) == found


def test_those_that_are_over_if_they_are_wanted(registry: Registry) -> None:
    chooser = Chooser(registry, wanted(None, None, "10.64.0.1", None, over=True))
    assert named([each for each in ENTRIES.values() if chooser.service_of(each) is not None]) == ["a", "over"]


@pytest.mark.parametrize(
    ("client", "service", "target", "lease", "field"),
    [
        ("198.51.100.1/24", None, None, None, "client"),
        ("x", None, None, None, "client"),
        (None, "none", None, None, "service"),
        (None, None, "10.64.0.1:0", None, "target"),
        (None, None, "10.64.0.1:", None, "target"),
        (None, None, "10.64.0.1:same", None, "target"),
        (None, None, "10.64.0.1:65536", None, "target"),
        (None, None, "[10.64.0.1", None, "target"),
        (None, None, "", None, "target"),
        (None, None, None, "none", None),
    ],
)
def test_what_is_no_filter_is_refused_and_not_left_out(
    registry: Registry, client: str | None, service: str | None, target: str | None, lease: str | None, field: str
) -> None:
    with pytest.raises(RequestError) as refused:
        Chooser(registry, wanted(client, service, target, lease))
    if field is not None:
        assert refused.value.field == field


def test_an_address_is_a_target_if_an_id_was_given_for_it(registry: Registry) -> None:
    reader = registry.reader()
    for text, expected in (("192.0.2.7", True), ("192.0.2.6", False), ("192.0.2.8", False), ("fd00:64::1", True)):
        assert reader.is_target(ipaddress.ip_address(text).packed) is expected
    assert not reader.is_target(ipaddress.ip_address("fd00:64::1").packed[:4])


# ---- steerctl ----


def steerctl(api: Served, *arguments: str, answer: str = "") -> tuple[int, str]:
    """(exit status, what it said); what it raises is raised."""
    config_file = str(api.run_dir / "steerd.toml")
    result = CliRunner().invoke(ctl.app, ["flows", *arguments, "--config", config_file], answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_flows_as_lines(api: Served, machine: Machine) -> None:
    status, out = steerctl(api, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [int(line["client"].rpartition(":")[2]) for line in lines] == [1, 2, 3, 4, 5, 6, 7, 9]
    by_port = {line["client"].rpartition(":")[2]: line for line in lines}
    assert by_port["1"] == {
        "protocol": "tcp",
        "client": f"{A}:1",
        "endpoint": "203.0.113.10:80",
        "target": "10.64.0.1:80",
        "service": "web",
        "lease": None,
        "when": {"http.host": "a.example"},
        "source": None,
        "state": "established",
        "seconds_left": 100,
        "age": None,
    }
    assert by_port["2"]["client"] == f"[{C6}]:2"
    assert by_port["2"]["when"] == {"http.host": "a.example"}
    assert (by_port["3"]["when"], by_port["3"]["source"]) == ({"http.host": "b.example"}, "198.51.100.0/24")
    # More than one may have led there.
    assert by_port["4"]["when"] is by_port["5"]["when"] is by_port["7"]["when"] is None
    assert by_port["6"]["when"] == {"http.host": "out.example"}
    assert (by_port["9"]["lease"], by_port["9"]["when"]) == ("alice", {"http.host": "alice.example"})
    assert machine.asked == [b""]
    for limit, shown in (("3", 3), (str(2**63 - 1), len(lines))):
        assert len(steerctl(api, "--json", "--limit", limit)[1].splitlines()) == shown
    with pytest.raises(SteerdError, match="9223372036854775807"):
        steerctl(api, "--json", "--limit", str(2**63))
    steerctl(api, "--json", "--target", "10.64.0.1:80")
    assert machine.asked[-1] == ipaddress.ip_address("10.64.0.1").packed


def test_flows_as_a_table(api: Served) -> None:
    _, out = steerctl(api, "--service", "web", "--client", B)
    assert "203.0.113.77:3" in out
    assert "http.host=b.example" in out
    assert f"{A}:1" not in out
    status, out = steerctl(api, "--limit", "2")
    assert (status, out.count(":80 ")) == (0, 4)
    assert out.endswith("There are more; see --limit.\n")


def test_kill_asks_and_says_how_many(api: Served, machine: Machine) -> None:
    status, out = steerctl(api, "kill", "--target", "10.64.0.1", answer="n\n")
    assert status == 1
    assert out.startswith("1 flows to 1 targets.\nEnd them? [y/N]: ")
    assert machine.ended == []
    status, out = steerctl(api, "kill", "--target", "10.64.0.1", answer="y\n")
    assert (status, out.splitlines()[-1]) == (0, "1 flows ended")
    assert machine.ended == ["a"]
    assert steerctl(api, "kill", "--yes", "--client", A, "--service", "web", "--json") == (0, '{"flows": 5}\n')
    assert sorted(machine.ended[1:]) == sorted(["a", "c or d", "e or default", "out", "leased"])
    assert steerctl(api, "kill", "--client", "192.0.2.1")[1].endswith("0 flows ended\n")


def test_kill_without_a_filter_is_refused(api: Served, machine: Machine) -> None:
    for arguments in (("kill",), ("kill", "--yes"), ("--client", A, "kill", "--service", "web", "--yes")):
        with pytest.raises(SteerdError):
            steerctl(api, *arguments)
    assert machine.ended == []
    assert api.ask("DELETE", "/v1/flows")[0] == 400
    with pytest.raises(SteerdError, match=r"^none is not a service of "):
        steerctl(api, "--service", "none")


def test_flows_without_a_daemon(tmp_path: Path) -> None:
    (tmp_path / "steerd.toml").write_text(TEXT.format(directory=tmp_path))
    served = Served(*[None] * len(Served._fields))._replace(run_dir=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(NoAnswerError):
        steerctl(served)
