"""Leases: who gets which alias, and that a lease with its route is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import ipaddress
import multiprocessing
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerd import config
from steerd.control.leases import LeaseView
from steerd.control.registry import Registry
from steerd.core.leases import Seats
from steerd.errors import KernelError, RegistryError, RequestError
from steerd.model import IPAddress
from tests.unit.test_routes import Worker

NOW = 1_800_000_000.0
MINUTES = 60.0
TEXT = """
[pools.tenants]
prefixes = ["10.64.0.0/29", "fd00:64::/127"]
mode = "anyip"

[pools.large]
prefixes = ["10.65.0.0/16"]
mode = "anyip"
quarantine = 30

[services.web]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["http"]

[[services.web.routes]]
when = { "http.host" = "static.example" }
target = "10.64.0.2:8080"
"""


def never(_index: int) -> bool:
    return False


# ---- core: which index ----


def test_the_lowest_free_index_comes_first() -> None:
    seats = Seats(4)
    for expected in (0, 1, 2, 3):
        assert seats.choose(f"n{expected}", NOW, never) == expected
        assert seats.choose(f"n{expected}", NOW, never) == expected  # to choose is not to take
        seats.take(expected)
    assert seats.choose("n4", NOW, never) is None
    assert (seats.leased, seats.quarantined(NOW)) == (4, 0)


def test_a_name_gets_its_index_back_even_in_quarantine_and_others_wait() -> None:
    seats = Seats(3)
    for index in range(3):
        seats.take(index)
    seats.release(1, "b", NOW + 600)
    assert seats.choose("x", NOW, never) is None
    assert seats.choose("x", NOW + 599, never) is None
    assert seats.choose("b", NOW, never) == 1
    assert seats.choose("x", NOW + 600, never) == 1
    assert seats.choose("b", NOW + 6000, never) == 1  # as long as nobody else took it
    seats.take(1)
    seats.release(1, "x", NOW + 1200)
    assert seats.last_holder(1) == "x"
    assert seats.choose("b", NOW + 1199, never) is None


def test_what_is_used_otherwise_is_passed_over_until_it_is_free() -> None:
    seats = Seats(3)
    used = {0, 1}
    assert seats.choose("a", NOW, used.__contains__) == 2
    seats.take(2)
    assert seats.choose("b", NOW, used.__contains__) is None
    used.remove(1)
    assert seats.choose("b", NOW, used.__contains__) == 1
    seats.take(1)
    seats.release(1, "b", NOW)
    used = {0, 1}
    assert seats.choose("b", NOW, used.__contains__) is None


steps = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "release", "wait", "use"]), st.integers(0, 7), st.sampled_from([0, 10, 100])
    ),
    max_size=60,
)


@given(steps)
def test_against_a_naive_model(steps: list[tuple[str, int, int]]) -> None:
    seats = Seats(5)
    now = 0.0
    holders: dict[int, int] = {}
    last: dict[int, int] = {}  # index -> name
    former: dict[int, int] = {}  # name -> index
    until: dict[int, float] = {}
    used: set[int] = set()
    for verb, number, seconds in steps:
        if verb == "wait":
            now += seconds
        elif verb == "use":
            used ^= {number}
        elif verb == "release" and number in holders.values():
            index = next(index for index, name in holders.items() if name == number)
            del holders[index]
            last[index], former[number], until[index] = number, index, now + seconds
            seats.release(index, str(number), now + seconds)
        elif verb == "take" and number not in holders.values():
            free = [i for i in range(5) if i not in holders and i not in used and until.get(i, 0) <= now]
            expected = min(free, default=None)
            mine = former.get(number)
            if mine is not None and mine not in holders and last[mine] == number and mine not in used:
                expected = mine
            assert seats.choose(str(number), now, used.__contains__) == expected
            if expected is not None:
                seats.take(expected)
                holders[expected] = number
                until.pop(expected, None)
                if last.pop(expected, None) is not None:
                    former = {name: index for name, index in former.items() if index != expected}
    assert seats.leased == len(holders)


# ---- the table ----


class Kernel:
    """Remembers what was asked of it."""

    def __init__(self) -> None:
        self.ready: list[str] = []
        self.ended: list[str] = []
        self.fails: Exception | None = None
        self.meanwhile: Any = None

    def make_ready(self, addresses: Sequence[IPAddress]) -> None:
        if self.fails is not None:
            raise self.fails
        self.ready += [str(address) for address in addresses]
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()

    def end_flows(self, addresses: Sequence[IPAddress]) -> int:
        self.ended += [str(address) for address in addresses]
        return len(addresses)


class Lab:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kernel = Kernel()
        self.registry = Registry(str(directory), self.kernel)
        self.publish(TEXT)

    def publish(self, text: str) -> None:
        self.registry.publish(config.parse(text, "/etc/steerd.toml"))

    def reopen(self) -> None:
        self.registry.close()
        self.registry = Registry(str(self.directory), self.kernel)
        self.publish(TEXT)

    def add(
        self,
        name: str,
        pool: str = "tenants",
        service: str | None = None,
        when: Mapping[str, object] = {},
        *,
        source: str | None = None,
        ttl: int | None = None,
        now: float = NOW,
    ) -> LeaseView:
        return self.registry.leases.add(
            name, pool, service=service, when=when, source=source, port=8080, ttl=ttl, now=now
        )

    def addresses(self) -> dict[str, list[str]]:
        return {view.name: view.addresses for view in self.registry.leases.page("", 1000)}

    def refused(self, *arguments: Any, **more: Any) -> tuple[str, str | None, str]:
        with pytest.raises(RequestError) as caught:
            self.add(*arguments, **more)
        return caught.value.code, caught.value.field, caught.value.message


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.registry.close()


def host(name: str) -> dict[str, object]:
    return {"http.host": f"{name}.example"}


def test_a_lease_is_an_alias_and_a_route_to_it(lab: Lab) -> None:
    worker = Worker(lab.registry)
    assert worker.ask("a.example") is None
    view = lab.add("a", "tenants", "web", host("a"), ttl=3600)
    assert (view.addresses, view.expires, view.ttl, view.usable) == (
        ["10.64.0.0", "fd00:64::"],
        NOW + 3600,
        3600,
        True,
    )
    assert view.route is not None
    assert (view.route.origin, view.route.targets) == ("lease a", ["10.64.0.0:8080", "[fd00:64::]:8080"])
    assert lab.kernel.ready == lab.kernel.ended == ["10.64.0.0", "fd00:64::"]
    assert worker.ask("a.example") == "10.64.0.0:8080"
    assert worker.ask("a.example", "2001:db8::7", 6) == "[fd00:64::]:8080"
    lab.add("b", "tenants", "web", host("b"))
    lab.add("c", "tenants")
    # 10.64.0.2 is in the configuration, and there are two IPv6 aliases only.
    assert lab.addresses() == {"a": ["10.64.0.0", "fd00:64::"], "b": ["10.64.0.1", "fd00:64::1"], "c": ["10.64.0.3"]}
    lab.reopen()
    worker = Worker(lab.registry)
    assert worker.ask("b.example") == "10.64.0.1:8080"
    assert lab.registry.leases.get("a") == view
    assert lab.addresses()["c"] == ["10.64.0.3"]


def test_a_release_takes_all_of_it_away_and_the_name_gets_it_back(lab: Lab) -> None:
    worker = Worker(lab.registry)
    lab.add("a", "tenants", "web", host("a"))
    lab.kernel.ended.clear()
    released = lab.registry.leases.release("a", NOW)
    assert (released.addresses, released.until, released.flows) == (["10.64.0.0", "fd00:64::"], NOW + 600, 2)
    assert lab.kernel.ended == ["10.64.0.0", "fd00:64::"]
    assert worker.ask("a.example") is None
    assert lab.addresses() == {}
    with pytest.raises(RequestError, match="There is no lease of the name "):
        lab.registry.leases.release("a", NOW)
    for again in (False, True):
        if again:
            lab.reopen()
        assert lab.add("b", now=NOW + 599).addresses == ["10.64.0.1", "fd00:64::1"]
        lab.kernel.ended.clear()
        assert lab.add("a", now=NOW + 599).addresses == ["10.64.0.0", "fd00:64::"]
        assert lab.kernel.ended == []  # its own flows
        lab.registry.leases.release("a", NOW)
        lab.registry.leases.release("b", NOW)
    lab.kernel.ended.clear()
    assert lab.add("c", now=NOW + 601).addresses == ["10.64.0.0", "fd00:64::"]
    assert lab.kernel.ended == ["10.64.0.0", "fd00:64::"]  # whatever was left of a's


def test_a_full_pool_says_so(lab: Lab) -> None:
    for number in range(7):
        lab.add(f"n{number}", "tenants", "web", host(f"n{number}"))
    lab.registry.leases.release("n3", NOW)
    assert lab.refused("x") == (
        "conflict",
        "pool",
        "The pool tenants is full: of 8 aliases 6 are leased, 1 in quarantine, and 1 used by routes of their own or by"
        " the configuration.",
    )
    assert lab.add("x", now=NOW + 600).addresses == ["10.64.0.4"]
    assert lab.refused("y", now=NOW + 600)[:2] == ("conflict", "pool")


def test_what_is_refused(lab: Lab) -> None:
    lab.add("a", "tenants", "web", host("a"))
    assert lab.refused("a", "large") == (
        "conflict",
        "name",
        "a has a lease already: 10.64.0.0 and fd00:64:: of the pool tenants.",
    )
    assert lab.refused("b", "nowhere") == ("not_found", "pool", "nowhere is not a pool of /etc/steerd.toml.")
    for name in ("", "-a", "a b", "a/b", "\xe9", "a" * 129):
        assert lab.refused(name)[:2] == ("invalid", "name")
    assert lab.refused("b", "tenants", "nobody", host("b"))[:2] == ("not_found", "service")
    assert lab.refused("b", "tenants", None, host("b"))[:2] == ("invalid", "service")
    assert lab.refused("b", "tenants", "web", {"tls.sni": "b"})[:2] == ("invalid", "when.tls.sni")
    assert lab.refused("b", "tenants", "web", host("a")) == (
        "conflict",
        "when",
        "The same route is there already: that of the lease a.",
    )
    assert "services.web.routes[0]" in lab.refused("b", "tenants", "web", host("static"))[2]
    with pytest.raises(RequestError, match=r"This is the route of the lease a; release that\."):
        lab.registry.routes.remove("web", host("a"), None)
    with pytest.raises(RequestError, match="that of the lease a"):
        lab.registry.routes.put("web", host("a"), "10.64.0.5:80", None)
    assert lab.addresses() == {"a": ["10.64.0.0", "fd00:64::"]}
    assert lab.add("b").addresses == ["10.64.0.1", "fd00:64::1"]  # refusals take nothing


def test_routes_of_their_own_and_leases_keep_away_from_each_other(lab: Lab) -> None:
    lab.registry.routes.put("web", host("own"), ["10.64.0.0:80", "[fd00:64::1]:80"], None)
    assert lab.add("a").addresses == ["10.64.0.3"]
    with pytest.raises(RequestError, match=r"10\.64\.0\.3 is leased to a; a route of its own would outlive the lease"):
        lab.registry.routes.put("web", host("other"), "10.64.0.3:80", None)
    lab.registry.routes.put("web", host("own"), "10.64.0.4:80", None)
    assert lab.add("b").addresses == ["10.64.0.0", "fd00:64::"]
    lab.registry.routes.remove("web", host("own"), None)
    assert [lab.add(name).addresses[0] for name in "cd"] == ["10.64.0.1", "10.64.0.4"]


def test_an_alias_that_cannot_be_made_ready_is_not_leased(lab: Lab) -> None:
    lab.kernel.fails = KernelError("10.64.0.0 cannot be made an address of this machine")
    with pytest.raises(KernelError):
        lab.add("a", "tenants", "web", host("a"))
    assert lab.addresses() == {}
    assert Worker(lab.registry).ask("a.example") is None


def test_who_was_overtaken_while_an_alias_was_made_ready_chooses_again(lab: Lab) -> None:
    lab.kernel.meanwhile = lambda: lab.add("b", "tenants", "web", host("b"))
    assert lab.add("a").addresses == ["10.64.0.1", "fd00:64::1"]
    assert lab.addresses()["b"] == ["10.64.0.0", "fd00:64::"]
    assert lab.kernel.ready[-2:] == ["10.64.0.1", "fd00:64::1"]


def test_where_the_disk_fails_nothing_is_taken(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RegistryError("the registry cannot be written: no space")

    with monkeypatch.context() as broken:
        broken.setattr(lab.registry._store, "put_plan", full)
        with pytest.raises(RegistryError, match="no space"):
            lab.add("a", "tenants", "web", {"http.path": "/a"})
    assert lab.addresses() == {}
    assert lab.add("b", "tenants", "web", {"http.path": "/a"}).addresses == ["10.64.0.0", "fd00:64::"]
    with monkeypatch.context() as broken:
        broken.setattr(lab.registry._store, "put_plan", full)
        with pytest.raises(RegistryError, match="no space"):
            lab.registry.leases.release("b", NOW)
    assert Worker(lab.registry).decide("GET /a HTTP/1.1\r\nHost: z\r\n\r\n") == "10.64.0.0:8080"
    lab.registry.leases.release("b", NOW)


# ---- time ----


def test_a_lease_ends_with_its_time_unless_it_is_renewed(lab: Lab) -> None:
    leases = lab.registry.leases
    for name, ttl in (("a", 60), ("b", 60), ("c", None), ("d", 600)):
        lab.add(name, "large", "web", host(name), ttl=ttl)
    assert leases.next_end() == NOW + 60
    assert leases.expire(NOW + 59) == []
    assert leases.renew("b", None, NOW + 30).expires == NOW + 90
    assert leases.renew("c", 100, NOW).expires == NOW + 100
    (ended,) = leases.expire(NOW + 60)
    assert (ended.name, ended.until) == ("a", NOW + 90)
    assert lab.kernel.ended[-1:] == ["10.65.0.0"]
    lab.reopen()
    leases = lab.registry.leases
    assert {view.name for view in leases.expire(NOW + 100)} == {"b", "c"}
    assert leases.expire(NOW + 100) == []
    with pytest.raises(RequestError, match="There is no lease of the name "):
        leases.renew("b", None, NOW)
    leases.release("d", NOW)
    assert leases.expire(NOW + 10000) == []
    assert leases.next_end() is None


def test_an_end_that_cannot_be_written_down_is_tried_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.add("a", "large", "web", host("a"), ttl=60)

    def full(*_: object) -> None:
        raise RegistryError("the registry cannot be written: no space")

    with monkeypatch.context() as broken:
        broken.setattr(lab.registry._store, "put_plan", full)
        with pytest.raises(RegistryError, match="no space"):
            lab.registry.leases.expire(NOW + 60)
    assert [view.name for view in lab.registry.leases.expire(NOW + 61)] == ["a"]


def test_a_restart_ends_what_ended_meanwhile_and_the_flows_of_what_is_in_quarantine(lab: Lab) -> None:
    for name, ttl in (("a", 60), ("b", None), ("c", None)):
        lab.add(name, "large", ttl=ttl)
    lab.registry.leases.release("b", NOW + 100)
    lab.reopen()
    lab.kernel.ended.clear()
    assert lab.registry.leases.reconcile(NOW + 101) == 1 + 2
    assert sorted(set(lab.kernel.ended)) == ["10.65.0.0", "10.65.0.1"]
    assert lab.addresses() == {"c": ["10.65.0.2"]}
    lab.kernel.ended.clear()
    assert lab.registry.leases.reconcile(NOW + 200) == 0


# ---- a new configuration ----


def test_a_lease_outlives_a_time_without_its_pool(lab: Lab) -> None:
    lab.add("a", "large", "web", host("a"))
    worker = Worker(lab.registry)
    lab.publish(TEXT.replace("10.65.0.0/16", "10.66.0.0/16"))
    assert worker.ask("a.example") is None
    assert not lab.registry.leases.get("a").usable
    assert lab.add("b", "large").addresses == ["10.66.0.0"]
    lab.publish(TEXT)
    assert worker.ask("a.example") == "10.65.0.0:8080"
    assert lab.registry.leases.get("a").usable
    assert lab.add("c", "large").addresses == ["10.65.0.1"]


def test_pools_that_are_cut_otherwise_lease_nothing_twice(lab: Lab) -> None:
    assert lab.add("a").addresses == ["10.64.0.0", "fd00:64::"]
    assert lab.add("b").addresses == ["10.64.0.1", "fd00:64::1"]
    lab.registry.leases.release("b", NOW)
    lab.publish(TEXT.replace('["10.64.0.0/29", "fd00:64::/127"]', '["10.64.0.4/30", "10.64.0.0/30", "fd00:64::/126"]'))
    # Index 0 is 10.64.0.4 and fd00:64:: now, 1 is 10.64.0.5 and fd00:64::1; those IPv6 addresses are a's and b's.
    assert lab.add("c").addresses == ["10.64.0.6", "fd00:64::2"]
    assert lab.add("d").addresses == ["10.64.0.7", "fd00:64::3"]
    assert lab.add("e").addresses == ["10.64.0.3"]
    assert lab.refused("f")[:2] == ("conflict", "pool")
    assert lab.add("f", now=NOW + 600).addresses == ["10.64.0.5", "fd00:64::1"]


def test_lists_come_in_pages(lab: Lab) -> None:
    for number in range(20):
        lab.add(f"n{number:02}", "large")
    names = [f"n{number:02}" for number in range(20)]
    assert lab.registry.leases.count() == 20
    for limit in (1, 3, 20, 50):
        found: list[str] = []
        while page := lab.registry.leases.page(found[-1] if found else "", limit):
            found += [view.name for view in page]
        assert found == names
    assert lab.registry.leases.page("\ud800\xe9", 5) == []


# ---- killed ----

_fork = multiprocessing.get_context("fork")
KILLS = 200


def _work(progress: Connection, directory: Path, seed: int) -> None:
    """Leases and routes come and go; what is acknowledged is told."""
    rng = random.Random(seed)
    lab = Lab(directory)
    progress.send(("open", "", ""))
    while True:
        name = f"n{rng.randrange(30)}"
        verb = rng.choice(["add", "add", "release", "put", "remove"])
        progress.send(("begin", verb, name))
        with contextlib.suppress(RequestError):
            if verb == "add":
                lab.add(name, "large", "web", {**host(name), "http.path": "/" * (1 + rng.randrange(3))})
            elif verb == "release":
                lab.registry.leases.release(name, NOW)
            elif verb == "put":
                lab.registry.routes.put("web", {"http.host": f"{name}.own"}, f"10.65.200.{name[1:]}:80", None)
            else:
                lab.registry.routes.remove("web", {"http.host": f"{name}.own"}, None)
            progress.send(("done", verb, name))


def test_killed_at_any_moment_nothing_acknowledged_is_lost_and_nothing_half_done_is_seen(tmp_path: Path) -> None:
    rng = random.Random(5)
    leases: set[str] = set()
    routes: set[str] = set()
    for round_ in range(KILLS):
        ours, theirs = _fork.Pipe()
        process = _fork.Process(target=_work, args=(theirs, tmp_path, round_))
        process.start()
        theirs.close()
        assert ours.recv()[0] == "open"
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        pending = ("", "")
        with contextlib.suppress(EOFError):
            while True:
                what, verb, name = ours.recv()
                pending = (verb, name) if what == "begin" else ("", "")
                if what == "done":
                    {"add": leases.add, "release": leases.discard, "put": routes.add, "remove": routes.discard}[verb](
                        name
                    )
        ours.close()
        registry = Registry(str(tmp_path))
        registry.publish(config.parse(TEXT, "/etc/steerd.toml"))
        views = {view.name: view for view in registry.leases.page("", 1000)}
        shown, _ = registry.routes.page("web", "", 1000)
        own = {view.when["http.host"].removesuffix(".own") for view in shown if view.origin == "dynamic"}
        # What was under way is there or not; everything else as it was acknowledged.
        assert set(views) - {pending[1]} == leases - {pending[1]}
        assert own - {pending[1]} == routes - {pending[1]}
        if pending[0] not in ("add", "release"):
            assert set(views) == leases
        leases, routes = set(views), own
        # A lease is whole: its route is there, leads to its alias, and nobody else has that.
        of_leases = {view.origin.removeprefix("lease "): view for view in shown if view.origin.startswith("lease ")}
        assert set(of_leases) == set(views)
        for name, view in views.items():
            assert of_leases[name].targets == [f"{view.addresses[0]}:8080"]
        taken = [view.addresses[0] for view in views.values()]
        assert len(set(taken)) == len(taken)
        assert all(ipaddress.ip_address(address) in ipaddress.ip_network("10.65.0.0/16") for address in taken)
        registry.close()
