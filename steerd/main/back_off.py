"""How long it is waited until a process that died is started again."""

from __future__ import annotations

LONGEST_SECONDS = 5.0
_FIRST_SECONDS = 0.1
_FORGIVEN_SECONDS = 10.0


class BackOff:
    """0.1 s the first time, then 0.2 s, ... LONGEST_SECONDS. From the beginning for one that had lived for longer than
    10 s."""

    def __init__(self) -> None:
        self._next = _FIRST_SECONDS

    def after(self, lived: float) -> float:
        """Seconds to wait, after one that lived so many."""
        pause = _FIRST_SECONDS if lived > _FORGIVEN_SECONDS else self._next
        self._next = min(pause * 2, LONGEST_SECONDS)
        return pause
