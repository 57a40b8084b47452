"""How parts of steerd that are processes of their own are started: workers, the relay."""

from __future__ import annotations

import sys
from pathlib import Path

_CODE = Path(__file__).parents[2]


def command(module: str, *arguments: str) -> list[str]:
    """What runs a module of steerd with this interpreter.

    `-m` looks in the working directory first, and that may be a directory where anybody puts files: these would be
    executed with our capabilities. Only who was started in the checkout itself finds its parts there.
    """
    safe = [] if Path().samefile(_CODE) else ["-P"]
    return [sys.executable, *safe, "-m", module, *arguments]
