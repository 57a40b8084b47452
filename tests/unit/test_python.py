"""How parts of steerd are started as processes of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import steerd
from steerd.kernel import python


def test_what_lies_in_the_working_directory_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text("print('executed')")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(python.command("planted"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "No module named planted" in done.stderr


def test_a_checkout_finds_its_own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = Path(steerd.__file__).parents[1]
    monkeypatch.chdir(checkout)
    ask = "import sys; sys.argv[1:] = []; from steerd.kernel import python; print(python.__file__)"
    command = [*python.command("steerd")[:-2], "-c", ask]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(checkout)
