"""Where things are unless the configuration, or who calls, says otherwise."""

from __future__ import annotations

from pathlib import Path

CONFIG = Path("/etc/steerd/steerd.toml")
STATE_DIR = "/var/lib/steerd"
RUN_DIR = "/run/steerd"
