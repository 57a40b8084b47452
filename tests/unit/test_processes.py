"""Processes of daemons that are woken, as far as that takes no root; the rest is in tests/netns/test_wake.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steerd.core.wake import Starter
from steerd.errors import KernelError
from steerd.kernel import launch, processes
from steerd.kernel.processes import ProcessId

STARTER = Starter("", ("/bin/sleep", "60"), "nobody")


def test_who_is_not_told_to_go_on_runs_nothing(tmp_path: Path) -> None:
    """As when the main process is killed between noting the process and saying go."""
    job = {
        "uid": 65534,
        "gid": 65534,
        "groups": [],
        "command": ["/bin/touch", str(tmp_path / "ran")],
        "environment": {},
    }
    for said in (b"", b"no\n"):
        done = subprocess.run([sys.executable, "-I", "-S", launch.__file__, json.dumps(job)], input=said, check=False)
        assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_noted_is_not_started() -> None:
    noted: list[ProcessId] = []

    def note(process: ProcessId) -> None:
        noted.append(process)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        processes.start(STARTER, note)
    assert processes.find(noted[0]) is None


@pytest.mark.parametrize(("user", "words"), [("no-such-user", "not a user of this machine"), ("root", "is root")])
def test_users_that_nothing_is_started_as(user: str, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        processes.start(STARTER._replace(user=user), lambda _process: None)


def test_a_process_is_known_by_its_birth_and_not_by_its_number_alone() -> None:
    fields = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    born = int(fields[22 - 3])
    found = processes.find(ProcessId(os.getpid(), born))
    assert found is not None and found.id == (os.getpid(), born)
    os.close(found.descriptor)
    assert processes.find(ProcessId(os.getpid(), born - 1)) is None
    with subprocess.Popen(["/bin/true"]) as gone:
        pass
    assert processes.find(ProcessId(gone.pid, born)) is None
