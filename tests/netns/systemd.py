"""A stand-in for systemd, as far as waking asks for it: `python -m tests.netns.systemd LOG`, on the bus that
DBUS_SYSTEM_BUS_ADDRESS names. The units are tenant@INDEX.service, each a tests.netns.sleeper. "ready" is printed once
it is there. (tests/packages/test_wake.py has the real one.)
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from typing import Annotated

from dbus_fast import BusType, DBusError, ErrorType
from dbus_fast.aio import MessageBus
from dbus_fast.annotations import DBusObjectPath, DBusSignature, DBusStr
from dbus_fast.service import ServiceInterface, dbus_method

from tests.netns import sleeper

_NO_PATH = "/"
_Unit = tuple[str, str, str, str, str, str, str, int, str, str]
_Listed = Annotated[list[_Unit], DBusSignature("a(ssssssouso)")]


class Manager(ServiceInterface):
    """org.freedesktop.systemd1.Manager."""

    def __init__(self, log: str) -> None:
        super().__init__("org.freedesktop.systemd1.Manager")
        self._log = log
        self._units: dict[str, subprocess.Popen[bytes]] = {}

    @dbus_method(name="StartUnit")
    def start(self, name: DBusStr, _mode: DBusStr) -> DBusObjectPath:
        index = re.fullmatch(r"tenant@(\d+)\.service", name)
        if index is None:
            raise DBusError(ErrorType.FILE_NOT_FOUND, f"Unit {name} not found.")
        if self._state(name) != "active":
            command = ["/usr/bin/python3", "-I", "-S", sleeper.__file__, self._log, "8080", index[1], "unit"]
            self._units[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        return _NO_PATH

    @dbus_method(name="StopUnit")
    def stop(self, name: DBusStr, _mode: DBusStr) -> DBusObjectPath:
        self._units[name].terminate()
        return _NO_PATH

    @dbus_method(name="ListUnitsByNames")
    def states(self, names: Annotated[list[str], DBusSignature("as")]) -> _Listed:
        return [(name, "", "loaded", self._state(name), "", "", _NO_PATH, 0, "", _NO_PATH) for name in names]

    def _state(self, name: str) -> str:
        unit = self._units.get(name)
        return "inactive" if unit is None or unit.poll() is not None else "active"


async def main() -> None:
    bus = await MessageBus(bus_address=os.environ["DBUS_SYSTEM_BUS_ADDRESS"], bus_type=BusType.SYSTEM).connect()
    bus.export("/org/freedesktop/systemd1", Manager(sys.argv[1]))
    await bus.request_name("org.freedesktop.systemd1")
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
