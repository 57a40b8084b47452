"""When the map of learnt connection ids is full, on a gateway of its own with a small one. All else about QUIC clients
that move: test_quic_migration.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from tests.netns.gateway import Gateway, gateway
from tests.netns.lab import Host
from tests.netns.programs import certificate
from tests.netns.quic_client import connect
from tests.netns.quic_programs import await_ready, quic_server
from tests.netns.test_quic_migration import CONFIG, LEARNT, NAMES, SERVER_PORT, is_at, is_nowhere


@pytest.mark.parametrize("version", [4, 6])
def test_when_no_more_can_be_learnt_connections_work_and_do_not_move(
    new_host: Callable[[str], Host], change_rules: Callable[[str, str], None], version: int
) -> None:
    """The kernel's `update` fails, which ends its rule and nothing else. What is in the map stays until its hour is
    over, and no id is pushed out by another. Here the map has four places."""
    change_rules("meta mark\n\t\tsize 262144", "meta mark\n\t\tsize 4")

    async def five(lab: Gateway) -> None:
        async with AsyncExitStack() as stack:
            clients = []
            for _ in range(5):
                clients.append(await stack.enter_async_context(connect(lab, version, "b.example", LEARNT)))
                await is_at(clients[-1], version, "b.example", LEARNT)
            assert "size 4" in lab.host.sh("nft list map inet steerd learned")
            *learnt, last = clients
            await last.move(version)
            await is_nowhere(last)
            for client in learnt:
                await client.move(version)
                await is_at(client, version, "b.example", LEARNT)

    with gateway(new_host) as lab:
        certificate(lab, *NAMES)
        lab.configure(CONFIG)
        lab.start()
        await_ready(quic_server(lab, "b.example", 2, SERVER_PORT[LEARNT]))
        asyncio.run(five(lab))
