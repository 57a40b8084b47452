"""Units that are woken, on a machine with a real systemd and a real polkit; steerd is not root.

steerd itself runs from this checkout, in the container's network and with its system bus.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.netns import sleeper
from tests.netns.conftest import hosts
from tests.netns.gateway import ROOT, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.test_privileges import UID, with_account
from tests.netns.test_wake import Sleepy, named
from tests.packages.container import Container

UNIT = """
[Service]
User=nobody
ExecStart=/usr/bin/python3 -I -S /srv/sleeper.py /srv/starts 8080 %i unit
"""


BUS = """
[Socket]
ListenStream=/srv/bus
"""


class WithOpenBus(Container):
    """Its system bus can be reached from outside, by whoever."""

    def furnish(self) -> None:
        self.root.parent.chmod(0o755)
        directory = self.root / "etc/systemd/system/dbus.socket.d"
        directory.mkdir()
        (directory / "outside.conf").write_text(BUS)


class Machine(Sleepy):
    """A gateway whose daemons are units."""

    def __init__(self, lab: Gateway, container: Container) -> None:
        super().__init__(lab, container.root / "srv")
        self.container = container
        shutil.copy(sleeper.__file__, container.root / "srv" / "sleeper.py")
        (container.root / "etc/systemd/system/tenant@.service").write_text(UNIT)
        container.run("systemctl", "daemon-reload")
        for name, line in (("passwd", f"steerd:x:{UID}:{UID}::/:/bin/false"), ("group", f"steerd:x:{UID}:")):
            with (container.root / "etc" / name).open("a") as file:
                file.write(line + "\n")

    def start(self) -> None:
        """As the user steerd."""
        bus = f"unix:path={self.container.root}/srv/bus"
        account = self.lab.directory / "account"
        account.mkdir(exist_ok=True)
        self.lab.start(through=[*with_account(account), "env", f"DBUS_SYSTEM_BUS_ADDRESS={bus}"])

    def state(self, index: int) -> str:
        return self.container.try_run("systemctl", "is-active", f"tenant@{index}.service").stdout.strip()


@pytest.fixture
def machine() -> Iterator[Machine]:
    containers: list[Container] = []
    with hosts() as make:

        def new_host(role: str) -> Host:
            if role == "client":
                return make(role)
            containers.append(WithOpenBus(role))
            return containers[0]

        try:
            with gateway(new_host) as lab:
                lab.directory.chmod(0o755)
                yield Machine(lab, containers[0])
        finally:
            for container in containers:
                container.close()


def test_units_are_started_and_stopped_by_leave_of_polkit(machine: Machine) -> None:
    lab = machine.lab
    more = "sleep_after = 1\nwake_timeout = 30"
    machine.configure(more, wake='"unit:tenant@{index}.service"', gateway="timeouts = { time_wait = 1, close = 1 }")
    lab.config.write_text(lab.config.read_text().replace('user = "root"\n', ""))
    lab.expected_warnings = ["a daemon cannot be woken", "daemon ended before it listened"]
    machine.start()

    assert machine.late(1) == "reset", "nobody has allowed it"
    assert (machine.state(1), machine.starts()) == ("inactive", [])
    rule = subprocess.run(
        [sys.executable, "-m", "steerd.cli.main", "polkit-rule", str(lab.config)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    (machine.container.root / "etc/polkit-1/rules.d/50-steerd.rules").write_text(rule.stdout)
    lab.wait(lambda: machine.late(1) == named(1, 4, "unit"), "polkit has read the rule")
    assert machine.early(1, 6) == named(1, 6, "unit")
    assert machine.early(2, 4) == named(2, 4, "unit")
    assert [int(words[0]) for words in machine.starts()] == [1, 2]
    for other in ("dbus.service", "tenant@1.socket"):
        refused = as_steerd(machine, "StartUnit", other)
        assert refused.returncode and ("authentication" in refused.stderr or "denied" in refused.stderr), refused.stderr
    assert as_steerd(machine, "RestartUnit", "tenant@1.service").returncode, "started and stopped, and nothing else"

    lab.wait(lambda: machine.state(1) == "inactive" == machine.state(2), "they are put to sleep")
    assert machine.late(2, 6) == named(2, 6, "unit")
    lab.kill()
    machine.start()
    assert machine.state(2) == "active"
    assert machine.late(2, 4) == named(2, 4, "unit")
    assert [int(words[0]) for words in machine.starts()] == [1, 2, 2], "known again"
    lab.wait(lambda: machine.state(2) == "inactive", "and put to sleep")


def as_steerd(machine: Machine, method: str, unit: str) -> subprocess.CompletedProcess[str]:
    """A call of the user steerd to systemd."""
    return machine.container.try_run(
        "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "busctl", "--system", "call", "--",
        "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager",
        method, "ss", unit, "replace",
    )  # fmt: skip
