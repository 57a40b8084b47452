"""nft/install.sh: looks without touching, loads again without losing anything, and leaves no trace.

gateway: a firewall of its own (table inet other, a chain of iptables-nft's mangle table), nothing else
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from steerd import config
from steerd.config import Config
from steerd.kernel import ruleset
from steerd.kernel.handshake import Handshake
from steerd.main.table import contents_of, settings_of
from tests.netns.lab import Host, link

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "nft" / "install.sh"
MEASURED = Handshake(mss4=1460, mss6=1440, window_scale=7)
"""The defaults of the template, whatever this machine would say."""
EARLY_TEXT = """
    [gateway]
    workers = 1
    [pools.p]
    prefixes = ["10.64.0.0/24", "fd00:64::/120"]
    [pools.q]
    prefixes = ["10.65.0.0/24"]
    [services.s]
    endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:1-65535/tcp"]
    inspect = ["port-extension"]
    unextended = "default"
    default = { address = "10.64.0.1:80", wildcard = true }
    extension_pool = { pool = "p", by = "extension", wildcard = true }
    [services.t]
    endpoints = ["203.0.113.10:444/tcp"]
    inspect = ["port-extension"]
    default = { address = "10.65.0.1:same", wildcard = true }
    extension_pool = { pool = "q", by = "extension", port = 80, wildcard = true }
    [services.u]
    endpoints = ["203.0.113.10:445/tcp"]
    inspect = ["port-extension"]
    extension_pool = { pool = "p", by = "extension", port = 90, wildcard = true }
    """
EARLY = config.parse(EARLY_TEXT, "steerd.toml")
# No base chain is left out.
CONFIG = config.parse(
    EARLY_TEXT
    + """
    [services.w]
    endpoints = ["203.0.113.10:446/tcp"]
    inspect = ["tls"]
    default = { address = "192.0.2.9:same", external = true }
    [services.x]
    endpoints = ["203.0.113.10:53/udp"]
    inspect = ["dns"]
    default = { address = "192.0.2.9:same", external = true }
    """,
    "steerd.toml",
)
TABLES = ("iptables-nft", "ip6tables-nft")


@pytest.fixture
def new_gateway(new_host: Callable[[str], Host]) -> Callable[[], Host]:
    """Hosts with rules of somebody else."""

    def make() -> Host:
        made = new_host("gateway")
        made.sh(
            "nft 'table inet other { chain input { type filter hook input priority 0; tcp dport 22 accept; }; }'\n"
            + "".join(f"{tool} -t mangle -N THEIRS; {tool} -t mangle -A PREROUTING -j THEIRS\n" for tool in TABLES)
        )
        return made

    return make


@pytest.fixture
def host(new_gateway: Callable[[], Host]) -> Host:
    return new_gateway()


def install(host: Host, *arguments: str) -> str:
    """Standard output of the script; fails the test unless it succeeds and is silent otherwise."""
    status, out, err = tried(host, *arguments)
    assert (status, err) == (0, ""), (status, out, err)
    return out


def tried(host: Host, *arguments: str) -> tuple[int, str, str]:
    # Sysctls have a file of their own, test_sysctls.py. Here they would only put old values into the machine's /run.
    command = host.command(str(INSTALL), "--no-sysctl", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    return done.returncode, done.stdout, done.stderr


def rules(host: Host) -> str:
    """All rules of the host, without what traffic changes."""
    return without_counts(host.sh("nft list ruleset"))


def table(host: Host) -> str:
    return without_counts(host.sh("nft list table inet steerd"))


def without_counts(listed: str) -> str:
    return re.sub(r"packets \d+ bytes \d+", "packets N bytes N", listed)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("way", ["--fallback", None])
@pytest.mark.parametrize("action", ["--check", "--print", "--help"])
def test_looking_changes_nothing(host: Host, action: str, way: str | None, installed: bool) -> None:
    if installed:
        install(host)
    before = rules(host)
    said = install(host, action, *([way] if way else []), "--queues", "3", "--mark-bits", "4-27")
    assert rules(host) == before
    expected = {"--check": "ok: the kernel takes the table", "--print": "table inet steerd {", "--help": "usage: "}
    assert expected[action] in said


def test_check_fails_where_the_kernel_would(host: Host, tmp_path: Path) -> None:
    copy = tmp_path / "install.sh"
    copy.write_text(INSTALL.read_text())
    copy.chmod(0o755)
    template = (INSTALL.parent / "steerd.nft").read_text()
    (tmp_path / "steerd.nft").write_text(template.replace("\tchain steer {", "\tchain steer { frobnicate;", 1))
    before = rules(host)
    for action in (["--check"], ["--run-dir", str(tmp_path / "run")]):
        done = subprocess.run(
            host.command(str(copy), *action), capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 1
        assert "frobnicate" in done.stderr
        assert done.stdout == ""
        assert rules(host) == before
    assert not (tmp_path / "run").exists(), "nor are sysctls changed"


def test_what_is_printed_is_what_is_loaded(host: Host) -> None:
    text = install(host, "--print", "--queues", "2")
    install(host, "--queues", "2")
    loaded = table(host)
    host.sh("nft delete table inet steerd")
    host.sh(f"nft -f - <<'END'\n{text}END")
    assert table(host) == loaded


@pytest.mark.parametrize("bits", ["8-31", "0-31", "4-27"])
@pytest.mark.parametrize("queues", ["1", "4"])
def test_loading_twice_is_loading_once(host: Host, bits: str, queues: str) -> None:
    options = ("--mark-bits", bits, "--queues", queues)
    install(host, *options)
    once = rules(host)
    install(host, *options)
    assert rules(host) == once


def test_every_chain_says_what_it_is_for(host: Host) -> None:
    install(host)
    chains = re.findall(r"^\tchain (\w+) \{\n(.*?)^\t\}", table(host), re.MULTILINE | re.DOTALL)
    assert {"admit", "divert", "steer", "guard", "arrive"} <= {name for name, _ in chains}
    for name, text in chains:
        assert re.search(r'^\t\tcomment "[^"]{10,}"$', text, re.MULTILINE), name


def test_loading_again_keeps_elements_counters_and_the_operators_rules(host: Host) -> None:
    install(host)
    host.sh(
        "nft add element inet steerd early4 '{ 203.0.113.10 . 443 }'\n"
        "nft add element inet steerd targets4 '{ 0x1000 : 10.64.0.1 . 80 }'\n"
        "nft add element inet steerd translated4 '{ 0x1000 . 10.64.0.1 . 80 }'\n"
        "nft add rule inet steerd admit ip saddr 192.0.2.0/24 drop\n"
        "nft add rule inet steerd divert ip saddr 192.0.2.1 drop\n"
    )
    counters = host.sh("nft list counters table inet steerd")
    install(host, "--queues", "2", "--set", "SOURCE_RATE=77")
    kept = table(host)
    for element in ("203.0.113.10 . 443", "0x00001000 : 10.64.0.1 . 80", "0x00001000 . 10.64.0.1 . 80"):
        assert element in kept.replace(" http", " 80").replace(" https", " 443")
    assert "ip saddr 192.0.2.0/24 drop" in kept
    assert "192.0.2.1" not in kept, "rules in chains of ours are replaced"
    assert "limit rate over 77/second" in kept
    assert host.sh("nft list counters table inet steerd") == counters


def test_a_counter_keeps_what_it_has_counted(host: Host, new_host: Callable[[str], Host]) -> None:
    """client 192.0.2.2 ---- veth ---- 192.0.2.1 gateway: datagrams straight to an alias, which the guard counts"""
    client = new_host("client")
    link(client, "eth0", host, "eth0")
    client.sh("ip addr add 192.0.2.2/24 dev eth0; ip route add default via 192.0.2.1")
    host.sh("ip addr add 192.0.2.1/24 dev eth0")
    install(host)
    host.sh("nft add element inet steerd aliases4 '{ 10.64.0.0/24 }'")
    client.sh("for _ in 1 2 3; do echo > /dev/udp/10.64.0.1/9; done")
    counted = host.sh("nft list counter inet steerd direct")
    assert "packets 3 " in counted
    install(host)
    assert host.sh("nft list counter inet steerd direct") == counted


@pytest.mark.parametrize("way", ["--fallback", None])
def test_uninstall_removes_all_that_is_ours_and_nothing_else(host: Host, way: str | None) -> None:
    before = rules(host)
    install(host, *([way] if way else []), "--queues", "3")
    assert "table inet steerd" in rules(host)
    assert ("jump worker2" in rules(host)) is (way == "--fallback" or not native())
    assert install(host, "--uninstall") == "table inet steerd is gone\n"
    assert rules(host) == before
    for tool in TABLES:
        assert "-A PREROUTING -j THEIRS" in host.sh(f"{tool} -t mangle -S")
    install(host, "--uninstall")
    assert rules(host) == before


def test_uninstall_on_a_host_without_other_rules(new_host: Callable[[str], Host]) -> None:
    bare = new_host("bare")
    install(bare, "--uninstall")
    assert rules(bare) == ""
    install(bare)
    install(bare, "--uninstall")
    assert "steerd" not in rules(bare).lower()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--frob",), "unknown argument: --frob"),
        (("install",), "unknown argument: install"),
        (("--queues",), "--queues needs a value"),
        (("--set",), "--set needs a value"),
        (("--run-dir",), "--run-dir needs a value"),
        (("--run-dir", "run"), "--run-dir must be an absolute path, not 'run'"),
        (("--queues", "0"), "--queues must be 1 to 64, not 0"),
        (("--queues", "65"), "--queues must be 1 to 64, not 65"),
        (("--queues", "two"), "--queues must be a whole number, not 'two'"),
        (("--queues", ""), "--queues must be a whole number, not ''"),
        (("--queues", "010"), "--queues must be a whole number, not '010'"),
        (("--queues", "99999999999"), "--queues must be a whole number, not '99999999999'"),
        (("--first-queue", "65536"), "--first-queue must be 0 to 65535, not 65536"),
        (("--first-queue", "65535", "--queues", "2"), "--first-queue must be 0 to 65534, not 65535"),
        (("--mark-bits", "8"), "--mark-bits must be at least 20 bits wide, not 1"),
        (("--mark-bits", "13-31"), "--mark-bits must be at least 20 bits wide, not 19"),
        (("--mark-bits", "8-32"), "--mark-bits (high end) must be 8 to 31, not 32"),
        (("--mark-bits", "a-31"), "--mark-bits (low end) must be a whole number, not 'a'"),
        (("--mark-bits", "1-2-31"), "--mark-bits (low end) must be a whole number, not '1-2'"),
        (("--set", "SOURCE_RATE"), "SOURCE_RATE must be a whole number, not 'SOURCE_RATE'"),
        (("--set", "SOURCE_RATE=0"), "SOURCE_RATE must be 1 to 4294967295, not 0"),
        (("--set", "SOURCE_RATE=4294967296"), "SOURCE_RATE must be 1 to 4294967295, not 4294967296"),
        (("--set", "SOURCE_RATE=1;"), "SOURCE_RATE must be a whole number, not '1;'"),
        (("--set", "MASK=1"), "steerd.nft has no number called MASK"),
        (("--set", "QUEUE4=1"), "steerd.nft has no number called QUEUE4"),
        (("--set", ".*=1"), "steerd.nft has no number called .*"),
        (("--set", "=1"), "steerd.nft has no number called "),
    ],
)  # fmt: skip
def test_bad_arguments_are_a_sentence(arguments: tuple[str, ...], said: str) -> None:
    done = subprocess.run(
        [str(INSTALL), "--print", *arguments], capture_output=True, text=True, check=False, timeout=240
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"install.sh: {said}"


# ---- shell and Python in turn ----


native = ruleset.has_native_queue


def load(host: Host, config: Config = CONFIG) -> None:
    """Load the table as the daemon does, but for the timeouts of flows, which the script knows nothing of."""
    contents = contents_of(config)._replace(idle=())
    with host.entered():
        ruleset.load(settings_of(config, MEASURED), contents, native=native(), empty_targets=True)


def chains(host: Host) -> list[str]:
    """The rules of all chains. Those that only the daemon makes are left out."""
    listed = re.sub(r"^\t\t(ct original zone set |queue num ).*\n", "", rules(host), flags=re.MULTILINE)
    return sorted(re.findall(r"^\tchain .*?^\t\}", listed, re.MULTILINE | re.DOTALL))


def test_python_and_shell_load_the_same_in_either_order(new_gateway: Callable[[], Host]) -> None:
    shell_first, python_first = new_gateway(), new_gateway()
    install(shell_first)
    by_shell = chains(shell_first)
    load(shell_first)
    assert chains(shell_first) == by_shell

    load(python_first)
    by_python = rules(python_first)
    install(python_first)
    assert rules(python_first) == by_python, "the script keeps what the daemon has put into the sets"
    assert chains(python_first) == by_shell


def hooks(host: Host) -> set[str]:
    return set(re.findall(r"^\tchain (\w+) \{\n(?:\t\tcomment .*\n)?\t\ttype ", table(host), re.MULTILINE))


def test_the_daemon_takes_away_the_hooks_that_its_configuration_has_no_use_for(host: Host) -> None:
    load(host, EARLY)
    early = hooks(host)
    assert {"divert", "steer", "guard", "arrive", "verify", "leave"} <= early
    with host.entered():
        loaded = ruleset.load(settings_of(EARLY, MEASURED), contents_of(EARLY), native=native(), empty_targets=False)
        loaded = ruleset.change(loaded, settings_of(CONFIG, MEASURED), contents_of(CONFIG), native=native())
        everything = hooks(host)
        install(host)
        assert hooks(host) == everything == early | ruleset.needless(contents_of(EARLY))
        # While it runs, all stay; and those that conceal resets, as long as late connections may live.
        ruleset.change(loaded, settings_of(EARLY, MEASURED), contents_of(EARLY), native=native())
        assert hooks(host) == everything
        load(host, EARLY)
        assert hooks(host) == early | {"conceal", "reveal"}


def test_fewer_queues_leave_no_rule_for_the_others(host: Host) -> None:
    install(host, "--queues", "4")
    load(host)  # one worker
    after = rules(host)
    install(host, "--queues", "1")
    assert rules(host) == after
    assert "jump worker1" not in after
    assert after.count("queue num 2130") == (0 if native() else 1)


def test_python_removes_what_the_script_has_loaded(host: Host) -> None:
    before = rules(host)
    install(host, "--fallback", "--queues", "2")
    with host.entered():
        ruleset.remove()
        assert rules(host) == before
        ruleset.remove()
    assert rules(host) == before


def test_sets_hold_what_the_configuration_says(host: Host) -> None:
    """Pools and targets whose wildcard ports overlap, too: the kernel would refuse the whole load."""
    for _ in range(2):
        load(host)
    listed = host.sh("nft -n list set inet steerd wildcard4")
    listed = " ".join(listed.partition("elements = {")[2].split())
    assert sorted(listed.replace("}", "").strip(" ").split(", ")) == [
        "10.64.0.0/24 . 0-65535",
        "10.65.0.0/24 . 80",
        "10.65.0.1 . 0-79",
        "10.65.0.1 . 81-65535",
    ]
    assert "203.0.113.10 . 443" in host.sh("nft -n list set inet steerd early4")
    assert "2001:db8::10 . 1-65535" in host.sh("nft -n list set inet steerd early6")
