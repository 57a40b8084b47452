"""Daemons that are woken as systemd units: org.freedesktop.systemd1.Manager on the system bus, by busctl(1).

A child process for each call, and not a connection: there is nothing to be kept alive or made anew when the bus is
started again, a call that hangs is ended with its process, and whoever has units has busctl.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from steerd.errors import KernelError

_MANAGER = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
_SECONDS = 10
_ACTIVE_STATE, _JOB_ID = 3, 7
"""Places in what ListUnitsByNames gives of each unit."""
ENDED = ("inactive", "failed")
RUNNING = ("active", "reloading", "refreshing")


async def start(name: str) -> None:
    """Have a unit started; it need not be up when this returns. Nothing happens if it runs. Raises KernelError."""
    await _call("StartUnit", "ss", name, "replace")


async def stop(name: str) -> None:
    """Have a unit stopped; it may still run when this returns. Raises KernelError."""
    await _call("StopUnit", "ss", name, "replace")


async def states(names: Sequence[str]) -> dict[str, str]:
    """What systemd says of units: "active", "activating", "deactivating", "failed", "inactive", ... A unit that waits
    to be started or stopped is "activating". Raises KernelError."""
    if not names:
        return {}
    (found,) = await _call("ListUnitsByNames", "as", str(len(names)), *names)
    return {
        unit[0]: "activating" if unit[_JOB_ID] and unit[_ACTIVE_STATE] in ENDED else unit[_ACTIVE_STATE]
        for unit in found
    }


async def _call(method: str, signature: str, *arguments: str) -> list[list[list[str]]]:
    options = ("--system", "--json=short", f"--timeout={_SECONDS}", "--allow-interactive-authorization=no", "call")
    try:
        process = await asyncio.create_subprocess_exec(
            "busctl", *options, "--", *_MANAGER, method, signature, *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise KernelError(f"busctl cannot be run: {error.strerror}.") from error
    try:
        async with asyncio.timeout(_SECONDS + 1):
            said, complaint = await process.communicate()
    except TimeoutError:
        raise KernelError(f"systemd does not answer to {method}.") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise KernelError(f"systemd refuses {method}: {complaint.decode(errors='replace').strip()}")
    answer: list[list[list[str]]] = json.loads(said)["data"]
    return answer
