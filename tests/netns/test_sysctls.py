"""Sysctls in a real kernel: install.sh and steerd.kernel.sysctls say, do and undo the same, in their namespace only.

host: a fresh namespace, so nf_conntrack_tcp_loose is 1 and nf_conntrack_max is read-only
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from steerd.errors import KernelError
from steerd.kernel import sysctls
from steerd.kernel.sysctls import Change
from tests.netns.gateway import Gateway, gateway
from tests.netns.lab import Host

NFT = Path(__file__).resolve().parents[2] / "nft"
LOOSE = "net.netfilter.nf_conntrack_tcp_loose"
MAX = "net.netfilter.nf_conntrack_max"
TIMESTAMPS = "net.ipv4.tcp_timestamps"
SCALING = "net.ipv4.tcp_window_scaling"
NAMES = (LOOSE, TIMESTAMPS, SCALING, MAX, "net.netfilter.nf_conntrack_buckets")


@pytest.fixture
def host(new_host: Callable[[str], Host]) -> Host:
    made = new_host("host")
    made.sh(f"sysctl -qw {LOOSE}=1 {TIMESTAMPS}=0 {SCALING}=0")
    return made


def values(host: Host, *names: str) -> list[int]:
    return [int(line) for line in host.sh(f"sysctl -n {' '.join(names or NAMES)}").splitlines()]


def tried(host: Host, run_dir: Path, *arguments: str, nft: Path = NFT) -> tuple[int, list[str], str]:
    """Exit status, lines of standard output without the last one (about the table), and standard error."""
    command = host.command(str(nft / "install.sh"), "--run-dir", str(run_dir), *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    lines = done.stdout.splitlines()
    return done.returncode, lines[:-1] if done.returncode == 0 else lines, done.stderr


def install(host: Host, run_dir: Path, *arguments: str, nft: Path = NFT) -> list[str]:
    status, lines, errors = tried(host, run_dir, *arguments, nft=nft)
    assert (status, errors) == (0, ""), (status, lines, errors)
    return lines


def by_shell(host: Host, run_dir: Path, action: str) -> list[str]:
    """What install.sh says of sysctls when it has done this: check, apply or restore."""
    arguments = {"check": ["--check"], "apply": [], "restore": ["--uninstall"]}[action]
    return install(host, run_dir, *arguments)


def by_python(host: Host, run_dir: Path, action: str) -> list[str]:
    """The same of the daemon's side, which says first what will be changed, too."""
    with host.entered():
        if action == "check":
            return [str(difference) for difference in sysctls.check()]
        if action == "apply":
            return [*map(str, sysctls.check()), *map(str, sysctls.apply(run_dir))]
        return [str(change) for change in sysctls.restore(run_dir)]


SIDES = pytest.mark.parametrize("side", [by_shell, by_python])
Side = Callable[[Host, Path, str], list[str]]


