"""Where `steerd` begins (`python -m steerd` as well): before anything that takes time to import."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """The console script: steerd.cli.main.main, with SIGHUP held back for a daemon until it can reload."""
    if sys.argv[1:2] == ["run"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    from steerd.cli import main as command_line

    command_line.main()


if __name__ == "__main__":
    main()
