"""The registry: an id has one meaning for ever, a publish is all or nothing, and readers see it when they ask."""

from __future__ import annotations

import contextlib
import ipaddress
import lzma
import multiprocessing
import random
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerd import config
from steerd.control.registry import Reader, Registry
from steerd.control.store import SCHEMA
from steerd.core.choice import Chooser
from steerd.core.engine import NO_TARGET, Engine, IdBlock, Plan, TargetIds, no_state
from steerd.core.marks import FIRST_TARGET_ID
from steerd.errors import RegistryError
from steerd.model import TCP, Answer, Extension, IPAddress, Outcome, Target
from steerd.wire import portext
from steerd.wire.packet import SYN, Packet

ENDPOINT = ipaddress.ip_address("203.0.113.10")
ENDPOINT6 = ipaddress.ip_address("2001:db8::10")
OLD = Path(__file__).parents[1] / "vectors" / "registry"
_fork = multiprocessing.get_context("fork")


def publish(directory: Path, text: str) -> Plan:
    registry = Registry(str(directory))
    try:
        return registry.publish(config.parse(text, "steerd.toml"))
    finally:
        registry.close()


@contextmanager
def reading(directory: Path) -> Iterator[Reader]:
    reader = Reader(str(directory))
    try:
        yield reader
    finally:
        reader.close()


@contextmanager
def another_process(work: Callable[[Connection], None]) -> Iterator[Connection]:
    """`work` in a process of its own, forked now: LMDB lets a process open an environment once. Killed at the end."""
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=work, args=(theirs,))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def steered_to(reader: Reader, engine: Engine, extension: int) -> Target | None:
    """Where a SYN with this extension goes; None: nowhere."""
    carried = portext.encode_ipv4(Extension(extension, 0), portext.Numbers())
    source = ipaddress.ip_address("198.51.100.1").packed
    decision = engine.decide_syn(Packet(4, source, ENDPOINT.packed, TCP, 40000, 443, SYN, 1, 0, carried, b"", b"", b""))
    if decision.outcome is not Outcome.STEER:
        return None
    target = reader.target(decision.target_id)
    assert target is not None
    return target


