"""Tests that run inside the virtual machine that `tests/vm/run` starts, and nowhere else.

Outside it (STEERD_VM_KERNEL is not set) nothing here is collected: a stock kernel is what these tests are about.
Everything is 15 to 40 times slower in there, so each test gets a long limit and starts few processes.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.netns.conftest import new_host

__all__ = ["new_host"]

SECONDS_A_TEST = 900
HERE = Path(__file__).parent
CANNOT: dict[tuple[str, str], str] = {}
"""Why a kernel cannot run a test: by the beginning of its release, and the test's name. Whatever is skipped without a
line in here has failed."""

if "STEERD_VM_KERNEL" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS_A_TEST))
        if why := why_not(item):
            item.add_marker(pytest.mark.skip(reason=why))


def why_not(item: pytest.Item) -> str:
    """What the table says of this test on the kernel that runs; nothing if it is to run."""
    release = os.environ["STEERD_VM_KERNEL"]
    return next((why for (begins, name), why in CANNOT.items() if release.startswith(begins) and item.name == name), "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and HERE in item.path.parents and not why_not(item):
        report.outcome = "failed"
        report.longrepr = f"{item.name} was skipped, and CANNOT in {__file__} does not say why: {report.longrepr}"
    return report
