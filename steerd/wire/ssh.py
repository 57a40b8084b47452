"""`ssh`: the identification string that an SSH client sends first (RFC 4253 section 4.2).

Of `SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u6` the keys are, text in latin-1:
- `ssh.version`: the protocol version, `2.0`;
- `ssh.client`: the software version, `OpenSSH_9.2p1`;
- `ssh.comments`: what follows the first space, `Debian-2+deb12u6`; a string without a space gives no such key.

No name of a host or a user is in it: those come encrypted, later. SSH daemons on one port are told apart by the
client's address, SSH from other protocols by this parser.

NEED_MORE until the line ends, with CR LF or with a bare LF (old clients send that), but NOT_MINE as soon as the bytes
cannot be such a line: it begins with `SSH-`, has no control characters, and has at most 255 bytes with its end. A
minus sign in the software version is accepted, though the RFC forbids it: JSch and others send one.

Not covered: lines before the string (only servers may send them), the key exchange behind it, and clients that wait
for the server's string first, which the RFC allows and OpenSSH does not do.
"""

from __future__ import annotations

import re

from steerd.model import Answer, Keys
from steerd.wire.parser import Parser, always

BOUND = 255

_BEGINNING = b"SSH-"
_LINE_SO_FAR = re.compile(rb"[\x20-\x7e\x80-\xff]*\r?")
_LINE = re.compile(rb"SSH-([0-9]+\.[0-9]+)-([\x21-\x7e\x80-\xff]+)(?: ([\x20-\x7e\x80-\xff]*))?\r?")


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the identification string that `data` begins with, or NEED_MORE, or NOT_MINE."""
    if not data.startswith(_BEGINNING):
        return Answer.NEED_MORE if _BEGINNING.startswith(data) else Answer.NOT_MINE
    line, complete, _ = data[:BOUND].partition(b"\n")
    if not complete:
        return Answer.NEED_MORE if len(data) < BOUND and _LINE_SO_FAR.fullmatch(line) else Answer.NOT_MINE
    match = _LINE.fullmatch(line)
    if match is None:
        return Answer.NOT_MINE
    keys = {"ssh.version": match[1].decode("latin-1"), "ssh.client": match[2].decode("latin-1")}
    if match[3] is not None:
        keys["ssh.comments"] = match[3].decode("latin-1")
    return keys


PARSER = Parser(
    name="ssh",
    keys=("ssh.client", "ssh.comments", "ssh.version"),
    bound=BOUND,
    make=always(inspect),
    summary="SSH: the client's software and its version",
)