def requested(reader: Reader, engine: Engine, host: str, source: str = "198.51.100.1", version: int = 4) -> str | None:
    """Where an HTTP request goes; None: nowhere."""
    endpoint = ENDPOINT if version == 4 else ENDPOINT6
    packet = Packet(
        version, ipaddress.ip_address(source).packed, endpoint.packed, TCP, 1, 443, 0, 1, 0, b"", b"", b"", b""
    )
    decision = engine.decide_first(packet, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert decision is not Answer.NEED_MORE
    return str(reader.target(decision.target_id)) if decision.outcome is Outcome.STEER else None


def simple(name: str = "s", *, pool: str = "10.64.0.0/24", more: str = "", gateway: str = "") -> str:
    return f"""
    [gateway]
    {gateway}
    [pools.p]
    prefixes = ["{pool}"]
    mode = "anyip"
    [services.{name}]
    endpoints = ["{ENDPOINT}:443/tcp"]
    inspect = ["port-extension"]
    {more}
    """


BY_EXTENSION = 'extension_pool = { pool = "p", by = "extension", port = 8080 }\n'


# ---- ids ----


def test_the_first_id_is_the_first_that_marks_leave_to_targets(tmp_path: Path) -> None:
    plan = publish(tmp_path, simple(more='default = "10.64.0.7:80"'))
    assert plan.services[0].default == TargetIds(FIRST_TARGET_ID, NO_TARGET)
    with reading(tmp_path) as reader:
        assert str(reader.target(FIRST_TARGET_ID)) == "10.64.0.7:80"
        for never_given in (0, 1, FIRST_TARGET_ID - 1, FIRST_TARGET_ID + 1, 0xFFFFFFFF):
            assert reader.target(never_given) is None


def test_a_pool_takes_a_block_of_ids_and_each_of_them_is_an_alias(tmp_path: Path) -> None:
    mapping = publish(tmp_path, simple(more=BY_EXTENSION)).services[0].mapping
    assert mapping is not None
    (block,) = mapping.ipv4
    assert (block.length, mapping.ipv6) == (256, [])
    with reading(tmp_path) as reader:
        assert str(reader.target(block.first_id - 1)) == "None"
        assert str(reader.target(block.first_id)) == "10.64.0.0:8080"
        assert str(reader.target(block.first_id + 255)) == "10.64.0.255:8080"
        assert reader.target(block.first_id + 256) is None


def test_what_reader_and_publish_say_is_the_same_plan(tmp_path: Path) -> None:
    plan = publish(tmp_path, simple(more=BY_EXTENSION))
    with reading(tmp_path) as reader:
        assert reader.refresh() == plan


# Pools that overlap between configurations, in every way: same first address and another length, part of another.
POOLS = [
    ["10.64.0.0/30"],
    ["10.64.0.0/29"],
    ["10.64.0.4/30", "fd00:64::/126"],
    ["fd00:64::/126"],
    ["10.64.0.0/30", "10.64.0.4/30"],
    ["10.64.0.4/30", "10.64.0.0/30"],
    ["fd00:64::/127", "10.64.0.0/32"],
]


@st.composite
def configurations(draw: st.DrawFn) -> str:
    prefixes = draw(st.sampled_from(POOLS))
    size = "size = 1" if draw(st.integers(0, 5)) == 0 else ""
    addresses = [ipaddress.ip_network(prefix)[0] for prefix in prefixes]
    target = st.builds(Target, st.sampled_from(addresses[: 1 if size else None]), st.sampled_from([0, 80, 81]))
    port = draw(st.sampled_from(['"same"', "80", "81"]))
    text = f"[pools.p]\nprefixes = {prefixes}\n{size}\n"
    for number in range(draw(st.integers(1, 2))):
        text += f"""
        [services.s{number}]
        endpoints = ["203.0.113.1{number}:443/tcp", "[2001:db8::1{number}]:443/tcp"]
        inspect = ["port-extension"]
        default = "{draw(target)}"
        extension_pool = {{ pool = "p", by = "extension", port = {port} }}
        """
    return text


Meaning = tuple[IPAddress, int, int]
"""First address, length, port."""


def ids_of(made: config.Config, plan: Plan) -> Iterator[tuple[Meaning, IdBlock]]:
    """What a plan's ids ought to mean, by the configuration that it was made of."""
    for service, published in zip(made.services, plan.services, strict=True):
        for target in service.default:
            ids = published.default
            yield (target.address, 1, target.port), IdBlock(ids.ipv4 if target.address.version == 4 else ids.ipv6, 1)
        assert service.extension_pool is not None and published.mapping is not None
        pool, port = service.extension_pool.pool, service.extension_pool.port
        for version, blocks in ((4, published.mapping.ipv4), (6, published.mapping.ipv6)):
            for block, given_ids in zip(pool.blocks(version), blocks, strict=True):
                assert given_ids.length == block.length
                yield (block.first, block.length, port), given_ids


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(configurations(), st.booleans()), min_size=1, max_size=6))
def test_an_id_is_given_once_and_keeps_its_meaning(steps: list[tuple[str, bool]]) -> None:
    with tempfile.TemporaryDirectory(prefix="steerd-test-") as directory:
        given_ids: dict[Meaning, IdBlock] = {}
        registry = Registry(directory)
        for text, reopen in steps:
            made = config.parse(text, "steerd.toml")
            for meaning, block in ids_of(made, registry.publish(made)):
                assert given_ids.setdefault(meaning, block) == block, "another id for a target that has one"
            if reopen:
                registry.close()
                registry = Registry(directory)
        registry.close()

        used = [id_ for block in given_ids.values() for id_ in range(block.first_id, block.first_id + block.length)]
        assert len(used) == len(set(used)), "an id with two meanings"
        assert min(used) >= FIRST_TARGET_ID
        with reading(Path(directory)) as reader:
            for (first, length, port), block in given_ids.items():
                for step in range(length):
                    assert reader.target(block.first_id + step) == Target(first + step, port)


