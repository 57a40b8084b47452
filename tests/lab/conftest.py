"""Tests that run on the first client of the Vagrant lab (vagrant/run.sh), and nowhere else."""

from __future__ import annotations

import os

import pytest

if "STEERD_LAB" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(900))
