"""Sessions: an id that a client says again on its next connection, and the target (and source) that it belongs to.
Pure: what the registry knows of an id goes in, a ruling comes out.

A service names one key whose values are session ids (`rtsp.session`, `http.cookie.NAME`, `http.header.NAME`). A first
payload with a known id goes to that session's target, before any route is asked. An id that is not known means
nothing: routes decide. What becomes of a known one, by `on_new_source`:

    source of the session      allow    move                   deny
    the client's own           steer    steer                  steer
    none yet                   steer    claim, then steer      claim exclusively, then steer
    another one                steer    claim, then steer      refuse

A session that is known but cannot be used (its target is in no pool any more, say) is refused as well: a route might
lead to another daemon, which would be a guess. Refused is what `unmatched` says.

A *claim* asks to write the client's address down as the session's source. Whoever carries a ruling out makes the claim
first (control.sessions says how, and what holds while two clients claim at once), and refuses the connection if it is
not granted. An exclusive claim is granted to one source only.

The source is the client's whole address: the packet's, or the one that a trusted proxy's PROXY header names, which may
be of another family than the packet. At this point it is only as good as the packet: the kernel checks the SYN cookie
after the decision. Who knows an id and can spoof an address (a proxy's, say, and behind it name any client) can claim
the session for that address, just as he could for his own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from steerd.model import IPAddress, Keys, Target

OnNewSource = Literal["allow", "move", "deny"]

MAX_ID = 256
"""Characters of a session id; the longest that RTSP allows (RFC 7826 section 20.2.1)."""

_NO_TARGET = 0


class SessionEntry(NamedTuple):
    """A session as an operator wrote it down: at most one target of each address family; `source` None: the first
    client that comes (where that matters)."""

    id: str
    targets: tuple[Target, ...]
    source: IPAddress | None


class Sessions(NamedTuple):
    """One service's sessions in the configuration."""

    key: str
    """`rtsp.session`, `http.cookie.NAME` or `http.header.NAME`, spelled as the parser gives it."""
    on_new_source: OnNewSource
    entries: tuple[SessionEntry, ...]
    """No id twice."""


class SessionsPlan(msgspec.Struct, frozen=True, array_like=True):
    """What a worker must know of a service's sessions besides the sessions themselves."""

    key: str
    on_new_source: OnNewSource


class Session(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One session as the registry holds it."""

    serial: int
    """Never given twice; a session that is defined anew has another, so that a claim on the old one means nothing."""
    ipv4: int
    """Target ids, 0 where the session has no target of the family."""
    ipv6: int
    source: bytes
    """Packed address; empty: none yet."""
    usable: bool
    """False: its targets are not for use under the configuration in force."""


class Claim(NamedTuple):
    """Asks to make a client's address the source of a session."""

    service: str
    id: str
    serial: int
    source: bytes
    exclusive: bool
    """Only if the session has no source yet. Otherwise the last one that claims has it."""


class Ruling(NamedTuple):
    """What becomes of a connection that carries a known session id."""

    refused: bool
    target_id: int = _NO_TARGET
    """0: the session has no target of the packet's address family."""
    claim: Claim | None = None
    """To be made, and granted, before the connection goes to the target."""


_REFUSED = Ruling(refused=True)


def judge(
    plan: SessionsPlan,
    service: str,
    keys: Keys,
    source: bytes,
    version: int,
    find: Callable[[str, str], Session | None],
) -> Ruling | None:
    """The ruling on a first payload, or None where it carries no known session id.

    `source` is the packed client address (4 or 16 bytes), `version` the IP version of the packet, hence of the target;
    `find` looks a session up by service and id.
    """
    session_id = keys.get(plan.key)
    session = None if session_id is None else find(service, session_id)
    if session_id is None or session is None:
        return None
    if not session.usable:
        return _REFUSED
    known = plan.on_new_source == "allow" or session.source == source
    if plan.on_new_source == "deny" and session.source and not known:
        return _REFUSED
    target_id = session.ipv4 if version == 4 else session.ipv6
    if known or target_id == _NO_TARGET:
        return Ruling(False, target_id)
    return Ruling(False, target_id, Claim(service, session_id, session.serial, source, plan.on_new_source == "deny"))
