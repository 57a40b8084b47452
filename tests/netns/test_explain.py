"""`steerctl explain` beside a running daemon: what it says is what happened.

Topology: tests/netns/gateway.py (one client, one gateway, endpoints 203.0.113.10 and 2001:db8::10).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from steerd.model import Extension
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.test_late import POOL, SERVICE, ask


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.configure(POOL + SERVICE, "access_log = 1")
        made.start()
        made.respond(("10.64.0.1", 8, 8080), ("fd00:64::1", 8, 8080))
        yield made


def command(lab: Gateway, *arguments: str) -> list[str]:
    """Runs on the gateway."""
    options = ("--config", str(lab.config), "--json")
    return lab.host.command(sys.executable, "-m", "steerd.cli.ctl", "explain", *arguments, *options)


def test_a_live_capture_says_where_connections_went(lab: Gateway) -> None:
    # Who runs tests in the background has SIGINT ignored, and so have all that they start.
    heeding = ["env", "--default-signal=INT", *command(lab, "--live", "300")]
    with subprocess.Popen(heeding, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as capture:
        assert capture.stderr is not None
        assert capture.stderr.readline() == "Looking for 300 s at what arrives; Ctrl-C ends it earlier.\n"
        answers = [ask(lab, "a.example", 4), ask(lab, "b.example", 6), lab.ask(Extension(3, 0), 80)]
        capture.send_signal(signal.SIGINT)
        out, err = capture.communicate(timeout=240)
    assert (capture.returncode, err) == (0, "")
    told = json.loads(out)
    assert told["note"].startswith(f"By the registry in {lab.directory}/state: ")
    assert [target(each) for each in told["explanations"]] == [answer.split()[:2] for answer in answers]
    assert [each["client"].rpartition(":")[2] for each in told["explanations"]] == [line.split()[3] for line in answers]
    logged = [event for event in lab.events() if event["event"] == "decision"]
    for event, each in zip(logged, told["explanations"], strict=True):
        assert (event["client"], event["outcome"], event["reason"], event["keys"]) == (
            each["client"], each["outcome"], each["reason"], each["keys"],
        )  # fmt: skip
        # The mark is the one that the table of this daemon knows.
        version = 6 if ":" in each["target"].rpartition(":")[0] else 4
        elements = lab.host.sh(f"nft list map inet steerd targets{version}")
        assert f"{each['mark']:#010x} : {target(each)[0]} . 8080" in elements


def target(told: dict[str, Any]) -> list[str]:
    host, _, port = told["target"].rpartition(":")
    return [host.strip("[]"), port]


def test_a_route_that_was_added_a_moment_ago(lab: Gateway) -> None:
    question = ("--to", f"{ENDPOINT4}:80", "--host", "new.example")
    before = subprocess.run(command(lab, *question), capture_output=True, text=True, check=False, cwd=ROOT)
    assert (before.returncode, json.loads(before.stdout)["explanations"][0]["reason"]) == (1, "unmatched")
    lab.host.sh(
        f"cd {ROOT}; {sys.executable} -m steerd.cli.ctl route add web 10.64.0.5:8080 '[fd00:64::5]:8080'"
        f" --key http.host=new.example --config {lab.config}"
    )
    for version, endpoint in ((4, f"{ENDPOINT4}:80"), (6, f"[{ENDPOINT6}]:80")):
        arguments = command(lab, "--to", endpoint, "--host", "new.example")
        after = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
        assert after.returncode == 0, after.stderr
        (told,) = json.loads(after.stdout)["explanations"]
        assert target(told) == ask(lab, "new.example", version).split()[:2]
        assert told["matched"] == ["http.host=new.example (dynamic)"]
