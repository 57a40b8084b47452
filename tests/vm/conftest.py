"""Tests that run inside the virtual machine that `tests/vm/run` starts, and nowhere else.

Outside it (STEERD_VM_KERNEL is not set) nothing here is collected: a stock kernel is what these tests are about.
Everything is 15 to 40 times slower in there, so each test gets a long limit and starts few processes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.netns.conftest import new_host

__all__ = ["new_host"]

SECONDS_A_TEST = 900
HERE = Path(__file__).parent

if "STEERD_VM_KERNEL" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS_A_TEST))
