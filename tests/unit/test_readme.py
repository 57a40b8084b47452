"""What the README and the guide say is true: examples, defaults, commands."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from steerd import config
from steerd.cli import ctl, main
from steerd.core.choice import MAX_MEMBERS
from steerd.core.datagrams import MAX_DATAGRAMS
from steerd.core.wake import Limits, Wake
from steerd.errors import SteerdError
from steerd.main import reload
from steerd.main.liveness import LOOK_SECONDS
from steerd.model import TCP, UDP, Choice, Policy, Reason
from steerd.record import FAILURES_PER_SECOND
from steerd.telemetry.counters import MAX_SERIES, OTHER, Extra
from steerd.wire.registry import DATAGRAMS, REGISTRY, DatagramParser, Parser, transports

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "steerd" / "man" / "guide.md"]
TEXT = "".join(document.read_text() for document in DOCUMENTS)
TABLE = (ROOT / "nft" / "steerd.nft").read_text()


def test_the_examples_are_configurations_without_a_mistake() -> None:
    beginners, first, datagrams, relayed = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (service,) = config.parse(beginners, "README.md").services
    assert service.inspect == ("tls", "http")
    assert len([line for line in beginners.splitlines() if line.strip()]) <= 15
    (service,) = config.parse(first, "README.md").services
    assert service.name == "web"
    assert len([line for line in first.splitlines() if line.strip()]) <= 11
    names, web = config.parse(datagrams, "README.md").services
    assert (names.decides_every_datagram, web.decides_every_datagram) == (True, False)
    assert [service.protocols for service in (names, web)] == [{TCP, UDP}] * 2
    assert config.parse(relayed, "README.md").relayed.keys() == {
        "unix:/run/a.sock",
        "unix:/run/b.sock\0v2",
        "unix-fd:/run/c.sock",
    }
    assert web.idle_timeout == config.parse(datagrams.replace("idle_timeout = ", "# "), "").services[1].idle_timeout


def test_the_example_of_several_targets() -> None:
    section = TEXT.split("**Several targets.**")[1].split("\n**")[0]
    route = "\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE))
    text = f"""
        [pools.p]
        prefixes = ["10.64.0.0/24"]
        [services.web]
        endpoints = ["203.0.113.10:80/tcp"]
        inspect = ["http"]
        {route}"""
    (service,) = config.parse(text, "README.md").services
    assert service.routes[0].choice == Choice("hash", "http.cookie.sid")
    assert f"up to {MAX_MEMBERS} of each family" in TEXT
    assert set(get_args(Policy)) <= set(re.findall("`([a-z-]+)`", section))
    assert LOOK_SECONDS <= 1 / 3


def test_the_example_of_daemons_that_sleep() -> None:
    section = TEXT.split("## Daemons that sleep\n")[1].split("\n## ")[0]
    found = config.parse("\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE)), "README.md")
    (pool,) = found.pools.values()
    assert found.waking == config.parse("", "").waking == Limits()
    assert pool.wake == Wake("tenant@{lease}.service", (), "", 10.0, 600.0)


def test_a_server_that_speaks_first() -> None:
    text = 'endpoints = ["203.0.113.10:25/tcp"]\non_silence = "10.64.0.1:25"\ndefault = "10.64.0.1:25"'
    (written,) = re.findall(r"write `(inspect = .*?)` and `on_silence`", TEXT)
    pool = '[pools.p]\nprefixes = ["10.64.0.0/24"]\n[services.mail]\n'
    (service,) = config.parse(f"{pool}{written}\n{text}", "").services
    assert service.is_late
    assert f"at\nmost {config.Pending().source_connections} in each" in TEXT


def test_what_a_reload_cannot_change() -> None:
    """Each of them is a key, and the daemon refuses to change it."""
    (sentence,) = re.findall(r"A reload cannot change (.*?):", TEXT, re.DOTALL)
    names = {name.replace("mark_bits", "mark") for name in re.findall(r"`([\w.]+)`", sentence)}
    assert names == set(reload.FIXED)
    for key in names - {"mark"}:
        attrgetter(key)(config.parse("", "").gateway)
    with pytest.raises(SteerdError, match=r"^new: gateway\.mark_bits changed, which needs a restart of the daemon\.$"):
        reload.check_change(config.parse("", ""), config.parse('[gateway]\nmark_bits = "0-23"', "new"))


def test_metrics_and_logs() -> None:
    assert f"At most {MAX_SERIES} pairs of a service" in TEXT
    assert f"the rest as `{OTHER}`" in TEXT
    assert f"in each worker {FAILURES_PER_SECOND} a\nsecond" in TEXT
    (directory,) = re.findall(r"In `(steerd/telemetry/\w+)` are", TEXT)
    assert {path.name for path in (ROOT / directory).iterdir()} == {"alerts.yml", "dashboard.json"}


def test_the_numbers_of_datagrams() -> None:
    assert f"at most {MAX_DATAGRAMS}, held" in TEXT
    assert f"`too_long` ({MAX_DATAGRAMS} datagrams" in TEXT
    (learned,) = re.findall(r"map learned \{(.*?)\}", TABLE, re.DOTALL)
    (size,) = re.findall(r"size (\d+)", learned)
    assert f"for an hour, at most {int(size):,} of them" in " ".join(TEXT.split())
    assert "timeout 1h" in learned


def test_reasons_and_counters_are_those_of_the_program() -> None:
    words = {word.name.lower() for kind in (Reason, Extra) for word in kind}
    words |= set(re.findall(r"counter (\w+) \{ comment", TABLE))
    (section,) = re.findall(r"^What to look at: (.*?)\n\n", TEXT, re.DOTALL | re.MULTILINE)
    named = re.findall(r"`(\w+)`", section)
    assert len(named) == 7
    assert set(named) <= words
    assert "unknown_connection" in words


def test_the_commands_exist() -> None:
    commands = set(re.findall(r"^    (steerd|steerctl) (\w+) ", TEXT, re.MULTILINE))
    assert commands
    for program, command in commands:
        app = main.app if program == "steerd" else ctl.app
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_every_parser_and_every_key_of_it_is_listed() -> None:
    parsers: list[Parser | DatagramParser] = [*REGISTRY.values(), *DATAGRAMS.values()]
    for parser in parsers:
        (row,) = (line for line in TEXT.splitlines() if re.match(rf"\| (`\w+`, )?`{parser.name}`", line))
        protocols = transports(parser.name)
        assert ("UDP" in row) == (UDP in protocols)
        assert TCP in protocols or "TCP" not in row
        for key in parser.keys:
            assert key == parser.name or f"`{key.replace('.*', '.NAME')}`" in TEXT


def test_every_link_leads_to_a_file() -> None:
    for document in DOCUMENTS:
        links = re.findall(r"\]\(([^)]+)\)", document.read_text())
        assert links
        for link in links:
            assert (document.parent / link).is_file(), f"{document.name}: {link}"
