"""The unit file: how far it is sandboxed, and that it grants what the program asks for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import steerd
from steerd import config, privileges

UNIT = Path(steerd.__file__).parent / "systemd" / "steerd.service"
HOLD = UNIT.with_name("steerd-hold.service")


def setting(name: str, unit: Path = UNIT) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit.read_text(), re.MULTILINE)


def test_its_exposure_is_below_2() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", str(UNIT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_it_grants_the_capabilities_that_every_configuration_needs_and_no_others() -> None:
    needed = " ".join(str(need.capability) for need in privileges.needed(config.parse("", "")))
    assert needed == "CAP_NET_ADMIN CAP_NET_RAW"
    assert setting("AmbientCapabilities") == setting("CapabilityBoundingSet") == [needed]


def test_it_runs_as_the_default_user_in_the_default_directories() -> None:
    gateway = config.parse("", "").gateway
    assert setting("User") == [gateway.user]
    assert [f"/run/{name}" for name in setting("RuntimeDirectory")] == [gateway.run_dir]
    assert [f"/var/lib/{name}" for name in setting("StateDirectory")] == [gateway.state_dir]


def test_what_holds_clients_back_is_loaded_once_and_only_before_it() -> None:
    gateway = config.parse("", "").gateway
    assert setting("ConditionPathExists", HOLD) == [f"{gateway.state_dir}/hold.nft", f"!{gateway.run_dir}/lock"]
    assert setting("RuntimeDirectoryPreserve") == ["yes"], "or the lock is gone with the first stop"
    assert setting("RemainAfterExit", HOLD) == ["yes"]
    (after,) = setting("After")
    assert HOLD.name in after.split()


def test_the_drop_in_grants_what_commands_that_are_woken_need() -> None:
    wake = '[pools.p]\nprefixes = ["10.64.0.0/24"]\nwake = ["/bin/a", "{alias}"]\nuser = "a"'
    usual = privileges.needed(config.parse("", ""))
    more = [str(need.capability) for need in privileges.needed(config.parse(wake, "")) if need not in usual]
    text = UNIT.with_name("wake-commands.conf").read_text()
    for name in ("AmbientCapabilities", "CapabilityBoundingSet"):
        assert re.findall(rf"^{name}=(.*)$", text, re.MULTILINE) == [" ".join(more)]