# ---- no room ----


def test_where_the_mark_bits_have_no_room_left_nothing_changes(tmp_path: Path) -> None:
    """Ids are never used again, so that they run out over configurations of which each would fit."""
    bits = 'mark_bits = "0-19"'  # ids up to 524287
    route = '[[services.{0}.routes]]\nwhen = {{ "portext.dst" = 9 }}\ntarget = "{1}:9"\n'
    first = publish(
        tmp_path, simple("a", pool="10.0.0.0/14", gateway=bits, more=BY_EXTENSION + route.format("a", "10.0.0.1"))
    )
    second = simple("b", pool="10.4.0.0/14", gateway=bits, more=BY_EXTENSION + route.format("b", "10.4.0.1"))
    expected = (
        r"^the mark bits have room for target ids up to 524287, and 10\.4\.0\.0 \(\+262143\) would need 524305:"
        r" widen gateway\.mark_bits$"
    )
    for _ in range(2):
        with pytest.raises(RegistryError, match=expected):
            publish(tmp_path, second)
    with reading(tmp_path) as reader:
        assert reader.refresh() == first
        engine = Engine(first, reader.route)
        assert str(steered_to(reader, engine, 9)) == "10.0.0.1:9"
        assert str(steered_to(reader, engine, 10)) == "10.0.0.9:8080"
        assert reader.target(FIRST_TARGET_ID + (1 << 18) + 1) is None
    third = publish(tmp_path, simple("c", pool="10.4.0.0/15", gateway=bits, more=BY_EXTENSION))
    assert third.services[0].mapping is not None
    assert third.services[0].mapping.ipv4 == [IdBlock(FIRST_TARGET_ID + (1 << 18) + 1, 1 << 17)]


def test_an_id_given_under_wider_mark_bits_is_refused_under_narrower_ones(tmp_path: Path) -> None:
    publish(tmp_path, simple(pool="10.0.0.0/12", more=BY_EXTENSION))
    late = simple(pool="10.64.0.0/24", more='default = "10.64.0.1:80"')
    plan = publish(tmp_path, late)
    assert plan.services[0].default.ipv4 == FIRST_TARGET_ID + (1 << 20)
    with pytest.raises(RegistryError, match=r"up to 524287, and 10\.64\.0\.1 \(\+0\) would need 1048592"):
        publish(tmp_path, late.replace("[gateway]", '[gateway]\nmark_bits = "0-19"'))
    with reading(tmp_path) as reader:
        assert reader.refresh() == plan


# ---- opening ----


def test_a_registry_of_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    publish(tmp_path, simple(more=BY_EXTENSION))
    with lmdb.open(str(tmp_path / "registry"), max_dbs=8) as env, env.begin(write=True) as txn:
        txn.put(b"schema", struct.pack("!I", SCHEMA + 1), db=env.open_db(b"meta", txn=txn))
    before = (tmp_path / "registry" / "data.mdb").read_bytes()
    sentence = (
        f"registry has schema {SCHEMA + 1}, and this steerd reads schemas up to {SCHEMA}: it was written by a newer"
        " steerd, which must be used again$"
    )
    for _ in range(2):  # the second time: the first one has let go of the files
        with pytest.raises(RegistryError, match=sentence):
            Registry(str(tmp_path))
    assert (tmp_path / "registry" / "data.mdb").read_bytes() == before


