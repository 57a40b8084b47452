"""Started by hand as root: what the daemon is afterwards, and that it steers as before."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steerd import privileges
from steerd.errors import SteerdError
from steerd.model import Extension
from tests.netns.gateway import CLIENT4, ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host

ADMIN_AND_RAW = (1 << 12) | (1 << 13)
UID = 54321
CONFIG = """
[pools.tenants]
prefixes = ["10.64.0.0/28", "fd00:64::/124"]
[services.web]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension", "http"]
extension_pool = { pool = "tenants", by = "extension", port = 8080 }
routes = [{ when = { http.host = "a.example" }, target = ["10.64.0.2:8080", "[fd00:64::2]:8080"] }]
"""


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        yield made


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def capabilities_of(pid: int) -> set[int]:
    status = status_of(pid)
    return {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")}


def workers(lab: Gateway) -> list[int]:
    return [event["pid"] for event in lab.events() if event["event"] == "worker bound"]


def steers(lab: Gateway) -> None:
    """Early, late in two segments (which takes a raw socket), for both address families."""
    assert lab.ask(Extension(1, 0), 443).startswith(f"10.64.0.0 8080 {CLIENT4} ")
    assert lab.ask(Extension(2, 0), 443, version=6).startswith("fd00:64::1 8080 ")
    for version, endpoint, alias in ((4, ENDPOINT4, b"10.64.0.2"), (6, ENDPOINT6, b"fd00:64::2")):
        with lab.socket(None, version=version) as client:
            client.connect((endpoint, 443))
            client.sendall(b"GET / HTTP/1.1\r\nHost: ")
            client.sendall(b"a.example\r\n\r\n")
            assert client.recv(256).startswith(alias + b" 8080 ")


def test_as_root_it_keeps_two_capabilities(lab: Gateway) -> None:
    """Where there is no user for it (or it is told to stay root); no name that anybody may take keeps it away."""
    lab.configure(CONFIG)
    squat = "import signal, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind(chr(0) + 'steerd')"
    squatter = lab.spawn(lab.host, sys.executable, "-c", f"{squat}; print('there', flush=True); signal.pause()")
    assert squatter.stdout is not None and squatter.stdout.readline() == "there\n"
    lab.start()
    lab.respond(("10.64.0.0", 16, 8080), ("fd00:64::", 16, 8080))
    assert lab.daemon is not None
    for pid in (lab.daemon.pid, *workers(lab)):
        assert capabilities_of(pid) == {ADMIN_AND_RAW}
        assert status_of(pid)["NoNewPrivs"] == "1"
    steers(lab)


def with_account(directory: Path) -> list[str]:
    """To execute what follows on a machine that has a user and a group `steerd`, who can read this checkout even if it
    is in somebody's home directory: all that in a mount namespace."""
    for name, line in (("passwd", f"steerd:x:{UID}:{UID}::/:/bin/false"), ("group", f"steerd:x:{UID}:")):
        (directory / name).write_text(Path("/etc", name).read_text() + line + "\n")
    script = [f"mount --bind {directory}/{name} /etc/{name}" for name in ("passwd", "group")]
    closed = next((path for path in reversed(ROOT.parents) if not path.stat().st_mode & stat.S_IXOTH), None)
    if closed is not None:
        (directory / "checkout").mkdir()
        script += [
            f"mount --bind {ROOT} {directory}/checkout", f"mount -t tmpfs -o mode=755 none {closed}",
            f"mkdir -p {ROOT}", f"mount --bind {directory}/checkout {ROOT}", f"cd {ROOT}",
        ]  # fmt: skip
    return ["unshare", "--mount", "sh", "-ec", "\n".join([*script, 'exec "$@"']), "sh"]


@pytest.mark.parametrize("names", [(), ("lock",)])
def test_no_link_of_others_has_root_give_away_what_is_not_steerds(tmp_path: Path, names: tuple[str, ...]) -> None:
    others, precious = tmp_path / "others", tmp_path / "precious"
    for directory in (others, precious):
        directory.mkdir()
    for name in names:
        (precious / name).touch()
    os.chown(others, UID, UID)
    (others / "state").symlink_to(precious)
    for directory in (others / "state", others / "state" / "run"):
        with pytest.raises(SteerdError, match="is a link that others than root can make or change"):
            privileges._hand_over("state_dir", directory, UID, UID)
    assert all(path.stat().st_uid == 0 for path in (precious, *precious.iterdir()))

    (tmp_path / "linked").symlink_to(precious)
    privileges._hand_over("state_dir", tmp_path / "linked", UID, UID)
    assert all(path.stat().st_uid == UID for path in (precious, *precious.iterdir()))


