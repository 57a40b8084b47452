"""Claims: how workers, which cannot write to the registry, give a session its source (core.sessions).

A claim is a symbolic link in RUN_DIR/claims whose text says who claims what. Making one costs a system call or three,
never waits for the main process, and is there at once for all workers. The main process looks a few times a second,
writes the claims it finds into the session table (one transaction, on the disk), and only then removes the links.

  bind-SERIAL   exclusive: made with symlink(2), which fails if the name exists, so that one source alone can have it
  move-SERIAL   the last one counts: made aside and moved over the name with rename(2)
  taken-SERIAL  a move that the main process has begun to write down
  new-PID       a move in the making

There is one link of a kind for each session at most, whatever clients do. SERIAL is the session's: a session that was
defined anew has another, so that no claim under way can reach it.

**While a claim is on its way** two sources may race for a session without a source (`deny`). The link decides: the
first one has it, and the other one is refused, also while the main process is busy, hangs or is dead. When it has
written the claim down and removed the link, a worker that looked the session up before might make the link again: so
whoever claims looks the session up once more *after* its link, and what the table then says goes before the link. Since
the table is written before the link is removed, either the link or the table shows the winner at every moment.

For `move`, each of two racing sources goes to the session's target, as each would one after the other, and the one that
came last stays in the table.

**What a crash costs.** Links outlive both kinds of process; the next main process writes them down. If the machine
itself goes down (and RUN_DIR is a tmpfs), what was claimed in the last moment is forgotten along with the connection.
If a link cannot be made (no space), OSError says so, and the connection must not go on.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

from steerd.control.sessions import SessionTable
from steerd.core.sessions import Claim, Session
from steerd.errors import SteerdError

COLLECT_SECONDS = 0.2
"""How often the main process looks for claims."""


def directory(run_dir: str) -> Path:
    return Path(run_dir) / "claims"


class Claimant:
    """A worker's side. `find` looks a session up, as it is at that moment, by service and id."""

    def __init__(self, run_dir: str, find: Callable[[str, str], Session | None]) -> None:
        self._directory = directory(run_dir)
        self._new = self._directory / f"new-{os.getpid()}"
        self._find = find

    def claim(self, claim: Claim) -> bool:
        """Claim a session for a source; returns whether it has it. Raises OSError if that cannot be said."""
        text = _text(claim)
        if not claim.exclusive:
            link = self._directory / f"move-{claim.serial}"
            if _first(link, text) != text:
                self._new.unlink(missing_ok=True)
                self._new.symlink_to(text)
                self._new.rename(link)
            return True
        winner = _first(self._directory / f"bind-{claim.serial}", text)
        session = self._find(claim.service, claim.id)
        if session is None or session.serial != claim.serial:
            return False
        return session.source == claim.source if session.source else winner == text


class Collector:
    """The main process's side: the only one that removes links. To be made before there are workers."""

    def __init__(self, run_dir: str, table: SessionTable) -> None:
        self._directory = directory(run_dir)
        self._table = table
        self._lock = threading.Lock()
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            for unfinished in self._directory.glob("new-*"):
                unfinished.unlink()
        except OSError as error:
            raise SteerdError(f"{self._directory} cannot be prepared for workers: {error.strerror}") from error

    def collect(self) -> int:
        """Write all claims down that are there, and remove their links; returns how many sessions have another source.

        Raises RegistryError or OSError; then the links are still there. May be called from any thread.
        """
        with self._lock:
            for move in self._directory.glob("move-*"):
                # Out of the reach of workers, who could replace it between our reading and our removing it. What was
                # taken before and could not be written is superseded.
                move.rename(move.with_name(f"taken-{_serial(move)}"))
            links = [*self._directory.glob("taken-*"), *self._directory.glob("bind-*")]
            changed = self._table.claim([_claim(link) for link in links]) if links else 0
            for link in links:
                link.unlink()
            return changed

    async def keep_collecting(self, on_error: Callable[[str], None]) -> None:
        """Collect for ever; what goes wrong is told, and tried again."""
        while True:
            await asyncio.sleep(COLLECT_SECONDS)
            try:
                if any(self._directory.iterdir()):
                    await asyncio.to_thread(self.collect)
            except (SteerdError, OSError) as error:
                on_error(str(error))


def _first(link: Path, text: str) -> str:
    """The text of the link that is there, ours or another's; "" if it has just been removed."""
    try:
        link.symlink_to(text)
    except FileExistsError:
        try:
            return str(link.readlink())
        except FileNotFoundError:
            return ""
    return text


def _text(claim: Claim) -> str:
    # In hexadecimal, since Path takes a / for its own.
    return f"{claim.source.hex()} {claim.service} {claim.id.encode('ascii').hex()}"


def _claim(link: Path) -> Claim:
    source, service, session_id = str(link.readlink()).split(" ")
    exclusive = link.name.startswith("bind-")
    return Claim(service, bytes.fromhex(session_id).decode("ascii"), _serial(link), bytes.fromhex(source), exclusive)


def _serial(link: Path) -> int:
    return int(link.name.rpartition("-")[2])
