"""The two commands: exit statuses, and that what goes wrong is a sentence on standard error."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from steerd import config as configuration
from steerd import daemon, privileges
from steerd.cli import ctl, main, probe
from steerd.cli.ctl.show import HEIGHT, WIDTH
from steerd.client import NotPermittedError
from steerd.control.api.context import ConntrackUse, Machinery, WorkerStatus
from steerd.control.registry import Registry
from steerd.kernel import aliases, ruleset
from steerd.kernel.nftables import Nftables
from steerd.model import Reason, Target
from steerd.telemetry.counters import Counters, Extra, Gauge
from tests.unit.test_api import Bare, serving

GOOD = """
[gateway]
run_dir = "{directory}/run"
state_dir = "{directory}/state"
workers = 2
[pools.p]
prefixes = ["10.64.0.0/30"]
[services.s]
endpoints = ["203.0.113.10:443/tcp"]
default = "10.64.0.1:80"
"""
BAD = GOOD.replace("workers = 2", "wrokers = 2").replace("10.64.0.1:80", "10.65.0.1:80")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command's console script: (exit status, standard output, standard error)."""

    def command(script: Callable[[], None], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        status = 0
        try:
            script()
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int)
            status = end.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


@pytest.fixture
def good(tmp_path: Path) -> str:
    return written(tmp_path, GOOD)


@pytest.fixture
def bad(tmp_path: Path) -> str:
    return written(tmp_path, BAD)


def written(directory: Path, text: str) -> str:
    file = directory / "steerd.toml"
    file.write_text(text.format(directory=directory))
    return str(file)


def mistakes(file: str) -> str:
    return (
        f'{file}: gateway.wrokers: Is not a known key; did you mean "workers"?\n'
        f"{file}: services.s.default: 10.65.0.1 is in no pool (p: 10.64.0.0/30); use an alias, or write"
        ' { address = "10.65.0.1:80", external = true }.\n'
    )


# ---- steerd ----


def test_check_says_ok(run: Run, good: str) -> None:
    assert run(main.main, "check", good) == (0, "ok\n", "")


def test_check_says_one_line_for_every_mistake(run: Run, bad: str) -> None:
    assert run(main.main, "check", bad) == (2, "", mistakes(bad))


def test_check_as_a_process_of_its_own(good: str, bad: str) -> None:
    """The module that the console script runs, with exit statuses as a shell sees them."""
    for file, expected in ((good, (0, "ok\n", "")), (bad, (2, "", mistakes(bad)))):
        command = [sys.executable, "-m", "steerd.cli.main", "check", file]
        Path(file).write_text((GOOD if expected[0] == 0 else BAD).format(directory=Path(file).parent))
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert (done.returncode, done.stdout, done.stderr) == expected


@pytest.mark.parametrize("command", ["check", "run", "down"])
def test_a_file_that_is_not_there(run: Run, tmp_path: Path, command: str) -> None:
    file = tmp_path / "none.toml"
    assert run(main.main, command, str(file)) == (2, "", f"{file}: file: Cannot be read: No such file or directory.\n")


def test_a_directory_and_what_is_no_toml(run: Run, tmp_path: Path) -> None:
    assert run(main.main, "check", str(tmp_path)) == (2, "", f"{tmp_path}: file: Cannot be read: Is a directory.\n")
    file = written(tmp_path, "[gateway\n")
    status, out, err = run(main.main, "check", file)
    assert (status, out) == (2, "")
    assert err.startswith(f"{file}: line 1: Is not TOML: ")
    assert err.count("\n") == 1


