"""`wake` of pools and targets: which unit or command is started at the first connection."""

from __future__ import annotations

import re

from steerd.config import schema
from steerd.config.reader import Reader, shown
from steerd.core.wake import Wake, check_template

_WAKE_TIMEOUT = 10.0
PLACEHOLDER = re.compile(r"\{[a-z]+\}")
_UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_.\\-]*(@[A-Za-z0-9:_.\\-]+)?\.service")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


def read_wake(raw: schema.Pool | schema.Target, path: str, reader: Reader) -> Wake | None:
    """What a pool or a target says about waking; None: nothing, or not the right thing."""
    where = f"{path}.wake"
    if raw.wake is None:
        for name in ("user", "wake_timeout", "sleep_after"):
            if getattr(raw, name) is not None and not reader.is_bad(f"{path}.{name}"):
                reader.problem(f"{path}.{name}", "Means nothing without wake, which says what is started.")
        return None
    unit, command = "", tuple[str, ...]()
    try:
        if isinstance(raw.wake, list):
            command = _parse_command(raw.wake)
        else:
            unit = _parse_unit(raw.wake)
    except ValueError as error:
        reader.problem(where, str(error))
    if unit and raw.user is not None:
        reader.problem(f"{path}.user", "Means nothing for a unit, whose own User= counts.")
    if command and raw.user is None and not reader.is_bad(f"{path}.user"):
        reader.problem(f"{path}.user", "Is missing; it must be the user as whom the command is run.")
    if command and raw.user is not None and (raw.user == "root" or not _USER.fullmatch(raw.user)):
        reader.problem(f"{path}.user", f"Must be the name of a user who is not root, not {shown(raw.user)}.")
    if reader.is_bad(where) or reader.is_bad(f"{path}.user"):
        return None
    timeout = _WAKE_TIMEOUT if raw.wake_timeout is None else raw.wake_timeout
    return Wake(unit, command, raw.user or "", timeout, raw.sleep_after)


def _parse_unit(value: object) -> str:
    usage = 'Must be a unit, "unit:tenant@{lease}.service", or a command, a list of texts'
    if not isinstance(value, str) or not value.startswith("unit:"):
        raise ValueError(f"{usage}; {shown(value)} is neither.")
    unit = value.removeprefix("unit:")
    check_template(unit)
    if not _UNIT.fullmatch(PLACEHOLDER.sub("x", unit)) or unit.startswith("{"):
        raise ValueError(f"{usage}; {shown(unit)} is not the name of a service unit.")
    return unit


def _parse_command(words: list[object]) -> tuple[str, ...]:
    texts = tuple(word for word in words if isinstance(word, str))
    if not texts or len(texts) != len(words) or any("\0" in text for text in texts):
        raise ValueError("Must be the words of a command, each a text in quotes.")
    for text in texts:
        check_template(text)
    if not texts[0].startswith("/") or "{" in texts[0]:
        raise ValueError(f"Must begin with the absolute path of a program, not {shown(texts[0])}.")
    return texts
