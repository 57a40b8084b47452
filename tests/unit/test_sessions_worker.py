"""A worker and the claims of sessions: nobody is steered whose claim is not granted."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from steerd.control.claims import directory
from steerd.telemetry.counters import LogSwitch
from tests.unit.test_worker import CONFIG, Lab, lab, stopped, syn

__all__ = ["lab", "stopped"]  # fixtures

SESSIONS = """
[services.tv]
endpoints = ["203.0.113.10:554/tcp"]
inspect = ["rtsp"]
unmatched = "{unmatched}"
[services.tv.sessions]
key = "rtsp.session"
on_new_source = "{rule}"
entries = [{{ id = "d1", target = "10.64.0.1:554" }}]
"""


def play(session: str) -> bytes:
    """A SYN of 198.51.100.1 with an RTSP request in it (Fast Open)."""
    payload = f"PLAY rtsp://a.example/1 RTSP/1.0\r\nSession: {session}\r\n\r\n".encode()
    bare = syn(None, 554)
    return bare[:2] + (len(bare) + len(payload)).to_bytes(2, "big") + bare[4:] + payload


def serve(lab: Lab, rule: str, unmatched: str = "reset") -> None:
    lab.publish(CONFIG + SESSIONS.format(rule=rule, unmatched=unmatched))
    directory(str(lab.directory)).mkdir()
    lab.counters.next_generation()


def link(lab: Lab) -> Path:
    (found,) = directory(str(lab.directory)).iterdir()
    return found


@pytest.mark.parametrize(("rule", "links"), [("allow", []), ("move", ["move-1"]), ("deny", ["bind-1"])])
def test_a_claim_is_made_before_the_packet_goes_on(lab: Lab, rule: str, links: list[str]) -> None:
    serve(lab, rule)
    for _ in range(2):
        verdict, mark = lab.outcome(play("d1"))
        assert (verdict, mark != 0) == ("accept", True)
        assert [found.name for found in directory(str(lab.directory)).iterdir()] == links
    assert lab.counted() == {"SESSION": 2, "LOADED": 1}


@pytest.mark.parametrize("unmatched", ["reset", "drop"])
def test_a_claim_that_is_not_granted_is_what_unmatched_says(lab: Lab, unmatched: str) -> None:
    serve(lab, "deny", unmatched)
    assert lab.outcome(play("d1"))[0] == "accept"
    claimed = link(lab)
    other = str(claimed.readlink()).replace("c6336401", "c6336402")
    claimed.unlink()
    claimed.symlink_to(other)  # another worker was first
    steered = lab.nftables.inserted.copy()
    packet = lab.deliver(play("d1"))
    assert packet.verdicts == ["drop" if unmatched == "drop" else "accept"]
    assert packet.mark == (0 if unmatched == "drop" else 1 << 8)  # RESET_ID
    assert lab.nftables.inserted == steered
    assert lab.counted() == {"SESSION": 1, "SESSION_REFUSED": 1, "LOADED": 1}


@pytest.mark.parametrize("rule", ["move", "deny"])
def test_where_no_claim_can_be_made_the_packet_is_lost(lab: Lab, rule: str) -> None:
    serve(lab, rule)
    directory(str(lab.directory)).rmdir()
    assert lab.outcome(play("d1")) == ("drop", 0)
    assert lab.counted() == {"FAULT": 1}
    assert "FileNotFoundError" in lab.faults()[0]["why"]


def test_a_refused_client_is_logged_with_its_session(stopped: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped.counters.log = LogSwitch(logging.INFO, 1)
    stopped.start()
    serve(stopped, "deny")
    monkeypatch.setattr(stopped.worker._claimant, "claim", lambda _: False)
    stopped.deliver(play("d1"))
    (event,) = stopped.events()
    assert (event["reason"], event["outcome"], event["target"]) == ("session_refused", "reset", None)
    assert event["keys"]["rtsp.session"] == "d1"
