"""Fixtures for tests against the real kernel: every host is a namespace of its own and is gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.netns.lab import Host, leaked


@pytest.fixture
def new_host() -> Iterator[Callable[[str], Host]]:
    """Makes namespaces for one test and removes them; a namespace left over fails the test."""
    hosts: list[Host] = []

    def make(role: str) -> Host:
        hosts.append(Host(role))
        return hosts[-1]

    yield make
    for host in reversed(hosts):
        host.close()
    assert leaked() == []
