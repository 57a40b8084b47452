"""A QUIC connection stays at its daemon when the client moves: its address or port changes, whether it knows or not.

Ordinary servers are known by the connection ids of their long headers, which the kernel learns: enough for a client
that knows nothing of it (NAT rebinding). Servers that put a server id into their connection ids (QUIC-LB) are known by
that, whatever happened in between.

Topology: tests/netns/gateway.py; the servers are aioquic's (quic_server.py), the clients aioquic and ngtcp2.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from steerd.model import Reason
from tests.netns.conftest import hosts
from tests.netns.gateway import Gateway, gateway
from tests.netns.programs import POOL, alias, certificate, target
from tests.netns.quic_client import CLIENT, ENDPOINT, Client, connect
from tests.netns.quic_programs import Counts, await_ready, endpoints, quic_server

NAMES = {"a.example": 1, "b.example": 2}
OTHER = {4: "198.51.100.2", 6: "2001:db8:1::2"}
KEY = "8f95f09245765f80256934e50c66207f"
LEARNT, FIXED, PLAIN, SECRET = 443, 444, 445, 446
SERVER_IDS = {PLAIN: ("0", {"a.example": "aaaa01", "b.example": "bbbb02"}, ""),
              SECRET: ("5", {"a.example": "cccccc0000000001", "b.example": "dddddd0000000002"}, KEY)}  # fmt: skip
SERVER_PORT = {LEARNT: 8443, FIXED: 8443, PLAIN: 8445, SECRET: 8446}


def service(port: int, quic: str, *more_routes: str) -> str:
    routes = [f'{{ when.quic.sni = "{name}", target = {target(n, SERVER_PORT[port])} }}' for name, n in NAMES.items()]
    # ngtcp2's client says `localhost`, whatever it is told.
    routes.append(f'{{ when.quic.sni = "localhost", target = {target(2, SERVER_PORT[port])} }}')
    return f"""
