"""What shells offer for steerctl: its words, and names that a running daemon knows; silently nothing without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHELLS = ("bash", "zsh", "fish")


def offered(shell: str, line: str, **environment: str) -> str:
    """What the shell is told at the end of a line; whatever goes to standard error fails the test."""
    words = line.split(" ")
    said = {
        "_STEERCTL_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    command = [sys.executable, "-c", "from steerd.cli import ctl; ctl.main()"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=os.environ | said | environment
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_words_are_completed(shell: str) -> None:
    said = offered(shell, "steerctl lease re")
    assert "release" in said
    assert "renew" in said
    assert "list" not in said


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_for_a_shell(shell: str) -> None:
    command = [sys.executable, "-m", "steerd.cli.ctl", "--show-completion", shell]
    # Else it is looked up which shell runs this, and no name is taken.
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    assert f"_STEERCTL_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.parametrize(
    ("shell", "text"),
    [
        *((shell, "[gateway]\nrun_dir = '/does/not/exist'") for shell in SHELLS),
        *(("bash", text) for text in ("[gateway", "gateway = 3")),
    ],
)
def test_without_a_daemon_there_are_no_names(tmp_path: Path, shell: str, text: str) -> None:
    file = tmp_path / "steerd.toml"
    file.write_text(text)
    # What zsh is told where nothing is known: names of files.
    assert offered(shell, "steerctl lease renew ", STEERD_CONFIG=str(file)).strip() in ("", "_files")