def test_what_is_in_a_directory_is_given_and_links_in_it_are_not_followed(tmp_path: Path) -> None:
    state, precious = tmp_path / "state", tmp_path / "precious"
    precious.touch()
    (state / "registry").mkdir(parents=True)
    (state / "registry" / "data.mdb").touch()
    (state / "hard").hardlink_to(precious)
    (state / "link").symlink_to(precious)
    privileges._hand_over("state_dir", state, UID, UID)
    given = (state, state / "registry", state / "registry" / "data.mdb")
    assert [path.lstat().st_uid for path in given] == [UID] * 3
    assert [path.lstat().st_uid for path in (precious, state / "link")] == [0, 0]

    (state / "bind-7").symlink_to("0a000001 web 6162")
    os.chown(state / "bind-7", UID, UID, follow_symlinks=False)
    privileges._hand_over("state_dir", state, 0, 0)
    privileges._hand_over("state_dir", state, UID, UID)
    os.chown(state / "link", UID, UID, follow_symlinks=False)
    with pytest.raises(SteerdError, match=f"{state}/link is a link that root would follow"):
        privileges._hand_over("state_dir", state, 0, 0)


def test_as_root_it_becomes_its_user(lab: Gateway) -> None:
    lab.configure(CONFIG)
    lab.config.write_text(lab.config.read_text().replace('user = "root"\n', ""))
    lab.directory.chmod(0o755)
    # A first run as root has left directories that are root's.
    for name in ("state/registry", "run/claims"):
        (lab.directory / name).mkdir(parents=True)
    (lab.directory / "run" / "lock").write_text("1\n")
    through = with_account(lab.directory)
    lab.start(through=through)
    lab.respond(("10.64.0.0", 16, 8080), ("fd00:64::", 16, 8080))
    assert lab.daemon is not None
    for pid in (lab.daemon.pid, *workers(lab)):
        assert capabilities_of(pid) == {ADMIN_AND_RAW}
        assert status_of(pid)["Uid"].split() == status_of(pid)["Gid"].split() == [str(UID)] * 4
        assert status_of(pid)["NoNewPrivs"] == "1"
    for path in (lab.directory / "state", lab.directory / "run", lab.directory / "run" / "lock"):
        assert (path.stat().st_uid, path.stat().st_gid) == (UID, UID)
    socket = (lab.directory / "run" / "api.sock").stat()
    assert (socket.st_uid, socket.st_gid, socket.st_mode & 0o777) == (UID, UID, 0o660)
    steers(lab)

    # It sets back a sysctl, mends its table and reloads: all of that without root.
    lab.expected_warnings = [
        "a sysctl that late steering needs was changed by somebody; it is set back",
        "rules of steerd were removed by somebody; they are back",
    ]
    lab.host.sh("sysctl -qw net.ipv4.tcp_timestamps=0")
    lab.wait(lambda: lab.host.sh("sysctl -n net.ipv4.tcp_timestamps").strip() == "1", "the sysctl is set back")
    lab.host.sh("nft delete table inet steerd")
    lab.wait(lambda: lab.count_events(lab.expected_warnings[1]), "the table is back")
    lab.daemon.send_signal(1)
    lab.wait(lambda: lab.count_events("reloaded"), "it has reloaded")
    steers(lab)

    # What that user plants is not followed by root when it takes everything away.
    lab.stop()
    victim, lock = lab.directory / "victim", lab.directory / "run" / "lock"
    victim.write_text("root's own")
    victim.chmod(0o600)
    registry = lab.directory / "state" / "registry" / "lock.mdb"
    registry.rename(registry.with_suffix(".kept"))
    registry.symlink_to(victim)
    explain = lab.host.command(sys.executable, "-m", "steerd.cli.ctl", "explain", "--config", str(lab.config))
    explain += ["--to", f"{ENDPOINT4}:443"]
    told = subprocess.run(explain, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert victim.read_bytes() == b"root's own"
    assert "alone" in told and "Permission denied" in told
    registry.with_suffix(".kept").rename(registry)
    told = subprocess.run(explain, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert "By the registry" in told
    lock.unlink()
    lock.symlink_to(victim)
    down = lab.host.command(*through, sys.executable, "-m", "steerd", "down", str(lab.config))
    refused = subprocess.run(down, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr) == (1, f"steerd: {lock} cannot be opened: Permission denied\n")
    assert victim.read_text() == "root's own"
    lock.unlink()
    subprocess.run(down, cwd=ROOT, capture_output=True, check=True)
    assert "steerd" not in lab.host.sh("nft list tables; ip -brief link")