@pytest.fixture
def harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would change the machine fails the test instead."""

    def touched(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the machine was about to be changed")

    monkeypatch.setattr(daemon, "Registry", touched)
    monkeypatch.setattr(privileges, "settle", lambda _config: privileges.Standing("root", (), ""))
    for module, name in ((ruleset, "load"), (ruleset, "remove"), (aliases, "reconcile"), (aliases, "remove_all")):
        monkeypatch.setattr(module, name, touched)


@pytest.mark.usefixtures("harmless")
@pytest.mark.parametrize("command", ["run", "down"])
def test_nothing_is_done_by_a_bad_configuration(run: Run, bad: str, command: str) -> None:
    assert run(main.main, command, bad) == (2, "", mistakes(bad))
    assert list(Path(bad).parent.iterdir()) == [Path(bad)]


@pytest.mark.usefixtures("harmless")
@pytest.mark.parametrize("command", ["run", "down"])
def test_a_run_directory_that_cannot_be_made_is_a_sentence(run: Run, good: str, command: str) -> None:
    run_dir = Path(good).parent / "run"
    run_dir.write_text("in the way")
    assert run(main.main, command, good) == (1, "", f"steerd: {run_dir}/lock cannot be opened: File exists\n")


@pytest.mark.usefixtures("harmless")
def test_down_beside_a_daemon_names_its_process(run: Run, good: str) -> None:
    held = Path(good).parent / "run" / "lock"
    held.parent.mkdir()
    with held.open("w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(main.main, "down", good) == (1, "", "steerd: steerd runs (process 4711); stop it first\n")
        said = run(main.main, "run", good)[2]
    assert said == f"steerd: steerd runs already, as process 4711 (it holds {held})\n"


@pytest.mark.usefixtures("harmless")
def test_down_as_somebody_else_than_root(run: Run, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(privileges, "lacking", lambda _config: "much")
    assert run(main.main, "down", good) == (
        1,
        "",
        "steerd: steerd down must run as root: it removes the nft table and the aliases.\n",
    )


@pytest.mark.parametrize("arguments", [("frob",), ("check", "a", "b"), ("check", "--frob")])
def test_wrong_usage(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(main.main, *arguments)
    assert (status, out) == (2, "")
    assert "Usage: " in err


def test_without_a_command_there_is_help(run: Run) -> None:
    for script, words in ((main.main, ("run", "check", "down")), (ctl.main, ("status", "probe"))):
        _, out, err = run(script)
        for word in words:
            assert word in out + err
    assert "Looks at a running steerd, and changes what it does." in run(ctl.main, "--help")[1]
    assert "3: The daemon does not answer" in run(ctl.main, "--help")[1]
    assert "Leases: which name has which alias of a pool." in run(ctl.main, "lease", "--help")[1]


@pytest.mark.parametrize("noun", ["flows", "log"])
def test_a_noun_that_stands_alone_asks_the_daemon(
    run: Run, good: str, noun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERD_CONFIG", good)
    status, out, err = run(ctl.main, noun)
    assert (status, out) == (3, "")
    assert err.startswith("steerctl: nobody answers at ")


def test_the_version(run: Run) -> None:
    with (Path(__file__).resolve().parents[2] / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert run(main.main, "--version") == (0, f"steerd {version}\n", "")


# ---- steerctl ----


def test_status_without_a_daemon(run: Run, good: str) -> None:
    counters = Path(good).parent / "run" / "counters"
    assert run(ctl.main, "status", good) == (3, "", f"steerctl: {counters} does not exist: is steerd running?\n")


def test_status_with_a_bad_configuration(run: Run, bad: str) -> None:
    assert run(ctl.main, "status", bad) == (2, "", mistakes(bad))


def test_status_of_a_daemon_that_is_down_shows_what_was_counted_and_that_nobody_serves_the_queues(
    run: Run, good: str
) -> None:
    (Path(good).parent / "run").mkdir()
    counters = Counters.create(Path(good).parent / "run" / "counters", 2)
    for slot in range(2):
        counters.slot(slot)[Reason.ROUTE] = 1000
    status, out, err = run(ctl.main, "status", "--all", good)
    assert (status, err) == (3, "")
    assert out.startswith(f"Nobody answers at {good[: -len('steerd.toml')]}run/api.sock: is steerd running?")
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert ["route", "2,000"] in lines
    assert ["malformed_extension", "0"] in lines
    assert [line[0] for line in lines if line[1].startswith("nobody")] == ["21300", "21301"]
    _, short, _ = run(ctl.main, "status", "--config", good)
    assert re.search(r"^  route +2,000$", short, re.MULTILINE)
    assert "0 of 2 bound" in short
    status, out, err = run(ctl.main, "status", "--json", good)
    assert (status, err) == (3, "")
    found = json.loads(out)
    assert (found["running"], found["file"], found["holds"]) == (False, good, None)
    assert found["machine"]["decisions"]["route"] == 2000


def test_the_legend_has_a_line_for_every_counter_and_nothing_is_cut_in_a_pipe(
    run: Run, good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_table = re.findall(r"^\tcounter (\w+) ", ruleset.template_path().read_text(), re.MULTILINE)
    monkeypatch.setattr(Nftables, "counters", lambda _self: dict.fromkeys(in_table, 7))
    (Path(good).parent / "run").mkdir()
    counters = Counters.create(Path(good).parent / "run" / "counters", 2)
    for reason in Reason:
        counters.slot(0)[reason] = 5
    _, plain, _ = run(ctl.main, "status", "--all", good)
    assert "meaning" not in plain
    _, out, _ = run(ctl.main, "status", good, "--legend")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    meanings = {row[0]: row[2] for row in rows if len(row) == 3}
    named = {each.name.lower() for kind in (Reason, Extra, Gauge) for each in kind} | set(in_table)
    assert meanings.keys() == named
    assert all(len(meaning) > 10 for meaning in meanings.values())
    assert meanings["route"] == "A route matched."
    assert meanings["not_sent"].startswith("Packets of a worker's own")
    assert meanings["not_sent"].endswith("(then the log has the first).")
    assert meanings["direct"] == "dropped: sent from outside straight to an alias"


class Busy(Bare):
    """A machine on which everything was counted, and often."""

    def status(self) -> Machinery:
        counters = {f"a_long_counter_no_{index}": 10**10 + index for index in range(40)}
        workers = [WorkerStatus(index, 21300 + index, index > 0, 4711, 10**6, 10**9, 10**9) for index in range(64)]
        why = "a file with many mistakes " * 100
        return Machinery(
            "0.1.0", 4194304, 1.5, why, workers, counters, counters, counters, counters, ConntrackUse(10**7, 10**7)
        )

    def listening(self, targets: Sequence[Target]) -> list[list[int]]:
        return [[] for _ in targets]


@pytest.mark.parametrize("machine", [Bare(), Busy()], ids=["idle", "busy"])
def test_status_of_a_daemon_that_answers_fits_one_screen(run: Run, good: str, machine: Bare) -> None:
    directory = Path(good).parent / "run"
    directory.mkdir()
    registry = Registry(str(Path(good).parent / "state"))
    registry.publish(configuration.load(good))
    with serving(registry, directory, machine=machine):
        status, out, err = run(ctl.main, "status", good)
        _, whole, _ = run(ctl.main, "status", good, "--all")
        _, as_json, _ = run(ctl.main, "status", good, "--json")
    registry.close()
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) < HEIGHT
    assert max(map(len, lines)) <= WIDTH
    found = json.loads(as_json)
    assert found["running"] is True
    assert found["holds"]["services"] == 1
    assert "1 services, 1 endpoints, 4 aliases, 0 routes, 0 leases, 0 in quarantine" in " ".join(out.split())
    counted = machine.status()
    assert ("targets        1, nobody listens on 1 (steerctl targets)" in lines) == isinstance(machine, Busy)
    assert ("targets        1" in lines) != isinstance(machine, Busy)
    if isinstance(machine, Busy):
        assert "REFUSED: a file with many mistakes" in out
        assert "63 of 64 bound (THE PACKETS OF THE OTHERS ARE DROPPED)" in out
        # What is not shown is summed.
        (total,) = re.findall(r"^decisions: ([0-9,]+)", out, re.MULTILINE)
        start = lines.index("") + 2
        shown = [line[:40].split()[-1] for line in lines[start : lines.index("", start)]]
        sums = [int(text.replace(",", "")) for text in shown]
        assert sum(sums) == int(total.replace(",", "")) == sum(counted.decisions.values())
        assert len(sums) > 4
    assert all(name in whole for name in counted.counters)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("h", "0"), 2, "Invalid value for 'port'"),
        (("h", "x"), 2, "Invalid value for 'port'"),
        (("h",), 2, "Missing"),
        (("h", "70000", "--via", "udp"), 2, "Invalid value for '--via'"),
        (("h", "443"), 1, "steerctl: A probe needs an extension: give an extended port (70000), or an extension of 1"),
        (("h", "131072"), 1, "steerctl: The extended port 131072 is extension 2 of port 0, and port 0 is never used;"),
        (("h", "4294967296"), 1, "steerctl: An extended port must be between 1 and 4294967295, not 4294967296."),
        (("h", "70000", "--extension", "7"), 1, "steerctl: The port 70000 already says extension 1;"),
        (("h", "443", "--extension", "65536"), 1, "steerctl: extension must be between 0 and 65535, not 65536."),
        (
            ("h", "443", "--source-extension", "-1"),
            1,
            "steerctl: source_extension must be between 0 and 65535, not -1.",
        ),
    ],
)
def test_what_cannot_be_probed_is_said_before_anything_is_sent(
    run: Run, arguments: tuple[str, ...], status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_socket(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a socket was opened, or a name looked up")

    monkeypatch.setattr(socket, "getaddrinfo", no_socket)
    monkeypatch.setattr(probe, "_Prober", no_socket)
    found, out, err = run(ctl.main, "probe", *arguments)
    assert (found, out) == (status, "")
    assert said in err


def test_a_name_that_nobody_knows_is_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: object, **_kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    expected = "steerctl: nowhere.example cannot be probed: Name or service not known.\n"
    assert run(ctl.main, "probe", "nowhere.example", "70000") == (1, "", expected)


def test_a_probe_without_the_right_to_send_is_the_clients_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_args: object, **_kwargs: object) -> None:
        raise NotPermittedError("needs CAP_NET_RAW")

    monkeypatch.setattr(probe, "_Prober", forbidden)
    status, _, err = run(ctl.main, "probe", "192.0.2.1", "70000")
    assert (status, err) == (4, "steerctl: needs CAP_NET_RAW\n")


@pytest.mark.parametrize("answer", [0, 1])
def test_the_exit_status_of_probe_is_what_came_back(run: Run, monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    asked: list[object] = []

    def probed(host: str, port: int, **options: object) -> int:
        options.pop("out")
        asked.extend((host, port, options))
        return answer

    monkeypatch.setattr(probe, "probe", probed)
    arguments = ("h", "443", "--extension", "7", "--source-extension", "9", "--via", "tcp", "--max-hops", "3")
    assert run(ctl.main, "probe", *arguments, "--timeout", "0.5") == (answer, "", "")
    options = {"extension": 7, "source_extension": 9, "via": "tcp", "max_hops": 3, "timeout": 0.5}
    assert asked == ["h", 443, options]
