"""Doors (core.wake) between the main process and workers: what workers see of them, and how they ask.

**RUN_DIR/doors** is shared memory. The main process makes it anew when it starts and is the only one that writes;
workers map it read-only. All of it is unsigned 64-bit words in the machine's order:

  word 0      serial: another one after each change
  word 1      how many entries there are
  word 2      1 if nobody else can be woken now
  word 3      CRC-32 of words 0..2 and the entries
  from word 4 one word for each door: target id << 32 | port << 16 | protocol << 8 | DoorState

A worker reads a table whose checksum is right, or none: then each door is shut, and it reads again for the next packet.

**RUN_DIR/wake.sock** takes a datagram for each question, one such word without a state. It is bounded by the kernel and
never waited for: a question that is lost is asked again, one door by one worker at most once a second. There is no
answer but the table. A door that was asked for, and a moment later is not there while nobody can be woken, is refused.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from steerd import shared
from steerd.core.wake import Door, DoorState
from steerd.errors import SteerdError

CAPACITY = 1 << 16
"""Doors in the table. One that finds no room is shut, for as long as that is so."""
ASK_SECONDS = 1.0
_ANSWER_SECONDS = 0.2
"""After that the main process has seen a question, unless it hangs."""

_HEADER = 4
_WORD = struct.Struct("=Q")
_MAX_ASKED = 1 << 16
_SIZE = (_HEADER + CAPACITY) * _WORD.size


def _word(door: Door, state: int) -> int:
    return door.target_id << 32 | door.port << 16 | door.protocol << 8 | state


def _door(word: int) -> Door:
    return Door(word >> 32, word >> 8 & 0xFF, word >> 16 & 0xFFFF)


def _checksum(words: memoryview, count: int) -> int:
    return zlib.crc32(words[_HEADER : _HEADER + count], zlib.crc32(words[:3]))


class Porter:
    """The main process's side. To be made before there are workers."""

    def __init__(self, run_dir: str) -> None:
        file = Path(run_dir) / "doors"
        try:
            with shared.made_anew(file, _SIZE) as mapping:
                self._words = memoryview(mapping).cast("Q")
                self._write({}, False)
            name = Path(run_dir) / "wake.sock"
            name.unlink(missing_ok=True)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._socket.bind(str(name))
            name.chmod(0o600)
        except OSError as error:
            raise SteerdError(f"{run_dir} cannot be prepared for waking daemons: {error.strerror}") from error
        self._shown: tuple[Mapping[Door, DoorState], bool] = ({}, False)

    def fileno(self) -> int:
        """Readable when somebody asks."""
        return self._socket.fileno()

    def show(self, doors: Mapping[Door, DoorState], is_full: bool) -> None:
        """What workers are to see from now on."""
        if (doors, is_full) != self._shown:
            self._shown = (dict(doors), is_full)
            self._write(doors, is_full)

    def _write(self, doors: Mapping[Door, DoorState], is_full: bool) -> None:
        words = self._words
        count = 0
        for door, state in doors.items():
            if count == CAPACITY:
                break
            words[_HEADER + count] = _word(door, state)
            count += 1
        words[1], words[2] = count, is_full
        words[0] += 1
        words[3] = _checksum(words, count)

    def asked(self, most: int) -> Iterator[Door]:
        """The doors that were asked for since the last time, `most` of them."""
        for _ in range(most):
            try:
                data = self._socket.recv(_WORD.size + 1)
            except BlockingIOError:
                return
            if len(data) == _WORD.size:
                yield _door(_WORD.unpack(data)[0])

    def close(self) -> None:
        self._socket.close()


class Visitor:
    """A worker's side."""

    def __init__(self, run_dir: str) -> None:
        file = Path(run_dir) / "doors"
        try:
            mapping = shared.mapped(file)
        except OSError as error:
            raise SteerdError(f"{file} cannot be read ({error}): is steerd running?") from None
        if mapping is None or len(mapping) != _SIZE:
            raise SteerdError(f"{file} was written by another version of steerd: restart the daemon")
        self._words = memoryview(mapping).cast("Q")
        self._serial = -1
        self._doors: dict[Door, DoorState] = {}
        self._is_full = False
        self._socket: socket.socket | None = None
        self._name = str(Path(run_dir) / "wake.sock")
        self._asked: dict[Door, float] = {}

    def look(self, door: Door) -> DoorState | None:
        """What is known of a door now; None: it is shut."""
        if self._words[0] != self._serial:
            self._read()
        state = self._doors.get(door)
        if state is None and self._is_full and door in self._asked:
            return DoorState.REFUSED if time.monotonic() - self._asked[door] >= _ANSWER_SECONDS else None
        return state

    def ask(self, door: Door, now: float) -> None:
        """Have a door opened, unless that was asked a moment ago."""
        if now - self._asked.get(door, -ASK_SECONDS) < ASK_SECONDS:
            return
        if len(self._asked) >= _MAX_ASKED:
            self._asked.clear()
        self._asked[door] = now
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with contextlib.suppress(OSError):  # full, or nobody is there: it is asked again
            self._socket.sendto(_WORD.pack(_word(door, 0)), self._name)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _read(self) -> None:
        """Take a copy, and see whether it is a whole one."""
        words = self._words
        self._doors, self._is_full, self._serial = {}, False, -1
        copy = memoryview(bytes(words[: _HEADER + min(words[1], CAPACITY)])).cast("Q")
        count = len(copy) - _HEADER
        if copy[1] == count and copy[3] == _checksum(copy, count):
            self._doors = {_door(word): DoorState(word & 0xFF) for word in copy[_HEADER:]}
            self._is_full, self._serial = bool(copy[2]), copy[0]