def test_a_registry_of_an_older_schema_is_brought_up_to_this_one(tmp_path: Path) -> None:
    """tests/vectors/registry holds one that was written by the last steerd before schema 2."""
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "data.mdb").write_bytes(lzma.decompress((OLD / "schema-1.mdb.xz").read_bytes()))
    registry = Registry(str(tmp_path))
    plan = registry.publish(config.load(OLD / "schema-1.toml"))
    sessions = [(each.id, each.targets, each.source, each.origin) for each in registry.sessions.page("web", "", 10)]
    assert sessions == [
        ("of-the-api", ["10.64.0.8:8080"], "198.51.100.7", "api"),
        ("of-the-file", ["10.64.0.7:8080"], None, "configuration"),
    ]
    registry.routes.put("web", {"http.host": "new.example"}, "10.64.0.9:8080", None)
    registry.close()
    # The ids that it gave then are those that it gives now.
    assert plan.services[0].mapping is not None
    assert plan.services[0].mapping.ipv4 == [IdBlock(19, 256)]
    assert plan.services[0].default == TargetIds(531, NO_TARGET)
    with reading(tmp_path) as reader:
        engine = Engine(reader.refresh(), reader.route)
        for host, target in (("a.example", 2), ("x.b.example", 3), ("new.example", 9), ("other.example", 1)):
            assert requested(reader, engine, host) == f"10.64.0.{target}:8080"
    Registry(str(tmp_path)).close()
    with lmdb.open(str(tmp_path / "registry"), max_dbs=8) as env, env.begin() as txn:
        assert txn.get(b"schema", db=env.open_db(b"meta", txn=txn)) == struct.pack("!I", SCHEMA)


def test_a_registry_of_schema_2_keeps_its_routes_and_leases_and_takes_groups(tmp_path: Path) -> None:
    """tests/vectors/registry holds one that was written by the last steerd before schema 3."""
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "data.mdb").write_bytes(lzma.decompress((OLD / "schema-2.mdb.xz").read_bytes()))
    registry = Registry(str(tmp_path))
    assert registry.groups_in_use() == []
    registry.publish(config.load(OLD / "schema-2.toml"))
    assert [lease.name for lease in registry.leases.page("", 10)] == ["kept"]
    assert registry.routes.put("web", {"http.host": "new.example"}, "10.64.0.9:8080", None)[1] is False
    several = ["10.64.0.7:8080", "10.64.0.8:8080"]
    registry.routes.put("web", {"http.host": "several.example"}, several, None, "first-alive")
    registry.close()
    with reading(tmp_path) as reader:
        engine = Engine(reader.refresh(), reader.route, chooser=Chooser(reader.group, no_state))
        for host, target in (("a.example", 2), ("new.example", 9), ("kept.example", 0), ("several.example", 7)):
            assert requested(reader, engine, host) == f"10.64.0.{target}:8080"
    with lmdb.open(str(tmp_path / "registry"), max_dbs=8) as env, env.begin() as txn:
        assert txn.get(b"schema", db=env.open_db(b"meta", txn=txn)) == struct.pack("!I", SCHEMA)


def test_a_state_directory_that_cannot_be_one_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match=r"^the registry in .*/file/registry cannot be opened: .*Not a directory"):
        Registry(str(tmp_path / "file"))
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "data.mdb").write_bytes(b"something else" * 1000)
    with pytest.raises(RegistryError, match=r"^the registry in .* cannot be opened: "):
        Registry(str(tmp_path))
    with pytest.raises(RegistryError, match=r"^the registry in .* cannot be read: "):
        Reader(str(tmp_path))


def test_there_is_nothing_to_read_before_a_registry_is_made_and_no_plan_before_one_is_published(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"^the registry in .* cannot be read: .*No such file"):
        Reader(str(tmp_path))
    with lmdb.open(str(tmp_path / "registry"), max_dbs=8):
        pass  # a main process that has only just begun
    with pytest.raises(RegistryError, match=r"^the registry in .* cannot be read: "):
        Reader(str(tmp_path))
    Registry(str(tmp_path)).close()
    with reading(tmp_path) as reader, pytest.raises(RegistryError, match=r"^the registry holds no plan: "):
        reader.refresh()


# ---- writer and readers at once ----


