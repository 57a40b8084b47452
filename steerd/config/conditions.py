"""Keys and their values, as people write them in `when`, in the spelling of the parsers that give them."""

from __future__ import annotations

import ipaddress
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping

from steerd.config.parsers import PORT_EXTENSION, keys_of
from steerd.config.reader import Reader, instead, shown
from steerd.config.texts import MAX_EXTENDED_PORT, is_decimal
from steerd.core.router import key_rank
from steerd.model import Condition, Match
from steerd.wire import dns, quic
from steerd.wire.registry import PARSER_NAMES, check_patterns

_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def _flatten(table: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """`http.host = "a"` is a table in a table to TOML; `"http.host" = "a"` is not. Both are the key http.host here."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def normal_key(key: str) -> str:
    """Header names are compared without regard to case, and the parsers give them in lower case."""
    return key.lower() if key.lower().startswith(("http.header.", "rtsp.header.")) else key


def _host_name(text: str) -> str:
    """As every parser gives host names: ASCII letters in lower case, without one trailing dot (the root is ".")."""
    text = text.translate(_ASCII_LOWER)
    return text if text == "." else text.removesuffix(".")


_SPELLINGS: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(
        (
            *("http.host", "proxy.authority", "rtsp.host", "sip.host", "minecraft.host"),
            *("tls.sni", "quic.sni", "dtls.sni"),
        ),
        _host_name,
    ),
    "dns.qname": lambda text: _host_name(dns.name(text)),
    "dns.qtype": dns.type_name,
    **dict.fromkeys((quic.SERVER_ID, quic.CONNECTION_ID, "quic.dcid"), str.lower),
}
"""For keys whose values people spell in several ways: the way that the parser spells them."""
_HOSTS = ("http.host", "rtsp.host", "sip.host")
_SERVER_NAMES = ("tls.sni", "quic.sni", "dtls.sni")
# An IPv6 literal in its brackets, or the beginning of one.
_BRACKETED = re.compile(r"\[[^\]]*\]?")
_WITH_PORT = re.compile(r"[^:]*:[0-9]+")


def _check_host(key: str, value: str, written: str) -> None:
    """What no parser ever gives as a host, and no client says as a server name (RFC 6066 section 3)."""
    if key in (*_HOSTS, *_SERVER_NAMES) and not value:
        raise ValueError("Is empty and can never match: who names no host has no such key; use default for that.")
    if key in _HOSTS and ":" in value and not _BRACKETED.fullmatch(value):
        try:
            literal = ipaddress.IPv6Address(value)
        except ValueError:
            raise ValueError(f"{shown(written)} can never match: it must be a name without a port.") from None
        raise ValueError(f'{shown(written)} can never match: an IPv6 address is written "[{literal}]" here.')
    if key in _SERVER_NAMES and _WITH_PORT.fullmatch(value):
        raise ValueError(f"{shown(written)} can never match: clients say a name without a port there.")


def as_parsed(key: str, text: str) -> tuple[str, str]:
    """A key and its value, as people write them, in the way that a parser spells them. Raises ValueError."""
    key = normal_key(key)
    return key, _SPELLINGS[key](text) if key in _SPELLINGS else text


def _read_condition(key: str, value: object, parser: str) -> Condition:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"Must be text in quotes or a whole number, not {shown(value)}.")
    text = str(value)
    if parser == PORT_EXTENSION:
        return _extension_condition(key, text)
    if key == "prefix":
        condition = Condition(key, Match.PREFIX, _payload_prefix(text))
    elif key == "regex":
        # The parser matches; what it gives is the pattern as it is written, whose * and . are not ours.
        condition = Condition(key, Match.EXACT, _not_empty(text))
    else:
        condition = _text_condition(key, _SPELLINGS[key](text) if key in _SPELLINGS else text)
        _check_host(key, condition.value, text)
    if not condition.value.isascii() and max(condition.value) > "\xff":
        raise ValueError(
            "Is compared with bytes, one character each (U+0000 to U+00FF), so it can never match; text in UTF-8 is"
            " written byte by byte: \\u00c3\\u00a9."
        )
    check_patterns(parser, [condition.value])
    return condition


def _text_condition(key: str, text: str) -> Condition:
    stars = text.count("*")
    if stars == 0:
        return Condition(key, Match.EXACT, text)
    if stars == 1 and text.startswith("*.") and len(text) > 2:
        return Condition(key, Match.SUFFIX, text[1:])
    if stars == 1 and text.endswith("*") and len(text) > 1:
        return Condition(key, Match.PREFIX, text[:-1])
    raise ValueError(f'A * stands for a beginning, "*.example", or for an end, "/api/*"; {shown(text)} is neither.')


def condition_text(condition: Condition) -> str:
    """A condition's value as it is written: what `when` takes."""
    key, match, value = condition
    if key == "prefix":
        is_plain = value.isascii() and value.isprintable() and not value.startswith("hex:")
        return value if is_plain else f"hex:{value.encode('latin-1').hex()}"
    return {Match.EXACT: value, Match.SUFFIX: f"*{value}", Match.PREFIX: f"{value}*"}[match]


def _extension_condition(key: str, text: str) -> Condition:
    low, high = (65536, MAX_EXTENDED_PORT) if key == "portext.port" else (1, 65535)
    if not is_decimal(text) or not low <= int(text) <= high:
        raise ValueError(f"Must be a whole number from {low} to {high}, not {shown(text)}.")
    if int(text) % 65536 == 0:
        raise ValueError(f"{int(text)} is port 0 of extension {int(text) // 65536}, and port 0 is never used.")
    return Condition(key, Match.EXACT, str(int(text)))


def _payload_prefix(text: str) -> str:
    if text.startswith("hex:"):
        try:
            text = bytes.fromhex(text.removeprefix("hex:")).decode("latin-1")
        except ValueError:
            raise ValueError(f'Must have two hexadecimal digits a byte, "hex:160301", not {shown(text)}.') from None
    return _not_empty(text)


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("Is empty and would match everything; use default for that.")
    return text


class Conditions:
    """Reads the conditions of one service's routes."""

    def __init__(self, inspect: tuple[str, ...], reader: Reader) -> None:
        self.key_order = tuple(keys_of(parser) for parser in inspect)
        self.inspect = inspect
        self._reader = reader
        self._parsers: dict[str, str | None] = {}

    def read(self, when: Mapping[str, object], path: str) -> tuple[Condition, ...]:
        """The conditions of one route, at the dotted key `path`."""
        found: dict[str, Condition] = {}
        for written, value in _flatten(when):
            key = normal_key(written)
            where = f"{path}.{written}" if written.isprintable() else f"{path}.{json.dumps(written)}"
            try:
                condition = _read_condition(key, value, self.parser_of(key))
            except ValueError as error:
                self._reader.problem(where, str(error))
                continue
            if key in found:
                self._reader.problem(where, f"The key {key} is there twice; a route compares each key once.")
            found[key] = condition
        return tuple(found.values())

    def parser_of(self, key: str) -> str:
        """The word of `inspect` that gives a key. Raises ValueError."""
        if key not in self._parsers:
            known = (*self.inspect, PORT_EXTENSION, *PARSER_NAMES)
            self._parsers[key] = next((p for p in known if key_rank(key, [keys_of(p)]) is not None), None)
        parser = self._parsers[key]
        if parser in self.inspect:
            return parser
        if parser is not None:
            raise ValueError(f'Is a key of the parser "{parser}", which inspect does not name.')
        readable = [k for keys in self.key_order for k in keys]
        raise ValueError(f"Is not a key of any parser{f'; {instead(key, readable)}' if readable else '.'}")
