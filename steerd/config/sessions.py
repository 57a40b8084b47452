"""`[services.NAME.sessions]`, and sessions that come by the API."""

from __future__ import annotations

import functools
import re

from steerd.config import schema
from steerd.config.conditions import Conditions, normal_key
from steerd.config.reader import Reader, join, shown
from steerd.config.targets import Scene, read_targets
from steerd.config.texts import parse_source
from steerd.config.values import Config, Service
from steerd.core.sessions import MAX_ID, SessionEntry, Sessions
from steerd.errors import ConfigError


def check_session(
    config: Config, service: Service, session_id: str, target: object, source: str | None
) -> SessionEntry:
    """A session that is not in the file (but in a request, say), checked as those in it are.

    Raises ConfigError, with the keys `id`, `target` and `source`. The service must have sessions.
    """
    assert service.sessions is not None
    reader = Reader()
    scene = Scene.of_request(config, reader)
    versions: set[int] = {endpoint.address.version for endpoint in service.endpoints}
    entry = _read_session(schema.Session(session_id, target, source), "", service.sessions.key, versions, scene)
    scene.check_for_request("target")
    if reader.problems:
        raise ConfigError(config.file, reader.problems)
    return entry


def _parse_session_id(text: str, *, key: str) -> str:
    """An id that a client can say as the value of a key, and that can stand in the API's URLs."""
    if not 1 <= len(text) <= MAX_ID or not re.fullmatch(r"[\x20-\x7e]*", text) or text != text.strip(" "):
        raise ValueError(f"Must be 1 to {MAX_ID} printable ASCII characters, without a space at either end.")
    if text in (".", ".."):
        raise ValueError("Must not be . or .., which cannot stand in a URL.")
    if ";" in text and not key.startswith("http.header."):
        raise ValueError(f"Has a ;, where the value of {key} ends: no client can ever say it.")
    return text


def read_sessions(
    raw: schema.Sessions | None, service_path: str, inspect: tuple[str, ...], versions: set[int], scene: Scene
) -> Sessions | None:
    """None: there are none, or nothing can be said about them. `service_path`: the service's dotted key."""
    reader = scene.reader
    path = f"{service_path}.sessions"
    if raw is None or reader.is_bad(f"{path}.key"):
        return None
    key = normal_key(raw.key)
    try:
        _check_session_key(key, None if reader.is_bad(f"{service_path}.inspect") else Conditions(inspect, reader))
    except ValueError as error:
        reader.problem(f"{path}.key", str(error))
        return None
    entries: dict[str, SessionEntry] = {}
    for index, each in enumerate(raw.entries):
        where = f"{path}.entries[{index}]"
        entry = _read_session(each, where, key, versions, scene)
        if entry.id in entries and not reader.is_bad(f"{where}.id"):
            reader.problem(f"{where}.id", f"{shown(entry.id)} is there twice; a session has one target and one source.")
        entries[entry.id] = entry
    return Sessions(key, raw.on_new_source, tuple(entries.values()))


def _check_session_key(key: str, conditions: Conditions | None) -> None:
    """`conditions` None: what is inspected is not known."""
    name = key.removeprefix("http.cookie.").removeprefix("http.header.")
    if key != "rtsp.session" and (name == key or not name):
        raise ValueError(
            f'Must be "rtsp.session", "http.cookie.NAME" or "http.header.NAME", the key of an id, not {shown(key)}.'
        )
    if conditions is not None:
        conditions.parser_of(key)


def _read_session(raw: schema.Session, path: str, key: str, versions: set[int], scene: Scene) -> SessionEntry:
    reader = scene.reader
    reader.attempt(join(path, "id"), functools.partial(_parse_session_id, key=key), raw.id)
    source = None if raw.source is None else reader.attempt(join(path, "source"), parse_source, raw.source)
    target = join(path, "target")
    targets = () if reader.is_bad(target) else read_targets(raw.target, target, versions, scene)
    return SessionEntry(raw.id, targets, source)