def test_a_reader_sees_a_publish_only_after_refresh(tmp_path: Path) -> None:
    """Plan and routes change together for a worker, whatever the main process does meanwhile."""
    route = '[[services.{0}.routes]]\nwhen = {{ "portext.dst" = {1} }}\ntarget = "10.64.0.{1}:9"\n'

    def write(requests: Connection) -> None:
        registry = Registry(str(tmp_path))
        while True:
            registry.publish(config.parse(requests.recv(), "steerd.toml"))
            requests.send(registry.forget_dead_readers())

    with another_process(write) as writer:
        writer.send(simple("old", more=route.format("old", 1)))
        writer.recv()
        with reading(tmp_path) as reader:
            plan = reader.refresh()
            writer.send(simple("new", more=route.format("new", 2)))
            writer.recv()
            engine = Engine(plan, reader.route)
            assert [str(steered_to(reader, engine, extension)) for extension in (1, 2)] == ["10.64.0.1:9", "None"]
            # An id has one meaning for ever, so that there is nothing to wait for.
            assert str(reader.target(FIRST_TARGET_ID + 1)) == "10.64.0.2:9"
            plan = reader.refresh()
            assert plan.services[0].name == "new"
            engine = Engine(plan, reader.route)
            assert [str(steered_to(reader, engine, extension)) for extension in (1, 2)] == ["None", "10.64.0.2:9"]
            assert str(reader.target(FIRST_TARGET_ID)) == "10.64.0.1:9"


def test_the_slot_of_a_reader_that_was_killed_is_freed(tmp_path: Path) -> None:
    publish(tmp_path, simple(more=BY_EXTENSION))

    def read(requests: Connection) -> None:
        requests.recv()
        reader = Reader(str(tmp_path))
        requests.send(reader.refresh().services[0].name)
        requests.recv()

    with another_process(read) as reader:
        registry = Registry(str(tmp_path))
        reader.send("read")
        assert reader.recv() == "s"
        assert registry.forget_dead_readers() == 0
    assert registry.forget_dead_readers() == 1
    assert registry.forget_dead_readers() == 0
    registry.close()


ROUTES = 100


def numbered(number: int) -> str:
    """Configurations that differ in every target and every route, so that half of one would be seen."""
    routes = "".join(
        f'{{ when = {{ "portext.dst" = {1 + number % 7 + index} }},'
        f' target = "10.{number // 256}.{number % 256}.{index}:{1 + number}" }},\n'
        for index in range(ROUTES)
    )
    return simple(f"s{number}", pool="10.0.0.0/8", more=f"routes = [{routes}]")


def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_plan_whole(tmp_path: Path) -> None:
    rng = random.Random(1)
    published = 0
    publish(tmp_path, numbered(0))
    for _ in range(50):

        def write(progress: Connection, start: int = published) -> None:
            configurations = [config.parse(numbered(start + step), "steerd.toml") for step in (1, 2, 3)]
            registry = Registry(str(tmp_path))
            progress.send((start, start + 1))
            while True:
                for step, made in enumerate(configurations):
                    registry.publish(made)
                    progress.send((start + 1 + step, start + 1 + (step + 1) % 3))

        with another_process(write) as progress:
            done, begun = progress.recv()
            time.sleep(rng.uniform(0, 0.02))
        # What was said before the kill was done; of what was begun, all or nothing is.
        with contextlib.suppress(EOFError):
            while progress.poll():
                done, begun = progress.recv()
        with reading(tmp_path) as reader:
            plan = reader.refresh()
            found = int(plan.services[0].name[1:])
            assert found in (done, begun)
            engine = Engine(plan, reader.route)
            for index in range(ROUTES):
                target = steered_to(reader, engine, 1 + found % 7 + index)
                assert str(target) == f"10.{found // 256}.{found % 256}.{index}:{1 + found}"
            assert steered_to(reader, engine, 1 + found % 7 + ROUTES) is None
            assert found % 7 == 0 or steered_to(reader, engine, found % 7) is None
        published = found
