r"""`dns`: a DNS query in a UDP datagram (RFC 1035 section 4.2.1), or the first one of a connection over TCP (section
4.2.2, RFC 7766).

Keys, text in latin-1:
- `dns.qname`: the name asked for, lower-case (ASCII letters, RFC 4343) and without the trailing dot; the root is ".". A
  dot within a label is `\046` and a backslash `\\`, as master files may have it (RFC 1035 section 5.1), so that two
  names never look the same, and `*.shop.example` is never found in the middle of a label;
- `dns.qtype`: the type by its usual name, `A`, `AAAA`, `HTTPS`, or `TYPE65280` for one without (RFC 3597 section 5).

Over TCP, NEED_MORE until the question is complete (what follows it, such as EDNS, is not looked at), but NOT_MINE as
soon as the bytes cannot be a standard query (not a response, OPCODE 0, one question, no answers) behind its length.
A datagram is a whole message without a length before it; one that ends too early is NOT_MINE. Malformed,
hence NOT_MINE: a message that ends within its question, a name of more than 255 bytes, and a compression pointer or
another label type in the question, where nothing is that a pointer could point to.

Not covered: the class (nearly always IN), later queries of the connection, which go where the first went (RFC 7766
lets clients send many at once), updates and notifications, and DNS over TLS, HTTPS or QUIC. Over UDP every datagram is
a question of its own: a forwarder asks for many names from one port, so the first one of a flow says nothing about the
others.
"""

from __future__ import annotations

import re

from steerd.model import Answer, Keys
from steerd.wire.parser import DatagramParser, Parser, always, always_first

_LENGTH = 2
_HEADER = 12
_MAX_LABEL = 63
_MAX_NAME = 255
_TYPE_AND_CLASS = 4
BOUND = _LENGTH + _HEADER + _MAX_NAME + _TYPE_AND_CLASS
"""The longest question, with the message's length and header before it: 273 bytes."""

_SHORTEST_MESSAGE = _HEADER + 1 + _TYPE_AND_CLASS
_QR_AND_OPCODE = 0xF8
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_ONE_QUESTION_NO_ANSWER = b"\x00\x01\x00\x00"

TYPES = {
    1: "A",
    2: "NS",
    5: "CNAME",
    6: "SOA",
    12: "PTR",
    13: "HINFO",
    15: "MX",
    16: "TXT",
    17: "RP",
    28: "AAAA",
    29: "LOC",
    33: "SRV",
    35: "NAPTR",
    37: "CERT",
    39: "DNAME",
    43: "DS",
    44: "SSHFP",
    46: "RRSIG",
    47: "NSEC",
    48: "DNSKEY",
    50: "NSEC3",
    51: "NSEC3PARAM",
    52: "TLSA",
    53: "SMIMEA",
    59: "CDS",
    60: "CDNSKEY",
    61: "OPENPGPKEY",
    62: "CSYNC",
    63: "ZONEMD",
    64: "SVCB",
    65: "HTTPS",
    251: "IXFR",
    252: "AXFR",
    255: "ANY",
    256: "URI",
    257: "CAA",
}
"""Types by number, with the names of IANA's registry "Resource Record (RR) TYPEs" (255 is `*` there, and `ANY` in
RFC 8482 and every tool). Meta types that nobody asks for and obsolete ones are left out."""


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the query that `data` begins with, or NEED_MORE, or NOT_MINE."""
    if len(data) < _LENGTH:
        return Answer.NEED_MORE
    length = int.from_bytes(data[:_LENGTH])
    if length < _SHORTEST_MESSAGE:
        return Answer.NOT_MINE
    message = data[_LENGTH : min(_LENGTH + length, BOUND)]
    answer = _read(message)
    if answer is Answer.NEED_MORE and len(message) == length:
        return Answer.NOT_MINE
    return answer


def question(message: bytes) -> Keys | None:
    """Keys of a whole message, as a UDP datagram carries it; None: not a standard query, or malformed."""
    answer = _read(message)
    return answer if isinstance(answer, dict) else None


def name(text: str) -> str:
    r"""A name's dots and backslashes as this parser gives them, from how people write them: `a\.b.example`, two
    labels, is `a\046b.example`."""
    return _ESCAPED.sub(lambda escaped: r"\046" if escaped[1] == "." else escaped[0], text)


def type_name(text: str) -> str:
    """A type as this parser gives it, from how people write it: `aaaa` is `AAAA`, so are `TYPE28` and `28`."""
    name = text.upper()
    number = name.removeprefix("TYPE")
    if number.isascii() and number.isdecimal():
        return _type_name(int(number))
    return name


def _type_name(number: int) -> str:
    return TYPES.get(number) or f"TYPE{number}"


def _read(message: bytes) -> Keys | Answer:
    """Keys of the question that a message begins with; NEED_MORE where it ends too early."""
    # Each check holds for the beginning of a header too.
    if message[2:3] and message[2] & _QR_AND_OPCODE:
        return Answer.NOT_MINE
    if not _ONE_QUESTION_NO_ANSWER.startswith(message[4:8]):
        return Answer.NOT_MINE
    labels = []
    start = _HEADER
    while length := message[start : start + 1]:
        if length == b"\x00":
            break
        end = start + 1 + length[0]
        # The zero byte behind the last label counts as well.
        if length[0] > _MAX_LABEL or end + 1 - _HEADER > _MAX_NAME:
            return Answer.NOT_MINE
        labels.append(message[start + 1 : end])
        start = end
    rest = message[start + 1 : start + 1 + _TYPE_AND_CLASS]
    if len(rest) < _TYPE_AND_CLASS:
        return Answer.NEED_MORE
    name = b".".join(label.replace(b"\\", rb"\\").replace(b".", rb"\046") for label in labels).lower()
    return {"dns.qname": name.decode("latin-1") or ".", "dns.qtype": _type_name(int.from_bytes(rest[:2]))}


PARSER = Parser(
    name="dns",
    keys=("dns.qname", "dns.qtype"),
    bound=BOUND,
    make=always(inspect),
    summary="DNS over TCP: name and type of the first query",
)
DATAGRAMS = DatagramParser(
    every=True,
    name="dns",
    keys=PARSER.keys,
    datagrams=1,
    make=always_first(question),
    summary="DNS over UDP: name and type of a query",
)
