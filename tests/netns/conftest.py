"""Fixtures for tests against the real kernel: every host is a namespace of its own and is gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.netns.lab import Host, leaked


@contextmanager
def hosts() -> Iterator[Callable[[str], Host]]:
    """Makes namespaces and removes them at the end of the block; one that is left over then is an error."""
    made: list[Host] = []

    def make(role: str) -> Host:
        made.append(Host(role))
        return made[-1]

    try:
        yield make
    finally:
        for host in reversed(made):
            host.close()
    assert leaked() == []


@pytest.fixture
def new_host() -> Iterator[Callable[[str], Host]]:
    """Makes namespaces for one test and removes them; a namespace left over fails the test."""
    with hosts() as make:
        yield make