[services.on{port}]
endpoints = {endpoints(port, "udp")}
inspect = ["quic"]
default = {target(1, SERVER_PORT[port])}
routes = [{", ".join([*routes, *more_routes])}]
[services.on{port}.quic]
{quic}
"""


def with_server_ids(port: int) -> str:
    number, ids, key = SERVER_IDS[port]
    length = len(ids["a.example"]) // 2
    routes = [
        f'{{ when.quic.server-id = "{ids[name]}", target = {target(n, SERVER_PORT[port])} }}'
        for name, n in NAMES.items()
    ]
    secret = f', key = "{key}"' if key else ""
    return service(
        port,
        "rebinding = false\n"
        f"connection_ids = [{{ config = {number}, server_id_length = {length}, nonce_length = 4{secret} }}]",
        *routes,
    )


CONFIG = (
    POOL + service(LEARNT, "") + service(FIXED, "rebinding = false") + with_server_ids(PLAIN) + with_server_ids(SECRET)
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Gateway]:
    """One gateway for all. The client has a second address of each family."""
    with hosts() as new_host, gateway(new_host) as made:
        made.client.sh(f"ip -6 addr add {OTHER[6]}/64 dev eth0 nodad")
        made.allow_unasked = True  # While the table is gone, answers come from aliases.
        certificate(made, *NAMES)
        made.configure(CONFIG)
        made.start()
        servers = [quic_server(made, name, n, SERVER_PORT[LEARNT]) for name, n in NAMES.items()]
        for port, (number, ids, key) in SERVER_IDS.items():
            for name, n in NAMES.items():
                how = ["--server-id", number, ids[name], *([key] if key else [])]
                servers.append(quic_server(made, name, n, SERVER_PORT[port], *how))
        for server in servers:
            await_ready(server)
        yield made


async def is_at(client: Client, version: int, name: str, port: int, seconds: float = 20) -> None:
    """The server of this name answers, and sees the client where it is now."""
    said = (await client.get("/", seconds)).decode()
    assert said == f"{name} {alias(version, NAMES[name])} {SERVER_PORT[port]} {client.address}"


async def is_nowhere(client: Client) -> None:
    with pytest.raises(TimeoutError):
        await client.get("/", 1)


def on_each(lab: Gateway, version: int, port: int, then: Callable[[Client, str], Awaitable[None]]) -> None:
    """Connect to both servers, one after the other, and do something with each connection."""

    async def run() -> None:
        for name in NAMES:
            async with connect(lab, version, name, port) as client:
                await is_at(client, version, name, port)
                await then(client, name)

    asyncio.run(run())


# ---- learnt connection ids ----


@pytest.mark.parametrize("version", [4, 6])
def test_a_client_behind_another_port_or_address_is_known_again(lab: Gateway, version: int) -> None:
    """The kernel knows it by itself: no worker sees it."""

    async def move(client: Client, name: str) -> None:
        counts = Counts(lab)
        for address in (None, OTHER[version], None):
            await client.move(version, address)
            await is_at(client, version, name, LEARNT)
        risen = counts.look()
        assert risen["rebound"] >= 3 and "diverted" not in risen

    on_each(lab, version, LEARNT, move)


@pytest.mark.parametrize("version", [4, 6])
def test_a_transfer_goes_on_while_the_client_moves(lab: Gateway, version: int) -> None:
    body = bytes(range(256)) * 12000

    async def move(client: Client, _name: str) -> None:
        first = asyncio.create_task(client.post("/digest", body, 60))
        for _ in range(3):
            await asyncio.sleep(0.1)
            await client.move(version)
        again = await client.post("/digest", body, 60)
        assert await first == again

    on_each(lab, version, LEARNT, move)


@pytest.mark.parametrize("version", [4, 6])
def test_what_was_learnt_outlives_conntrack_and_the_agent(lab: Gateway, version: int) -> None:
    async def flush(client: Client, name: str) -> None:
        lab.host.sh("conntrack -F 2>&1")
        await is_at(client, version, name, LEARNT)
        if name == "b.example":
            lab.kill()
            await client.move(version)
            await is_at(client, version, name, LEARNT)
            lab.start()
            await client.move(version, OTHER[version])
            await is_at(client, version, name, LEARNT)

    on_each(lab, version, LEARNT, flush)


@pytest.mark.parametrize("version", [4, 6])
def test_an_id_that_was_not_learnt_leads_nowhere(lab: Gateway, version: int) -> None:
    """A client that moves on purpose takes another connection id, which only its server knows; not even the default
    gets it, and the flow from the old port is as it was."""

    async def move(client: Client, _name: str) -> None:
        counts = Counts(lab)
        await client.move(version, new_id=True)
        await is_nowhere(client)
        assert counts.look()[Reason.UNKNOWN_CONNECTION] >= 1

    on_each(lab, version, LEARNT, move)


@pytest.mark.parametrize("version", [4, 6])
def test_without_rebinding_nothing_is_learnt(lab: Gateway, version: int) -> None:
    async def move(client: Client, _name: str) -> None:
        await client.move(version)
        await is_nowhere(client)

    counts = Counts(lab)
    on_each(lab, version, FIXED, move)
    risen = counts.look()
    assert risen[Reason.UNKNOWN_CONNECTION] >= 2
    assert "learnt" not in risen and "rebound" not in risen


# ---- server ids in connection ids ----


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("port", [PLAIN, SECRET], ids=["plain", "encrypted"])
def test_a_server_id_survives_everything(lab: Gateway, version: int, port: int) -> None:
    """Migration on purpose, to another port and to another address; a conntrack that has forgotten all; an agent that
    was killed, and its table removed."""

    async def move(client: Client, name: str) -> None:
        counts = Counts(lab)
        await client.move(version, new_id=True)
        await is_at(client, version, name, port)
        await client.move(version, OTHER[version], new_id=True)
        await is_at(client, version, name, port)
        lab.host.sh("conntrack -F 2>&1")
        await is_at(client, version, name, port)
        risen = counts.look()
        assert risen[Reason.ROUTE] >= 2 and Reason.UNKNOWN_CONNECTION not in risen
        if name == "b.example":
            lab.kill()
            lab.host.sh("nft delete table inet steerd")
            lab.start()
            await is_at(client, version, name, port)
            await client.move(version, new_id=True)
            await is_at(client, version, name, port)

    on_each(lab, version, port, move)


# ---- another client ----


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("port", "how"), [(LEARNT, "--nat-rebinding"), (PLAIN, "-q"), (SECRET, "-q")])
def test_ngtcp2_moves(lab: Gateway, version: int, port: int, how: str) -> None:
    """It changes its port 100 ms after its handshake, and asks its question 500 ms after it."""
    name, number = "b.example", 2
    files = lab.directory / f"downloads-{version}-{port}"
    files.mkdir()
    counts = Counts(lab)
    lab.client.sh(
        f"timeout 30 gtlsclient -q {how} --exit-on-all-streams-close --change-local-addr=100ms --delay-stream=500ms"
        f" --download={files} {ENDPOINT[version]} {port} https://{name}/ 2>&1"
    )
    said = (files / "index.html").read_text().split()
    assert said[:3] == [name, alias(version, number), str(SERVER_PORT[port])]
    assert said[3] in (CLIENT[version], OTHER[version])
    risen = counts.look()
    # Where it began, and where it went on.
    assert risen[Reason.ROUTE] + risen.get("rebound", 0) >= 2
    assert ("rebound" in risen) == (port == LEARNT)
