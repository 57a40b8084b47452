"""What systemd is told by a service of Type=notify: sd_notify(3), in a datagram to a socket whose name is in the
environment. Without that name nothing is sent.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping


class Notifier:
    """Takes what the environment says about notification out of it: it is meant for this process alone."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        name = environment.pop("NOTIFY_SOCKET", "")
        usec = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", str(os.getpid()))
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self.watchdog_seconds = int(usec) / 1e6 if usec.isdecimal() and pid == str(os.getpid()) else None
        """Within that time systemd wants to hear `alive`; None: it does not."""

    def ready(self, status: str) -> None:
        """It serves: for the first time, or after `reloading`."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """A reload begins; `ready` must follow, whatever becomes of it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1", "STATUS=Stopping")

    def alive(self) -> None:
        """All is well: the watchdog's time begins anew."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def _send(self, *lines: str) -> None:
        """Raises OSError if systemd cannot be told. Waits for nothing: it is the main loop that calls."""
        if self._address:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify:
                notify.sendto("\n".join(lines).encode(), self._address)
