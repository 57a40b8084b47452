"""Files in shared memory (control.states, control.doors, telemetry.counters): how they are made and mapped."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def made_anew(path: Path, size: int) -> Iterator[mmap.mmap]:
    """A file of `size` zeros, mapped for reading and writing, which takes the place of what is at `path` when the
    block ends well. Raises OSError.

    It is another file, not the old one emptied: whoever has that one mapped would be killed by its next look.
    """
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(descriptor, size)
        mapping = mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
    yield mapping
    new.replace(path)


def mapped(path: Path, *, write: bool = False) -> mmap.mmap | None:
    """A file that there is; None: it is empty. Raises OSError."""
    descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
        return mmap.mmap(descriptor, size, access=access) if size else None
    finally:
        os.close(descriptor)
