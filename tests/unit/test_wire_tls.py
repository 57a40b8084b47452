"""The `tls` parser: hellos of real clients (also as scapy reads them), every cut, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from scapy.layers.tls.extensions import TLS_Ext_ALPN, TLS_Ext_ServerName, TLS_Ext_SupportedVersion_CH
from scapy.layers.tls.handshake import TLSClientHello

from steerd.model import Answer, Keys
from steerd.wire.tls import BOUND, MAX_RECORDS, client_hello, inspect, inspect_name

VECTORS = Path(__file__).parent.parent / "vectors"
REAL = sorted(VECTORS.glob("tls-*.bin"))

SERVER_NAME, ALPN, SUPPORTED_VERSIONS, ECH = 0, 16, 43, 0xFE0D
GREASE = 0x3A3A


def real(what: str) -> bytes:
    return (VECTORS / f"tls-{what}.bin").read_bytes()


def keys(data: bytes) -> Keys:
    answer = inspect(data)
    assert isinstance(answer, dict), answer
    return answer


def whole(content: bytes) -> Keys | Answer:
    """What the body of a whole ClientHello says."""
    return client_hello(content, len(content))


def vector(length_size: int, content: bytes) -> bytes:
    return len(content).to_bytes(length_size) + content


def extension(kind: int, content: bytes) -> bytes:
    return struct.pack("!H", kind) + vector(2, content)


def server_name(*names: bytes, kind: int = 0) -> bytes:
    return extension(SERVER_NAME, vector(2, b"".join(bytes([kind]) + vector(2, name) for name in names)))


def alpn(*names: bytes) -> bytes:
    return extension(ALPN, vector(2, b"".join(vector(1, name) for name in names)))


def versions(*numbers: int) -> bytes:
    return extension(SUPPORTED_VERSIONS, vector(1, b"".join(struct.pack("!H", number) for number in numbers)))


def body(
    *extensions: bytes, version: int = 0x0303, session_id: bytes = bytes(32), suites: bytes = b"\x13\x01"
) -> bytes:
    """A ClientHello's body, after its fields' order in RFC 8446 section 4.1.2."""
    fields = struct.pack("!H", version) + bytes(32) + vector(1, session_id) + vector(2, suites) + b"\x01\x00"
    return fields + vector(2, b"".join(extensions))


def message(content: bytes) -> bytes:
    return b"\x01" + vector(3, content)


def records(content: bytes, size: int) -> bytes:
    """A message in records of `size` bytes each."""
    cuts = range(0, len(content), size)
    return b"".join(b"\x16\x03\x01" + vector(2, content[start : start + size]) for start in cuts)


def hello(*extensions: bytes) -> bytes:
    content = message(body(*extensions))
    return records(content, len(content))


def payload(data: bytes) -> bytes:
    """What the records of `data` carry."""
    content = b""
    while data:
        end = 5 + int.from_bytes(data[3:5])
        content, data = content + data[5:end], data[end:]
    return content


def test_openssl() -> None:
    assert keys(real("openssl-3.0.19-sni-alpn")) == {
        "tls.sni": "shop.example",
        "tls.alpn": "h2",
        "tls.alpn.h2": "1",
        "tls.alpn.http/1.1": "1",
        "tls.version": "1.3",
    }
    assert keys(real("openssl-3.0.19-tls1.2")) == {"tls.sni": "old.example", "tls.version": "1.2"}


def test_a_client_without_a_name_gives_no_name() -> None:
    assert keys(real("openssl-3.0.19-no-sni")) == {"tls.version": "1.3"}


def test_curl_and_python() -> None:
    assert keys(real("curl-7.88.1-get"))["tls.sni"] == "shop.example"
    found = keys(real("python-3.11.2-alpn"))
    assert (found["tls.sni"], found["tls.alpn"], found["tls.alpn.imap"]) == ("mail.example", "imap", "1")


@pytest.mark.parametrize("what", ["first", "late-sni"])
def test_chromium_with_a_post_quantum_key_share_and_grease(what: str) -> None:
    data = real(f"chromium-156.0.8078.79-{what}")
    assert len(data) > 1900
    assert (data.index(b"shop.example") > 1460) == (what == "late-sni")
    assert struct.pack("!H", ECH) in data
    assert keys(data) == {
        "tls.sni": "shop.example",
        "tls.alpn": "h2",
        "tls.alpn.h2": "1",
        "tls.alpn.http/1.1": "1",
        "tls.version": "1.3",
    }


def test_a_hello_of_five_kilobytes() -> None:
    data = real("openssl-3.0.19-long")
    assert len(data) > 5000
    found = keys(data)
    assert found["tls.sni"] == "long.example"
    assert sum(key.startswith("tls.alpn.") for key in found) == 88


def test_openssl_over_several_records() -> None:
    data = real("openssl-3.0.19-records")
    assert len(payload(data)) == len(data) - 3 * 5
    assert keys(data)["tls.sni"] == "records.example"


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_need_more_until_the_last_byte(file: Path) -> None:
    data = file.read_bytes()
    assert all(inspect(data[:length]) is Answer.NEED_MORE for length in range(len(data)))
    assert inspect(data + b"\x16\x03\x01\x00\x00junk") == inspect(data)


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_scapy_reads_the_same(file: Path) -> None:
    # Reading a hello takes nothing from the session but these; a real one would want the cryptography library.
    state = SimpleNamespace(snapshot=lambda: None)
    session = SimpleNamespace(tls_version=0x0303, advertised_tls_version=0x0303, frozen=True, rcs=state, wcs=state)
    expected = {"tls.version": "1.2"}
    for item in TLSClientHello(payload(file.read_bytes()), tls_session=session).ext:
        if isinstance(item, TLS_Ext_ServerName):
            expected["tls.sni"] = item.servernames[0].servername.decode().lower()
        elif isinstance(item, TLS_Ext_ALPN):
            offered = [protocol.protocol.decode() for protocol in item.protocols]
            expected |= {"tls.alpn": offered[0]} | {f"tls.alpn.{name}": "1" for name in offered}
        elif isinstance(item, TLS_Ext_SupportedVersion_CH):
            assert 0x0304 in item.versions
            expected["tls.version"] = "1.3"
    assert inspect(file.read_bytes()) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 100])
def test_records_of_any_size(size: int) -> None:
    content = message(body(server_name(b"a.example")))
    data = records(content, size)
    assert keys(data) == {"tls.sni": "a.example", "tls.version": "1.2"}
    assert all(inspect(data[:length]) is Answer.NEED_MORE for length in range(len(data)))


def test_the_body_alone_is_read_too() -> None:
    assert whole(payload(real("curl-7.88.1-get"))[4:]) == keys(real("curl-7.88.1-get"))
    assert whole(b"") is Answer.NOT_MINE
    assert whole(body() + b"\x00") is Answer.NOT_MINE
    assert client_hello(body()[:-1], len(body())) is Answer.NEED_MORE


@pytest.mark.parametrize(
    ("name", "host"),
    [
        (b"a.example", "a.example"),
        (b"A.Example", "a.example"),
        (b"a.example.", "a.example"),
        (b"192.0.2.1", "192.0.2.1"),
        (b"\xc3\x84.example", "\xc3\x84.example"),
    ],
)
def test_names(name: bytes, host: str) -> None:
    assert keys(hello(server_name(name)))["tls.sni"] == host


def test_the_first_protocol_offered_and_each_of_them() -> None:
    found = keys(hello(alpn(b"\x3a\x3a", b"xMPP", b"\xff", b"xMPP", b"h2")))
    assert found == {
        "tls.alpn": "xMPP",
        "tls.alpn.xMPP": "1",
        "tls.alpn.\xff": "1",
        "tls.alpn.h2": "1",
        "tls.version": "1.2",
    }
    assert "tls.alpn" not in keys(hello(alpn(b"\x0a\x0a")))


@pytest.mark.parametrize(
    ("offered", "highest"),
    [
        ([0x0304], "1.3"),
        ([0x0301, 0x0303, 0x0302], "1.2"),
        ([GREASE, 0x0303, 0x0304], "1.3"),
        ([0x7F1C, 0x0302], "1.1"),
        ([GREASE], None),
    ],
)
def test_the_highest_version_offered(offered: list[int], highest: str | None) -> None:
    assert keys(hello(versions(*offered))).get("tls.version") == highest


@pytest.mark.parametrize(
    ("version", "highest"), [(0x0300, None), (0x0301, "1.0"), (0x0303, "1.2"), (0x0304, "1.2"), (0x03FF, "1.2")]
)
def test_without_the_extension_the_old_field_says_it(version: int, highest: str | None) -> None:
    found = whole(body(version=version))
    assert isinstance(found, dict)
    assert found.get("tls.version") == highest


def test_no_extensions_at_all() -> None:
    assert whole(body()[:-2]) == {"tls.version": "1.2"}


def test_the_name_alone_is_known_before_the_hello_ends() -> None:
    data = hello(alpn(b"h2"), server_name(b"a.example"), versions(0x0304), extension(21, bytes(2000)))
    end = data.index(b"a.example") + len(b"a.example")
    assert inspect_name(data[: end - 1]) is Answer.NEED_MORE
    assert inspect_name(data[:end]) == inspect_name(data) == {"tls.sni": "a.example"}
    assert inspect(data[:end]) is Answer.NEED_MORE


def test_that_there_is_no_name_is_known_with_the_last_extensions_header() -> None:
    data = hello(alpn(b"h2"), extension(21, bytes(2000)))
    assert inspect_name(data[:-2001]) is Answer.NEED_MORE
    assert inspect_name(data[:-2000]) == {}
    assert inspect_name(data) == {}
    assert inspect_name(records(message(body()[:-2]), 1 << 14)) == {}


def test_what_follows_the_name_is_not_judged_and_what_precedes_it_is() -> None:
    good = hello(server_name(b"a.example"), extension(21, bytes(200)))
    assert inspect_name(records(message(body(server_name(b"a.example"), server_name(b"b.example"))), 1 << 14)) == {
        "tls.sni": "a.example"
    }
    first_record = records(message(payload(good)[4:]), 100)[:105]
    assert inspect_name(first_record + b"\x17\x03\x03\x00\x05other") == {"tls.sni": "a.example"}
    assert inspect_name(first_record[:9] + b"\xff" + first_record[10:]) is Answer.NOT_MINE
    too_long = body(extension(21, bytes(4)), server_name(b"a.example")).replace(
        b"\x00\x15\x00\x04", b"\x00\x15\x40\x00"
    )
    assert inspect_name(records(message(too_long), 1 << 14)) is Answer.NOT_MINE


def test_of_encrypted_client_hello_the_outer_name_is_seen() -> None:
    outer = hello(server_name(b"public.example"), extension(ECH, bytes(180)))
    assert keys(outer)["tls.sni"] == "public.example"


@pytest.mark.parametrize(
    "content",
    [
        body(server_name()),
        body(server_name(b"")),
        body(server_name(b".")),
        body(server_name(b"a.example", b"b.example")),
        body(server_name(b"a.example", kind=1)),
        body(server_name(b"a.example\x00.b.example")),
        body(server_name(b"a example")),
        body(server_name(b"a.example"), server_name(b"a.example")),
        body(extension(SERVER_NAME, b"")),
        body(extension(SERVER_NAME, b"\x00\x05\x00\x00\x09a.example")),
        body(extension(SERVER_NAME, vector(2, b"\x00\x00\x09a.example") + b"\x00")),
        body(extension(GREASE, b""), extension(GREASE, b"")),
        body(alpn()),
        body(alpn(b"")),
        body(alpn(b"h2", b"")),
        body(extension(ALPN, b"\x00\x03\x03h2")),
        body(versions()),
        body(extension(SUPPORTED_VERSIONS, b"\x03\x03\x04\x03")),
        body(version=0x0203),
        body(session_id=bytes(33)),
        body(suites=b""),
        body(suites=b"\x13\x01\x13"),
        body()[:20],
        body()[:34],
        body()[:70],
        body()[:-1],
        body() + b"\x00",
        body(b"\x00"),
        body(b"\x00\x00\x00\x05\x00"),
        body()[:-4] + b"\x00\x00\x00",
    ],
    ids=range(30),
)
def test_malformed_hellos(content: bytes) -> None:
    assert whole(content) is Answer.NOT_MINE
    data = records(message(content), 1 << 14)
    assert inspect(data) is Answer.NOT_MINE
    assert inspect(data[:-1]) is Answer.NEED_MORE


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /",
        b"\x80\x2e\x01",
        b"\x15\x03\x01\x00\x02",
        b"\x16\x02",
        b"\x16\xfe\xff",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x40\x01",
        b"\x16\x03\x03\x00\x10\x02",
        b"\x16\x03\x03\x00\x10\x01\x00\x47\xf8",
        b"\x16\x03\x01\x00\x01\x01\x17",
        b"\x16\x03\x01\x00\x01\x01\x14\x03\x01\x00\x01\x01",
    ],
    ids=repr,
)
def test_not_mine_as_soon_as_it_cannot_be_a_hello(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE
    assert inspect(beginning + real("curl-7.88.1-get")) is Answer.NOT_MINE


def test_bound() -> None:
    def padded(length: int) -> bytes:
        """A message of that length; 21 is the padding extension (RFC 7685)."""
        short = message(body(server_name(b"a.example"), extension(21, b"")))
        return message(body(server_name(b"a.example"), extension(21, bytes(length - len(short)))))

    # Over 16 KiB there are two records.
    longest = records(padded(BOUND - 10), 1 << 14)
    assert len(longest) == BOUND
    assert keys(longest)["tls.sni"] == "a.example"
    assert inspect(longest[:-1]) is Answer.NEED_MORE
    too_long = records(padded(BOUND - 9), 1 << 14)
    assert inspect(too_long[: BOUND - 1]) is Answer.NEED_MORE
    assert inspect(too_long[:BOUND]) is Answer.NOT_MINE
    assert inspect(too_long) is Answer.NOT_MINE


def test_bound_on_records() -> None:
    """All records are read again with every segment that comes."""
    content = payload(real("openssl-3.0.19-long"))

    def cut_into(count: int) -> bytes:
        rest = content[count - 1 :]
        return records(content[: count - 1], 1) + records(rest, len(rest))

    assert keys(cut_into(MAX_RECORDS))["tls.sni"] == "long.example"
    assert inspect(cut_into(MAX_RECORDS + 1)) is Answer.NOT_MINE
    tiny = records(content, 1)
    whole = MAX_RECORDS * 6
    assert inspect(tiny[:whole]) is Answer.NEED_MORE
    assert all(inspect(tiny[:length]) is Answer.NOT_MINE for length in range(whole + 1, len(tiny) + 1))
