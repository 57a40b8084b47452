"""A machine with a systemd of its own: a clean Debian in systemd-nspawn, whose network a test can join like any host's.

The Debian is made by mmdebstrap once and kept (a tar archive in STEERD_CACHE, ~/.cache/steerd by default): the
distribution of this machine, with systemd and what the package depends on, and without anything of steerd.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tests.netns.lab import Host, sh

# What steerd's package depends on, python3-venv for an installation by pip, polkitd since units are woken by its leave,
# and what a test looks with.
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "init-system-helpers", "python3", "python3-venv", "polkitd", "nftables",
    "iptables", "iproute2", "procps", "libnetfilter-queue1", "libstdc++6",
)  # fmt: skip
_PATIENCE = 240


def base() -> Path:
    """The archive of a clean Debian, made now if it is not there."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    suite = release["VERSION_CODENAME"].strip('"')
    cache = Path(os.environ.get("STEERD_CACHE", Path.home() / ".cache" / "steerd"))
    contents = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:8]
    archive = cache / "packages" / f"{suite}-{contents}.tar"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        new = archive.with_suffix(".new.tar")
        sh(f"mmdebstrap --quiet --variant=minbase --include={','.join(PACKAGES)} {suite} {new}")
        new.rename(archive)
    return archive


class Container(Host):
    """Boots on construction. As a Host: its network, with the programs of this machine. `run` is a command inside."""

    def __init__(self, role: str) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="steerd-container-"))
        self.root = self._directory / "root"
        self.root.mkdir()
        sh(f"tar -C {self.root} -xf {base()} --exclude './dev/*'")
        self.furnish()
        with (self._directory / "log").open("wb") as log:
            self._process = self._boot(log)
        try:
            self.leader = self._first_process()
            super().__init__(role)
            self.wait(lambda: self.try_run("systemctl", "is-system-running").stdout == "running\n", "it has booted")
        except BaseException:
            self.close()
            raise

    def furnish(self) -> None:
        """To put into `root` what is to be there when it boots."""

    def _boot(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                "systemd-nspawn", "--quiet", f"--directory={self.root}", "--boot", "--console=pipe",
                # The name of a machine has no _, a temporary directory may have one.
                f"--machine={self._directory.name.replace('_', 'x')}", "--private-network", "--register=no",
                "--keep-unit",
                # Nobody reads what is only logged.
                "--link-journal=no",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip

    def _make(self) -> None:
        """Its network namespace is there already, and gets a name."""
        sh(f"ip netns attach {self.name} {self.leader}")

    def _first_process(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        found: list[str] = []

        def is_there() -> bool:
            found[:] = children.read_text().split()
            return bool(found) and Path(f"/proc/{found[0]}/comm").read_text() == "systemd\n"

        self.wait(is_there, "systemd is there")
        return int(found[0])

    def wait(self, condition: Callable[[], object], what: str, seconds: float = _PATIENCE) -> None:
        """Until `condition` holds; fails with what the container said."""
        deadline = time.monotonic() + seconds
        while not condition():
            log = (self._directory / "log").read_text()
            assert self._process.poll() is None and time.monotonic() < deadline, f"not reached: {what}\n{log}"
            time.sleep(0.1)

    def try_run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside, as root; succeed or not."""
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        return subprocess.run(
            ["nsenter", f"--target={self.leader}", "--all", "--wd", *command],
            env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    def run(self, *command: str) -> str:
        """A command inside, as root, that must succeed; its standard output."""
        done = self.try_run(*command)
        assert done.returncode == 0, f"exit {done.returncode}: {command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        """Switch it off, and remove all of it."""
        if hasattr(self, "name"):
            sh(f"ip netns del {self.name}", check=False)
        # Its first process, and with that all others; nothing in it is worth an orderly end.
        with contextlib.suppress(ProcessLookupError, AttributeError):
            os.kill(self.leader, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        sh(f"rm -rf --one-file-system {self._directory}")