@pytest.fixture
def own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Both sides read this list instead; returns the directory of its install.sh."""

    def use(text: str) -> Path:
        nft = tmp_path / "nft"
        nft.mkdir(exist_ok=True)
        for name in ("install.sh", "steerd.nft"):
            shutil.copy(NFT / name, nft)
        (nft / "sysctls").write_text(text)
        monkeypatch.setattr(sysctls, "list_path", lambda: nft / "sysctls")
        return nft

    return use


# ---- alike, and each other's ----


def test_both_say_and_do_the_same(host: Host, tmp_path: Path, new_host: Callable[[str], Host]) -> None:
    other = new_host("other")
    other.sh(f"sysctl -qw {LOOSE}=1 {TIMESTAMPS}=0 {SCALING}=0")
    for action in ("check", "apply", "check", "apply", "restore", "restore"):
        said = by_shell(host, tmp_path / "shell", action)
        assert said == by_python(other, tmp_path / "python", action), action
        assert values(host) == values(other), action
        kept = [tmp_path / side / "sysctls" for side in ("shell", "python")]
        assert len({path.read_text() if path.exists() else "" for path in kept}) == 1, action


@pytest.mark.parametrize(("first", "second"), [(by_shell, by_python), (by_python, by_shell)])
def test_either_undoes_what_the_other_has_done(host: Host, tmp_path: Path, first: Side, second: Side) -> None:
    before = values(host)
    said = first(host, tmp_path, "apply")
    assert [line for line in said if "changed" in line] == said[-3:], "all is announced before the first change"
    assert values(host, LOOSE, TIMESTAMPS, SCALING) == [0, 1, 1]
    kept = (tmp_path / "sysctls").read_text()
    assert set(kept.splitlines()) >= {f"{LOOSE} 1 0", f"{TIMESTAMPS} 0 1", f"{SCALING} 0 1"}
    second(host, tmp_path, "apply")
    assert (tmp_path / "sysctls").read_text() == kept
    second(host, tmp_path, "restore")
    assert values(host) == before
    assert list(tmp_path.iterdir()) == []


PYTHON = "import pathlib, sys; from steerd.kernel import sysctls; sysctls.{}(pathlib.Path(sys.argv[1]))"
COMMANDS = {
    "shell apply": [str(NFT / "install.sh"), "--run-dir"],
    "shell restore": [str(NFT / "install.sh"), "--uninstall", "--run-dir"],
    "python apply": [sys.executable, "-c", PYTHON.format("apply")],
    "python restore": [sys.executable, "-c", PYTHON.format("restore")],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_one_waits_for_the_other(host: Host, tmp_path: Path, command: list[str]) -> None:
    """Of two that keep and set in turn, one could take the other's value for the first."""
    if "restore" in command[-1] or "--uninstall" in command:
        by_shell(host, tmp_path, "apply")
    before = values(host)
    lock = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(host.command(*command, str(tmp_path)), stdout=subprocess.DEVNULL) as waiting:
            waiter = re.compile(rf"-> FLOCK .*:{tmp_path.stat().st_ino} ")
            while waiting.poll() is None and not waiter.search(Path("/proc/locks").read_text()):
                time.sleep(0.05)
            assert waiting.poll() is None, "it did not wait"
            assert values(host) == before
            fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.returncode == 0
    finally:
        os.close(lock)
    assert values(host) != before


def test_the_first_value_is_kept_whatever_happens_later(
    host: Host, tmp_path: Path, own_list: Callable[[str], Path]
) -> None:
    name = "net.ipv4.tcp_fin_timeout"
    nft = own_list(f"{name} must at-least 100 reason\n")
    for first, second in (("shell", "shell"), ("shell", "python"), ("python", "shell"), ("python", "python")):
        for value, side in ((50, first), (44, second)):
            host.sh(f"sysctl -qw {name}={value}")
            if side == "shell":
                install(host, tmp_path, nft=nft)
            else:
                by_python(host, tmp_path, "apply")
            assert values(host, name) == [100]
            assert (tmp_path / "sysctls").read_text() == f"{name} 50 100\n"
        by_python(host, tmp_path, "restore")
        assert values(host, name) == [50]


# ---- one after the other ----


@SIDES
def test_checking_changes_nothing(host: Host, tmp_path: Path, side: Side) -> None:
    before = values(host)
    said = side(host, tmp_path / "run", "check")
    assert [line.split()[1] for line in said][:3] == [LOOSE, TIMESTAMPS, SCALING]
    assert said[0].startswith(f"sysctl {LOOSE} is 1, must be 0: ")
    assert said[1].startswith(f"sysctl {TIMESTAMPS} is 0, must be at least 1: ")
    assert values(host) == before
    assert list(tmp_path.iterdir()) == []


@SIDES
def test_only_this_namespace_is_touched(
    host: Host, tmp_path: Path, side: Side, new_host: Callable[[str], Host]
) -> None:
    bystander = new_host("bystander")
    bystander.sh(f"sysctl -qw {LOOSE}=1 {TIMESTAMPS}=0")
    before = values(bystander)
    side(host, tmp_path, "apply")
    assert values(bystander) == before


@SIDES
def test_what_somebody_has_changed_since_is_left_alone(host: Host, tmp_path: Path, side: Side) -> None:
    side(host, tmp_path, "apply")
    host.sh(f"sysctl -qw {TIMESTAMPS}=2 {LOOSE}=1")
    side(host, tmp_path, "apply")
    assert values(host, LOOSE, TIMESTAMPS) == [0, 2]
    said = side(host, tmp_path, "restore")
    assert f"sysctl {LOOSE} is changed from 0 to 1" in said
    assert f"sysctl {TIMESTAMPS} is 2, not 1 as steerd had set it, and is left alone" in said
    assert values(host, LOOSE, TIMESTAMPS, SCALING) == [1, 2, 0]


