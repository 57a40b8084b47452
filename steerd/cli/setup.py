"""`steerd setup`: what an installation by pip lacks to run as a service. A package brings all of it along.

Four files and a user; each step says what it does, and does nothing where it is done already. With another root
directory (an image, a test) nothing is told to the running systemd. `remove` takes away what `install` made, but not
what is the operator's by then: the configuration, the user, and the state.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from steerd.errors import SteerdError

UNIT = Path("/etc/systemd/system/steerd.service")
HOLD = Path("/etc/systemd/system/steerd-hold.service")
USERS = Path("/etc/sysusers.d/steerd.conf")
CONFIGURATION = Path("/etc/steerd/steerd.toml")
PACKAGED = (Path("/usr/lib/systemd/system/steerd.service"), Path("/lib/systemd/system/steerd.service"))

_IN_UNIT = "/usr/bin/steer"
# What the unit's ProtectHome= and PrivateTmp= hide.
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")


class Step(NamedTuple):
    """One thing to do; `done` once it is."""

    what: str
    do: Callable[[], None]


class Setup:
    """For the machine whose root directory is `root`, and this installation of steerd."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._here = root == Path("/")

    def install(self) -> Iterator[Step]:
        """What is left to be done, in this order. Raises SteerdError where it would not work."""
        program = self._program()
        if packaged := next((path for path in PACKAGED if self._in(path).exists()), None):
            raise SteerdError(f"{packaged} is there: steerd was installed as a package, and needs no setup")
        unit = _shipped("steerd.service").replace(_IN_UNIT, f"{program.parent}/steer")
        hold, users, example = (_shipped(name) for name in ("steerd-hold.service", "sysusers.conf", "steerd.toml"))
        if not self._holds(USERS, users):
            yield Step(f"write {USERS}: the system user steerd", lambda: self._write(USERS, users, 0o644))
        if not self._has_user():
            yield Step("make the user and the group steerd (systemd-sysusers)", self._make_user)
        if not self._in(CONFIGURATION).exists():
            yield Step(f"write {CONFIGURATION}: an example, which steers nothing yet", lambda: self._configure(example))
        if not (self._holds(UNIT, unit) and self._holds(HOLD, hold)):
            yield Step(
                f"write {HOLD}: what holds its clients while the machine boots", lambda: self._write(HOLD, hold, 0o644)
            )
            yield Step(f"write {UNIT}: the service, which runs {program}", lambda: self._write(UNIT, unit, 0o644))
            yield from self._tell_systemd("daemon-reload")
            # Units that an older version did not have come with it only when it is enabled anew (Also= in the unit).
            if self._is_enabled():
                yield from self._tell_systemd("reenable", UNIT.name)

    def remove(self) -> Iterator[Step]:
        """What is left to be taken away, in this order."""
        if self._in(UNIT).exists():
            yield from self._tell_systemd("disable", "--now", UNIT.name)
            yield Step(f"remove {UNIT}", self._in(UNIT).unlink)
            yield Step(f"remove {HOLD}", lambda: self._in(HOLD).unlink(missing_ok=True))
            yield from self._tell_systemd("daemon-reload")
        if self._in(USERS).exists():
            yield Step(f"remove {USERS}", self._in(USERS).unlink)

    def _in(self, path: Path) -> Path:
        return self._root / path.relative_to("/")

    def _holds(self, path: Path, text: str) -> bool:
        return self._in(path).exists() and self._in(path).read_text() == text

    def _write(self, path: Path, text: str, mode: int) -> None:
        target = self._in(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f".{target.name}.new")
        new.write_text(text)
        new.chmod(mode)
        new.replace(target)

    def _has_user(self) -> bool:
        passwd = self._in(Path("/etc/passwd"))
        return passwd.exists() and any(line.startswith("steerd:") for line in passwd.read_text().splitlines())

    def _make_user(self) -> None:
        _run("systemd-sysusers", *([] if self._here else [f"--root={self._root}"]), USERS.name)

    def _configure(self, example: str) -> None:
        """For root and the service alone: keys of connection ids are secrets."""
        self._write(CONFIGURATION, example, 0o640)
        groups = self._in(Path("/etc/group")).read_text().splitlines()
        gid = next(int(line.split(":")[2]) for line in groups if line.startswith("steerd:"))
        os.chown(self._in(CONFIGURATION), -1, gid)

    def _has_systemd(self) -> bool:
        return self._here and self._in(Path("/run/systemd/system")).is_dir()

    def _is_enabled(self) -> bool:
        asked = ("systemctl", "--quiet", "is-enabled", UNIT.name)
        return self._has_systemd() and subprocess.run(asked, check=False).returncode == 0

    def _tell_systemd(self, *words: str) -> Iterator[Step]:
        if self._has_systemd():
            yield Step(f"systemctl {' '.join(words)}", lambda: _run("systemctl", *words))

    def _program(self) -> Path:
        """The command as the service starts it: reachable for its user, and inside its sandbox."""
        program = Path(sys.prefix) / "bin" / "steerd"
        if not program.exists():
            raise SteerdError(f"there is no {program}: install steerd with pip into a virtual environment")
        for path in (program, Path(sys.executable).resolve()):
            if self._here and any(path.is_relative_to(hidden) for hidden in _HIDDEN):
                raise SteerdError(
                    f"{path} is where a service does not get to; install steerd elsewhere, for instance:"
                    " python3 -m venv /opt/steerd && /opt/steerd/bin/pip install steerd"
                )
            for part in (path, *path.parents):
                if not part.stat().st_mode & stat.S_IXOTH:
                    raise SteerdError(f"{part} is closed to other users, so the user steerd cannot run {program}")
        return program


def _shipped(name: str) -> str:
    return resources.files("steerd").joinpath("systemd", name).read_text()


def _run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise SteerdError(f"{command[0]} is not there: this needs a machine with systemd")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SteerdError(f"{' '.join(command)} failed: {done.stderr.strip()}")
