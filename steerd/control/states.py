"""States of targets in shared memory: RUN_DIR/targets, one byte for each target id, bits as steerd.model names them.

The main process makes the file anew when it starts and is the only one that writes; whoever decides maps it read-only,
and sees a change with the next packet. A byte is written by one store, so no lock is needed, and nobody sees half of
it. Nothing here outlives a restart: drains are written again from the registry, the rest is looked up again.

Ids without anything to say cost nothing: the file is sparse. The first 16 bytes, which no target id has, hold a number
by which the file is known.
"""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

from steerd import shared
from steerd.core.marks import FIRST_TARGET_ID
from steerd.errors import SteerdError

_MAGIC = b"steerd targets 1"
assert len(_MAGIC) == FIRST_TARGET_ID


def path(run_dir: str) -> Path:
    """Where the file of a daemon with this run_dir is."""
    return Path(run_dir) / "targets"


class States:
    """The mapped file. `create` is for the main process, `open` for workers and for whoever wants to look."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._bytes = memoryview(mapping)
        # Several threads of the main process change bits of one byte.
        self._lock = threading.Lock()
        self.get = self._bytes.__getitem__
        """The state of a target id, 0 .. highest; IndexError beyond. An attribute and not a method: it is asked for
        each decision."""

    @classmethod
    def create(cls, run_dir: str, highest_id: int) -> States:
        """Nothing is known of any target yet."""
        with shared.made_anew(path(run_dir), highest_id + 1) as mapping:
            mapping[: len(_MAGIC)] = _MAGIC
        return cls(mapping)

    @classmethod
    def open(cls, run_dir: str) -> States:
        """Map an existing file, to read it; raises SteerdError if there is none or it is of another layout."""
        file = path(run_dir)
        try:
            mapping = shared.mapped(file)
        except OSError as error:
            raise SteerdError(f"{file} cannot be read ({error.strerror}): is steerd running?") from None
        if mapping is None or mapping[: len(_MAGIC)] != _MAGIC:
            raise SteerdError(f"{file} was written by another version of steerd: restart the daemon")
        return cls(mapping)

    @property
    def highest_id(self) -> int:
        """The highest id that has a state."""
        return len(self._bytes) - 1

    def put(self, target_id: int, bit: int, on: bool) -> None:
        """Set or clear one bit of a target's state."""
        if target_id < FIRST_TARGET_ID:
            raise ValueError(f"{target_id} is no target id")
        with self._lock:
            state = self._bytes[target_id]
            self._bytes[target_id] = state | bit if on else state & ~bit

    def clear(self, first_id: int, length: int) -> None:
        """Forget what is known of some ids in a row."""
        with self._lock:
            self._bytes[first_id : first_id + length] = bytes(length)
