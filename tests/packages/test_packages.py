"""The package, installed in a clean Debian with a real systemd: start, reload, watchdog, upgrade, stop, remove, purge,
while connections are steered; then the same machine with an installation by pip and `steerd setup`.

One machine serves all tests of a module; each puts it into the state that it needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerd.model import Extension
from tests.netns.conftest import hosts
from tests.netns.gateway import ENDPOINT4, ROOT, Gateway
from tests.netns.lab import Host, sh
from tests.netns.test_privileges import ADMIN_AND_RAW, CONFIG, steers
from tests.packages.container import Container

VERSION = "0.1.0"


class Machine(Gateway):
    """A gateway in a container, whose daemon is a service."""

    host: Container
    _has_daemons = False

    def service(self, name: str) -> str:
        return self.host.run("systemctl", "show", "--value", f"--property={name}", "steerd").strip()

    def main(self) -> int:
        return int(self.service("MainPID"))

    def journal(self) -> str:
        return self.host.run("journalctl", "--unit=steerd", "--output=cat", "--no-pager")

    def write_config(self, text: str) -> None:
        (self.host.root / "etc/steerd/steerd.toml").write_text(text)

    def wait_active(self, *, other_than: int = 0) -> None:
        self.host.wait(
            lambda: self.service("ActiveState") == "active" and self.main() not in (0, other_than),
            "steerd.service is active",
        )

    def version(self) -> str:
        """Of the package that is installed; none if none is."""
        query = "dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", "steerd"
        return self.host.try_run(*query).stdout.partition("installed ")[2]

    def have_daemons(self) -> None:
        """On all aliases, from when there are aliases on."""
        if not self._has_daemons:
            self.respond(("10.64.0.0", 16, 8080), ("fd00:64::", 16, 8080))
            self._has_daemons = True

    def takes(self, text: str) -> None:
        """Put a configuration in force."""
        self.write_config(text)
        self.host.run("systemctl", "reload", "steerd")


@contextlib.contextmanager
def connection(machine: Machine) -> Iterator[socket.socket]:
    """One that must still be there, and at the same daemon, when the block ends."""
    with machine.socket(Extension(5, 0)) as client:
        client.connect((ENDPOINT4, 443))
        assert client.recv(256).startswith(b"10.64.0.4 8080 ")
        yield client
        client.sendall(b"still there")
        assert client.recv(256) == b"still there"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built now, or the one that STEERD_DEB names."""
    if given := os.environ.get("STEERD_DEB"):
        return Path(given)
    out = tmp_path_factory.mktemp("deb")
    return Path(sh(f"cd {ROOT}; release/deb {out}").strip().splitlines()[-1])


