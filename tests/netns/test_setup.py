"""`steerd setup`, into another root directory: as root, since it makes a user there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from steerd import config
from steerd.cli import setup
from steerd.cli.setup import Setup
from steerd.errors import SteerdError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/etc").mkdir(parents=True)
    for name, line in (("passwd", "root:x:0:0:root:/root:/bin/sh"), ("group", "root:x:0:")):
        (tmp_path / "root/etc" / name).write_text(line + "\n")
    return tmp_path / "root"


@pytest.fixture(autouse=True)
def prefix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installation of steerd that any user can reach."""
    program = tmp_path / "venv/bin/steerd"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for part in [tmp_path, *tmp_path.parents][:3]:
        part.chmod(part.stat().st_mode | 0o011)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    return tmp_path / "venv"


def done(root: Path) -> list[str]:
    said = []
    for step in Setup(root).install():
        said.append(step.what)
        step.do()
    return said


def test_it_makes_user_example_and_unit_once(root: Path, prefix: Path) -> None:
    would = [step.what for step in Setup(root).install()]
    assert sorted(path.name for path in root.rglob("*")) == ["etc", "group", "passwd"], "nothing is done by asking"
    assert done(root) == would
    assert len(would) == 5
    (user,) = (line for line in (root / "etc/passwd").read_text().splitlines() if line.startswith("steerd:"))
    gid = int(user.split(":")[3])
    example = root / "etc/steerd/steerd.toml"
    assert config.load(example).services == ()
    assert (example.stat().st_gid, example.stat().st_mode & 0o777) == (gid, 0o640)
    unit = (root / "etc/systemd/system/steerd.service").read_text()
    assert f"\nExecStart={prefix}/bin/steerd run /etc/steerd/steerd.toml\n" in unit
    assert f"\nExecReload={prefix}/bin/steerctl reload " in unit
    assert "/usr/bin/steer" not in unit
    assert (root / "etc/systemd/system/steerd-hold.service").exists()
    assert done(root) == []


@pytest.mark.parametrize("is_enabled", [True, False])
def test_an_upgrade_of_an_enabled_service_enables_what_came_with_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_enabled: bool
) -> None:
    done(root)
    (root / "etc/systemd/system/steerd-hold.service").unlink()
    systemctl = tmp_path / "bin/systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(f"""#!/bin/sh
case "$*" in *is-enabled*) {str(is_enabled).lower()};; *) echo "$*" >>{tmp_path}/told;; esac
""")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(systemctl.parent), prepend=":")
    monkeypatch.setattr(setup, "_HIDDEN", ())
    (root / "run/systemd/system").mkdir(parents=True)
    plan = Setup(root)
    plan._here = True
    for step in plan.install():
        step.do()
    assert (root / "etc/systemd/system/steerd-hold.service").exists()
    reenabled = ["reenable steerd.service"] if is_enabled else []
    assert (tmp_path / "told").read_text().splitlines() == ["daemon-reload", *reenabled]


def test_the_example_without_its_number_signs_is_a_configuration(root: Path) -> None:
    done(root)
    lines = (root / "etc/steerd/steerd.toml").read_text().split("[gateway]")[1].splitlines()
    text = "[gateway]\n" + "\n".join(line.removeprefix("# ") for line in lines if not line.startswith("# Local"))
    (service,) = config.parse(text, "steerd.toml").services
    assert service.inspect == ("tls", "http")


def test_it_leaves_the_operators_configuration_alone(root: Path) -> None:
    mine = root / "etc/steerd/steerd.toml"
    mine.parent.mkdir()
    mine.write_text("mine")
    done(root)
    assert mine.read_text() == "mine"
    for step in Setup(root).remove():
        step.do()
    assert mine.read_text() == "mine"
    assert list((root / "etc/systemd/system").iterdir()) == []
    assert list(Setup(root).remove()) == []


def test_a_package_is_not_doubled(root: Path) -> None:
    unit = root / "usr/lib/systemd/system/steerd.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("")
    with pytest.raises(SteerdError, match="was installed as a package, and needs no setup"):
        done(root)


def test_an_installation_that_the_user_cannot_reach_is_refused(root: Path, prefix: Path) -> None:
    (prefix / "bin").chmod(0o700)
    with pytest.raises(SteerdError, match=f"{prefix}/bin is closed to other users"):
        done(root)
    with pytest.raises(SteerdError, match="is where a service does not get to; install steerd elsewhere"):
        list(setup.Setup(Path("/")).install())
