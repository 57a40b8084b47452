"""Says what clients cause, and not as often as they cause it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable

_AGAIN_SECONDS = 60.0
_MOST_REMEMBERED = 1024


class Seldom:
    """Hands texts on, of each key one a minute; the next one says how many there were meanwhile."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last: dict[Hashable, float] = {}
        self._unsaid: Counter[Hashable] = Counter()

    def __call__(self, key: Hashable, text: str) -> None:
        """Say it, unless something with this key was said a moment ago."""
        now = time.monotonic()
        if now - self._last.get(key, -_AGAIN_SECONDS) < _AGAIN_SECONDS:
            self._unsaid[key] += 1
            return
        if len(self._last) >= _MOST_REMEMBERED:
            self._last.clear()
            self._unsaid.clear()
        self._last[key] = now
        before = self._unsaid.pop(key, 0)
        self._say(f"{text} ({before} times more since the last time this was said)" if before else text)