@pytest.fixture(scope="module")
def newer(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as another version."""
    tree = tmp_path_factory.mktemp("newer")
    sh(
        f"dpkg-deb -R {package} {tree}/tree; sed -i 's/^Version: .*/&+1/' {tree}/tree/DEBIAN/control;"
        f"echo '# Of the newer version.' >>{tree}/tree/etc/steerd/steerd.toml;"
        f"dpkg-deb --root-owner-group -Znone --build {tree}/tree {tree}/newer.deb"
    )
    return tree / "newer.deb"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with hosts() as make:
        container: list[Container] = []

        def new_host(role: str) -> Host:
            if role == "client":
                return make(role)
            container.append(Container(role))
            return container[0]

        try:
            made = Machine(new_host)
            try:
                yield made
            finally:
                made.close()
        finally:
            for each in container:
                each.close()


def install(machine: Machine, package: Path) -> str:
    """By dpkg, inside; what it said."""
    shutil.copy(package, machine.host.root / "root" / "package.deb")
    return machine.host.run("dpkg", "--force-confold", "-i", "/root/package.deb")


@pytest.fixture
def running(machine: Machine, package: Path) -> Machine:
    """With a package, CONFIG in force, and daemons: whatever the test before has left."""
    if not machine.version():
        without(machine)
        install(machine, package)
    machine.host.run("systemctl", "reset-failed", "steerd")
    machine.host.run("systemctl", "start", "steerd")
    machine.wait_active()
    machine.takes(CONFIG)
    machine.have_daemons()
    return machine


def without(machine: Machine) -> None:
    """Nothing of steerd, neither the package nor what pip has installed."""
    machine.host.run("dpkg", "-P", "steerd")
    machine.host.run("rm", "-rf", "/opt/steerd", "/etc/steerd")


def test_what_is_in_it(package: Path) -> None:
    control = dict(
        line.split(": ", 1) for line in sh(f"dpkg-deb -f {package}").splitlines() if not line.startswith(" ")
    )
    assert (control["Package"], control["Version"]) == ("steerd", VERSION)
    assert {"nftables", "systemd", "libnetfilter-queue1"} <= set(re.findall(r"[a-z][\w.+-]+", control["Depends"]))
    listing = [line.split(maxsplit=5) for line in sh(f"dpkg-deb -c {package}").splitlines()]
    files = {path.split(" -> ")[0].removeprefix(".").rstrip("/"): mode for mode, _, _, _, _, path in listing}
    assert {owner for _, owner, *_ in listing} == {"root/root"}
    assert [path for path, mode in files.items() if mode[0] != "l" and (mode[8] == "w" or "s" in mode[1:])] == []
    outside = {path for path, mode in files.items() if mode[0] != "d" and not path.startswith("/opt/steerd/")}
    assert outside == {
        "/etc/steerd/steerd.toml", "/usr/bin/steerd", "/usr/bin/steerctl", "/usr/lib/systemd/system/steerd.service",
        "/usr/lib/systemd/system/steerd-hold.service",
        "/usr/lib/sysusers.d/steerd.conf", "/usr/lib/tmpfiles.d/steerd.conf", "/usr/share/doc/steerd/README.md",
        "/usr/share/doc/steerd/guide.md",
        "/usr/share/doc/steerd/copyright", "/usr/share/bash-completion/completions/steerctl",
        "/usr/share/zsh/vendor-completions/_steerctl", "/usr/share/fish/vendor_completions.d/steerctl.fish",
        *(f"/usr/share/man/man{page.suffix[1:]}/{page.name}.gz" for page in (ROOT / "steerd" / "man").glob("*.[1-8]")),
    }  # fmt: skip
    assert "complete " in sh(
        f"dpkg-deb --fsys-tarfile {package} | tar -xO ./usr/share/bash-completion/completions/steerctl"
    )
    assert {"/opt/steerd/share/steerd/nft/steerd.nft", "/opt/steerd/share/steerd/nft/install.sh"} <= files.keys()
    assert files["/etc/steerd/steerd.toml"] == "-rw-r-----"


def test_nothing_in_it_names_the_place_where_it_was_built(package: Path, tmp_path: Path) -> None:
    sh(f"dpkg-deb -x {package} {tmp_path}")
    for name in (str(ROOT), "/tmp/tmp."):
        assert sh(f"grep -rlaF -e {name} {tmp_path} || true") == ""
    for program in ("steerd", "steerctl"):
        assert (tmp_path / "opt/steerd/bin" / program).read_text().startswith("#!/opt/steerd/bin/python\n")


def test_installed_it_runs_as_its_user_with_two_capabilities(machine: Machine, package: Path) -> None:
    without(machine)
    install(machine, package)
    machine.wait_active()
    assert machine.host.run("steerd", "--version") == f"steerd {VERSION}\n"
    assert machine.host.run("steerd", "check") == "ok\n"
    uid = machine.host.run("id", "-u", "steerd").strip()
    assert uid != "0"
    processes = machine.host.run("pgrep", "-u", "steerd").split()
    assert len(processes) >= 2  # the main process, and a worker for each CPU
    for pid in processes:
        status = machine.host.run("cat", f"/proc/{pid}/status")
        assert re.findall(r"^Cap\w+:\s+(\w+)$", status, re.MULTILINE) == [f"{ADMIN_AND_RAW:016x}"] * 5
        assert re.findall(rf"^(?:NoNewPrivs:\s+1|Seccomp:\s+2|Uid:(?:\s+{uid}){{4}})$", status, re.M)
        assert len(re.findall(rf"^(?:NoNewPrivs:\t1|Seccomp:\t2|Uid:(?:\t{uid}){{4}})$", status, re.MULTILINE)) == 3
    assert "0 services" in machine.service("StatusText")


def test_systemd_finds_its_sandbox_tight(running: Machine) -> None:
    said = running.host.run("systemd-analyze", "security", "--no-pager", "steerd.service")
    found = re.search(r"Overall exposure level for steerd\.service: ([\d.]+)", said)
    assert found, said
    print(found[0])
    assert float(found[1]) < 2.0, said


def test_a_reload_puts_a_new_file_in_force_and_refuses_a_bad_one(running: Machine) -> None:
    machine = running
    machine.takes("")
    assert "0 services" in machine.service("StatusText")
    machine.takes(CONFIG)
    assert "1 services" in machine.service("StatusText")
    steers(machine)
    machine.write_config("[services")
    done = machine.host.try_run("systemctl", "reload", "steerd")
    assert done.returncode != 0
    assert "/etc/steerd/steerd.toml: " in machine.journal()
    assert machine.service("ActiveState") == "active"
    steers(machine)
    machine.takes(CONFIG)


def test_inside_the_sandbox_it_sets_sysctls_and_mends_its_table(running: Machine) -> None:
    machine = running
    machine.host.run("sysctl", "-qw", "net.ipv4.tcp_timestamps=0")
    machine.host.wait(
        lambda: machine.host.run("sysctl", "-n", "net.ipv4.tcp_timestamps") == "1\n", "the sysctl is set back"
    )
    machine.host.run("nft", "delete", "table", "inet", "steerd")
    machine.host.wait(lambda: "rules of steerd were removed by somebody; they are back" in machine.journal(), "mended")
    machine.host.run("ip", "address", "flush", "dev", "steer0")
    machine.host.wait(lambda: "aliases were removed by somebody; they are back" in machine.journal(), "mended")
    steers(machine)
    assert "nobody will say when queues overflow" not in machine.journal()


def test_the_watchdog_starts_it_again_when_it_hangs(running: Machine) -> None:
    machine = running
    drop_in = machine.host.root / "etc/systemd/system/steerd.service.d/quick.conf"
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text("[Service]\nWatchdogSec=5s\n")
    try:
        machine.host.run("systemctl", "daemon-reload")
        machine.host.run("systemctl", "restart", "steerd")
        machine.wait_active()
        before = machine.main()
        time.sleep(6)
        assert machine.main() == before, "one that lives is left alone"
        with connection(machine):
            machine.host.run("kill", "-STOP", str(before))
            machine.wait_active(other_than=before)
            steers(machine)
        assert machine.service("NRestarts") == "1"
    finally:
        shutil.rmtree(drop_in.parent)
        machine.host.run("systemctl", "daemon-reload")


def test_an_upgrade_under_load_loses_no_connection(running: Machine, package: Path, newer: Path) -> None:
    machine = running
    if machine.version() != VERSION:
        install(machine, package)
        machine.wait_active()
    before = machine.main()
    with contextlib.ExitStack() as open_ones, subprocess.Popen(
        machine.client.command(sys.executable, "-m", "tests.packages.load"), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as load:  # fmt: skip
        for _ in range(10):
            open_ones.enter_context(connection(machine))
        install(machine, newer)
        machine.wait_active(other_than=before)
        steers(machine)
        said, _ = load.communicate("", timeout=120)
    counts = json.loads(said)
    assert counts["wrong"] == 0
    assert counts["failed"] == 0
    assert counts["right"] > 20
    assert machine.version() == f"{VERSION}+1"
    assert "services.web" in (machine.host.root / "etc/steerd/steerd.toml").read_text(), "it is the operator's"


def test_a_stop_keeps_what_is_steered(running: Machine) -> None:
    machine = running
    with connection(machine):
        machine.host.run("systemctl", "stop", "steerd")
        assert machine.service("Result") == "success"
        assert machine.host.try_run("pgrep", "-u", "steerd").stdout == ""
        machine.host.run("nft", "list", "table", "inet", "steerd")
    machine.host.run("systemctl", "start", "steerd")
    steers(machine)


def test_what_the_kernel_steers_by_itself_ends_with_a_killed_service(running: Machine) -> None:
    machine = running
    drop_in = machine.host.root / "etc/systemd/system/steerd.service.d/once.conf"
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text("[Service]\nRestart=no\n")
    try:
        machine.host.run("systemctl", "daemon-reload")
        with connection(machine):
            held = "nft", "list", "map", "inet", "steerd", "offload4"
            machine.host.wait(lambda: "elements" in machine.host.run(*held), "the kernel was told")
            machine.host.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", "steerd")
            machine.host.wait(lambda: machine.service("ActiveState") == "failed", "it is seen to be gone")
            assert "elements" not in machine.host.run(*held)
    finally:
        shutil.rmtree(drop_in.parent)
        machine.host.run("systemctl", "daemon-reload")


def test_what_holds_clients_back_during_a_boot_is_not_loaded_after_it(running: Machine) -> None:
    machine = running
    assert (machine.host.root / "var/lib/steerd/hold.nft").exists()
    with connection(machine):
        machine.host.run("systemctl", "start", "multi-user.target", "steerd-hold")
        machine.host.run("systemctl", "stop", "steerd")
        machine.host.run("systemctl", "start", "steerd-hold")
        assert "hold" not in machine.host.run("nft", "list", "tables")
    machine.host.run("systemctl", "start", "steerd")
    assert "the table that holds clients back during a boot" not in machine.journal()


def test_removed_it_leaves_the_configuration_and_nothing_else(running: Machine) -> None:
    machine = running
    machine.host.run("dpkg", "-r", "steerd")
    assert "steer" not in machine.host.run("nft", "list", "ruleset")
    assert "steer" not in machine.host.run("ip", "-o", "link")
    assert machine.host.run("sysctl", "-n", "net.netfilter.nf_conntrack_tcp_loose") == "1\n"
    assert machine.host.try_run("systemctl", "is-active", "steerd").stdout.strip() != "active"
    root = machine.host.root
    assert not (root / "opt/steerd").exists()
    assert (root / "etc/steerd/steerd.toml").exists()
    assert (root / "var/lib/steerd/registry").exists()


def test_purged_it_leaves_nothing(running: Machine) -> None:
    machine = running
    machine.host.run("dpkg", "-P", "steerd")
    root = machine.host.root
    left = [name for name in ("etc/steerd", "var/lib/steerd", "run/steerd", "opt/steerd") if (root / name).exists()]
    assert left == []
    assert sh(f"find {root}/etc {root}/usr/lib/systemd {root}/var/lib/systemd -name '*steerd*'") == ""


def test_an_installation_by_pip_is_set_up_and_taken_away(machine: Machine) -> None:
    without(machine)
    wheels = machine.host.root / "root/wheels"
    sh(f"cd {ROOT}; {sys.executable} -m pip wheel -q --require-hashes -w {wheels} -r requirements.lock")
    sh(f"PYTHON={sys.executable} {ROOT}/release/wheel {wheels}")
    machine.host.run("python3", "-m", "venv", "/opt/steerd")
    machine.host.run("/opt/steerd/bin/pip", "install", "-q", "--no-index", "--find-links=/root/wheels", "steerd")
    setup = "/opt/steerd/bin/steerd", "setup"
    would = machine.host.run(*setup, "--print")
    assert "would write /etc/systemd/system/steerd-hold.service" in would
    assert "would write /etc/systemd/system/steerd.service" in would
    assert not (machine.host.root / "etc/steerd").exists()
    assert machine.host.run(*setup) == would.replace("would ", "")
    assert machine.host.run(*setup).startswith("all is set up")
    machine.write_config(CONFIG)
    machine.host.run("systemctl", "enable", "--now", "--quiet", "steerd")
    assert machine.service("ActiveState") == "active"
    machine.have_daemons()
    steers(machine)
    # An older version had no such unit.
    machine.host.run("systemctl", "disable", "--quiet", "steerd-hold")
    machine.host.run("rm", "/etc/systemd/system/steerd-hold.service")
    assert "systemctl reenable steerd.service" in machine.host.run(*setup)
    assert machine.host.run("systemctl", "is-enabled", "steerd", "steerd-hold").split() == ["enabled"] * 2
    machine.host.run(*setup, "--remove")
    assert machine.host.try_run("systemctl", "is-active", "steerd").stdout.strip() != "active"
    assert sh(f"find {machine.host.root}/etc/systemd -name 'steerd*'") == ""
    machine.host.run("/opt/steerd/bin/steerd", "down")
    assert "steer" not in machine.host.run("nft", "list", "ruleset")
