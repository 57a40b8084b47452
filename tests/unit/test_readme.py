"""What the README says is true: its example is a configuration, its defaults are the program's, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steerd import config
from steerd.cli import ctl, main
from steerd.wire.registry import REGISTRY

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_example_is_a_configuration_without_a_mistake() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (service,) = config.parse(example, "README.md").services
    assert service.name == "web"
    assert len([line for line in example.splitlines() if line.strip()]) <= 11


@pytest.mark.parametrize("key", ["syn_sent", "syn_recv", "time_wait", "close"])
def test_the_timeouts_are_the_defaults(key: str) -> None:
    timeouts = config.parse("", "empty").gateway.timeouts
    row = f"{timeouts.syn_sent}, {timeouts.syn_recv}, {timeouts.time_wait}, {timeouts.close} s"
    (line,) = (line for line in README.splitlines() if line.startswith("| `timeouts."))
    assert key in line
    assert row in line


def test_other_defaults() -> None:
    gateway = config.parse("", "empty").gateway
    limits = gateway.limits
    for text in (
        f"| `first_queue` | {gateway.first_queue} |",
        f'| `mark_bits` | `"{gateway.mark.low}-{gateway.mark.high}"` |',
        f"| {gateway.queue_length} packets, {gateway.receive_buffer >> 20} MiB |",
        f"| `limits.source_rate`, `_burst` | {limits.source_rate}/s, {limits.source_burst} |",
        f"| `limits.stranger_rate`, `_burst` | {limits.stranger_rate}/s, {limits.stranger_burst} |",
        f"| `limits.total_rate`, `_burst` | {limits.total_rate}/s, {limits.total_burst} |",
        f"| `state_dir`, `run_dir` | `{gateway.state_dir}`, `{gateway.run_dir}` |",
    ):
        assert text in README


def test_the_commands_exist() -> None:
    commands = set(re.findall(r"^    (steerd|steerctl) (\w+) ", README, re.MULTILINE))
    assert commands
    for program, command in commands:
        app = main.app if program == "steerd" else ctl.app
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_every_parser_and_every_key_of_it_is_listed() -> None:
    for parser in REGISTRY.values():
        assert f"`{parser.name}`" in README
        for key in parser.keys:
            assert key == parser.name or f"`{key.replace('.*', '.NAME')}`" in README