def test_the_script_writes_through_no_link(host: Host, tmp_path: Path) -> None:
    """The directory belongs to steerd's user, and the script is run by root."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("root's own")
    (run / "sysctls.new").symlink_to(victim)
    host.sh(f"sysctl -qw {LOOSE}=1")
    by_shell(host, run, "apply")
    assert values(host, LOOSE) == [0]
    assert victim.read_text() == "root's own"
    by_shell(host, run, "restore")
    (run / "sysctls").symlink_to(tmp_path / "made")
    with pytest.raises(AssertionError):
        by_shell(host, run, "apply")
    assert not (tmp_path / "made").exists()


@SIDES
@pytest.mark.parametrize("text", [f"{LOOSE} one 0\n", "kernel.randomize_va_space 0 2\n"])
def test_a_damaged_file_is_neither_believed_nor_overwritten(host: Host, tmp_path: Path, side: Side, text: str) -> None:
    (tmp_path / "sysctls").write_text(text)
    for action in ("apply", "restore"):
        with pytest.raises((KernelError, AssertionError), match="sysctls must have lines of a name and two numbers: "):
            side(host, tmp_path, action)
    assert (tmp_path / "sysctls").read_text() == text
    assert values(host, LOOSE) == [1]


@SIDES
def test_a_value_that_the_kernel_refuses_is_a_sentence(host: Host, tmp_path: Path, side: Side) -> None:
    host.sh(f"sysctl -qw {LOOSE}=0")
    kept = f"{LOOSE} 7 0\n"
    (tmp_path / "sysctls").write_text(kept)
    with pytest.raises((KernelError, AssertionError), match=f"sysctl {LOOSE} cannot be set to 7"):
        side(host, tmp_path, "restore")
    assert (tmp_path / "sysctls").read_text() == kept, "the way back is not lost"


def test_no_sysctl(host: Host, tmp_path: Path) -> None:
    before = values(host)
    for action in ("--check", None, "--uninstall"):
        assert install(host, tmp_path / "run", "--no-sysctl", *([action] if action else [])) == []
        assert values(host) == before
    by_shell(host, tmp_path, "apply")
    after = values(host)
    install(host, tmp_path, "--no-sysctl", "--uninstall")
    assert values(host) == after
    by_shell(host, tmp_path, "restore")
    assert values(host) == before


# ---- what a namespace may not set ----


@pytest.mark.parametrize(("condition", "fits"), [("at-least", False), ("at-least-or-0", False), ("is", True)])
def test_a_limit_of_the_whole_machine_is_a_warning(
    host: Host, tmp_path: Path, own_list: Callable[[str], Path], condition: str, fits: bool
) -> None:
    (now,) = values(host, MAX)
    nft = own_list(f"{MAX} should {condition} {now if fits else 2147483647} reason\n{LOOSE} must is 0 reason\n")
    said = [] if fits else [f"sysctl {MAX} is {now}, should be at least 2147483647, and cannot be set here: reason"]
    with host.entered():
        assert [str(difference) for difference in sysctls.check() if not difference.settable] == said
        assert sysctls.apply(tmp_path) == [Change(LOOSE, 1, 0, 0)]
        assert [str(difference) for difference in sysctls.check()] == said
    assert install(host, tmp_path, "--check", nft=nft) == said
    assert install(host, tmp_path, nft=nft) == said
    assert values(host, MAX, LOOSE) == [now, 0]


def test_what_must_be_and_cannot_be_stops_all(host: Host, tmp_path: Path, own_list: Callable[[str], Path]) -> None:
    nft = own_list(f"{LOOSE} must is 0 reason\n{MAX} must at-least 2147483647 reason\nnet.nothing must is 1 reason\n")
    (now,) = values(host, MAX)
    said = f"sysctl {MAX} is {now}, must be at least 2147483647, and cannot be set here: reason"
    with host.entered():
        assert [difference.fatal for difference in sysctls.check()] == [False, True, True]
        assert str(sysctls.check()[2]) == "sysctl net.nothing is missing, must be 1, and cannot be set here: reason"
        with pytest.raises(KernelError, match=said):
            sysctls.apply(tmp_path / "run")
    for arguments in (["--check"], []):
        status, _, errors = tried(host, tmp_path / "run", *arguments, nft=nft)
        assert (status, errors) == (1, f"install.sh: {said}\n")
    assert values(host, LOOSE) == [1]
    assert "steerd" not in host.sh("nft list tables")
    assert not (tmp_path / "run" / "sysctls").exists()


# ---- what they are good for ----


@pytest.mark.parametrize("version", [4, 6])
def test_data_of_an_unknown_connection_is_invalid_from_then_on(host: Host, tmp_path: Path, version: int) -> None:
    """What late steering diverts is `ct state invalid`; before, conntrack calls the same segment `new`."""
    host.sh(
        "nft 'table inet t { counter new { }; counter invalid { }; chain input { type filter hook input priority 0;"
        " tcp dport 9 ct state new counter name new; tcp dport 9 ct state invalid counter name invalid; }; }'"
    )
    family, header = (socket.AF_INET, IP(dst="127.0.0.1")) if version == 4 else (socket.AF_INET6, IPv6(dst="::1"))

    def counted(port: int) -> list[str]:
        """Packets called new and invalid so far, after one more segment of data, from this port."""
        segment = header / TCP(sport=port, dport=9, flags="A", seq=1, ack=1) / Raw(b"x")
        with host.entered(), socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(bytes(segment), (header.dst, 0))
        return re.findall(r"packets (\d+)", host.sh("nft list counter inet t new; nft list counter inet t invalid"))

    assert counted(1) == ["1", "0"]
    by_python(host, tmp_path, "apply")
    assert counted(2) == ["1", "1"]
    by_python(host, tmp_path, "restore")
    assert counted(3) == ["2", "1"]


# ---- while the daemon runs ----

MENDED = "a sysctl that late steering needs was changed by somebody; it is set back"
BODY = """
[pools.web]
prefixes = ["10.64.0.0/30"]
[services.web]
endpoints = ["203.0.113.10:443/tcp"]
inspect = ["{inspect}"]
default = "10.64.0.1:80"
{more}
"""


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        yield made


def test_what_somebody_changes_is_set_back_and_told(lab: Gateway) -> None:
    lab.configure(BODY.format(inspect="tls", more=""))
    before = values(lab.host, LOOSE)
    lab.start()
    lab.expected_warnings = [MENDED]
    for count, (name, wrong, right) in enumerate([(LOOSE, 1, 0), (TIMESTAMPS, 0, 1), (LOOSE, 1, 0)], start=1):
        lab.host.sh(f"sysctl -qw {name}={wrong}")
        lab.wait(partial(mended, lab, count), f"{name} is set back")
        assert values(lab.host, name) == [right]
        *_, event = (event for event in lab.events() if event["event"] == MENDED)
        assert (event["level"], event["sysctl"]) == ("warning", name)
        assert (event["found"], event["set_back_to"]) == (wrong, right)
        assert event["why"] == next(each.reason for each in sysctls.wanted() if each.name == name)
    lab.stop()
    with lab.host.entered():
        sysctls.restore(lab.directory / "run")
    assert values(lab.host, LOOSE, TIMESTAMPS) == [*before, 0], "what each was before steerd's first change"


def mended(lab: Gateway, count: int) -> bool:
    return lab.count_events(MENDED) == count


def test_without_late_services_they_are_nobodys_business(lab: Gateway) -> None:
    lab.configure(BODY.format(inspect="port-extension", more='unextended = "default"'))
    lab.start()
    lab.host.sh(f"sysctl -qw {LOOSE}=1")
    # The same look at the table that puts rules back would set sysctls back.
    lab.host.sh("nft flush chain inet steerd guard")
    removed = "rules of steerd were removed by somebody; they are back"
    lab.expected_warnings = [removed]
    lab.wait(lambda: lab.count_events(removed) == 1, "the rules are back")
    lab.stop()
    assert values(lab.host, LOOSE) == [1]
