"""Fixtures for tests against the real kernel: every host is a namespace of its own and is gone afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.netns.gateway import ROOT
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


@pytest.fixture
def change_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Has the gateways of one test run from a copy of everything, in whose steerd.nft one text stands for another."""
    for part in ("steerd", "nft", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "vectors"))
    rules = tmp_path / "nft" / "steerd.nft"
    monkeypatch.setattr("tests.netns.gateway.ROOT", tmp_path)

    def change(old: str, new: str) -> None:
        text = rules.read_text()
        assert old in text
        rules.write_text(text.replace(old, new))

    return change
