"""Claims: a session without a source goes to one client only, whatever the main process does meanwhile; no move is
lost; and what clients do never takes more than one link of a kind for each session."""

from __future__ import annotations

import asyncio
import ipaddress
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from steerd.control.claims import Claimant, Collector, directory
from steerd.control.registry import Reader, Registry
from steerd.core.sessions import Claim, OnNewSource, Session
from steerd.errors import RegistryError, SteerdError
from tests.unit.test_sessions_table import publish

SOURCES = [ipaddress.ip_address("198.51.100.1").packed, ipaddress.ip_address("2001:db8:1::1").packed]
ID = "a / b//c"  # nothing that a path would leave as it is
_fork = multiprocessing.get_context("fork")


class Scene:
    """One gateway: a table with one session without a source, workers and the main process's collector."""

    def __init__(self, run_dir: Path, rule: OnNewSource) -> None:
        self.registry = Registry(str(run_dir))
        publish(self.registry, rule=rule)
        self.registry.sessions.put("tv", ID, "10.64.0.1:554", None)
        self.exclusive = rule == "deny"
        self.run_dir = run_dir
        self.collector = Collector(str(run_dir), self.registry.sessions)

    def found(self) -> Session:
        found = self.registry.sessions.find("tv", ID)
        assert found is not None
        return found

    def source(self) -> bytes:
        return self.found().source

    def claim(
        self, source: bytes, *, serial: int | None = None, find: Callable[[str, str], Session | None] | None = None
    ) -> bool:
        """A claim by a worker that looked the session up a while ago."""
        claimant = Claimant(str(self.run_dir), find or self.registry.sessions.find)
        return claimant.claim(Claim("tv", ID, serial or self.found().serial, source, self.exclusive))

    def links(self) -> list[str]:
        return sorted(link.name for link in directory(str(self.run_dir)).iterdir())


@pytest.fixture
def deny(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path, "deny")
    yield scene
    scene.registry.close()


@pytest.fixture
def move(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path, "move")
    yield scene
    scene.registry.close()


# ---- exclusive ----


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_one_has_it_before_and_after_it_is_written_down(deny: Scene, first: int) -> None:
    winner, loser = SOURCES[first], SOURCES[1 - first]
    for _ in range(2):
        assert deny.claim(winner)
        assert not deny.claim(loser)
    assert (deny.source(), len(deny.links())) == (b"", 1)
    assert deny.collector.collect() == 1
    assert (deny.source(), deny.links()) == (winner, [])
    # Workers that looked the session up when it had no source yet.
    assert not deny.claim(loser)
    assert deny.claim(winner)
    assert deny.collector.collect() == 0
    assert (deny.source(), deny.links()) == (winner, [])


def test_a_claim_is_refused_if_another_one_was_written_down_between_its_link_and_its_look(deny: Scene) -> None:
    """Without the second look this worker would go by its own link, made where the winner's had just been removed."""
    winner, loser = SOURCES
    assert deny.claim(winner)
    deny.collector.collect()

    def look(service: str, session_id: str) -> Session | None:
        assert len(deny.links()) == 1
        return deny.registry.sessions.find(service, session_id)

    assert not deny.claim(loser, find=look)


def test_a_claim_whose_link_is_collected_before_its_look_is_granted(deny: Scene) -> None:
    def look(service: str, session_id: str) -> Session | None:
        assert deny.collector.collect() == 1
        return deny.registry.sessions.find(service, session_id)

    assert deny.claim(SOURCES[0], find=look)


def test_a_link_that_is_removed_between_failing_to_make_it_and_reading_it(
    deny: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner, loser = SOURCES
    assert deny.claim(winner)
    read, reads = Path.readlink, 0

    def removed(link: Path) -> Path:
        nonlocal reads
        reads += 1
        monkeypatch.undo()
        deny.collector.collect()
        return read(link)

    monkeypatch.setattr(Path, "readlink", removed)
    assert not deny.claim(loser)
    assert reads == 1
    serial = deny.found().serial
    assert deny.claim(winner, serial=serial)


@pytest.mark.parametrize("anew", [True, False])
def test_no_claim_reaches_a_session_that_was_removed_or_defined_anew(deny: Scene, anew: bool) -> None:
    old = deny.found().serial
    assert deny.claim(SOURCES[0], serial=old)
    deny.registry.sessions.remove("tv", ID)
    if anew:
        deny.registry.sessions.put("tv", ID, "10.64.0.1:554", None)
    assert not deny.claim(SOURCES[0], serial=old)
    assert deny.collector.collect() == 0
    assert deny.links() == []
    if anew:
        assert deny.source() == b""
        assert deny.claim(SOURCES[1])


def test_what_could_not_be_written_down_is_kept_and_goes_on_to_decide(
    deny: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_claims: Iterable[Claim]) -> int:
        raise RegistryError("the disk is full")

    winner, loser = SOURCES
    assert deny.claim(winner)
    monkeypatch.setattr(deny.registry.sessions, "claim", full)
    for _ in range(2):
        with pytest.raises(RegistryError):
            deny.collector.collect()
        assert deny.claim(winner)
        assert not deny.claim(loser)
    monkeypatch.undo()
    # A new main process, after a crash.
    assert Collector(str(deny.run_dir), deny.registry.sessions).collect() == 1
    assert deny.source() == winner


def test_where_no_link_can_be_made_nothing_is_granted(deny: Scene) -> None:
    directory(str(deny.run_dir)).rmdir()
    with pytest.raises(FileNotFoundError):
        deny.claim(SOURCES[0])


def _race(run_dir: Path, index: int, start: Connection) -> None:
    """A worker in a process of its own: claims each session as soon as it is told its serial, and says whether it has
    it now, and whether it has it a little later."""
    reader = Reader(str(run_dir))
    claimant = Claimant(str(run_dir), reader.session)
    source = bytes([198, 51, 100, index])
    while True:
        session_id, serial = start.recv()
        start.send([claimant.claim(Claim("tv", session_id, serial, source, True)) for _ in range(20)])


def test_of_clients_that_race_in_many_workers_one_has_the_session_from_first_to_last(tmp_path: Path) -> None:
    workers = []
    Registry(str(tmp_path)).close()  # for the readers to have something to open; LMDB lets a process open it once
    for index in range(4):
        ours, theirs = _fork.Pipe()
        process = _fork.Process(target=_race, args=(tmp_path, index, theirs))
        process.start()
        workers.append((process, ours))
    registry = Registry(str(tmp_path))
    publish(registry)
    collector = Collector(str(tmp_path), registry.sessions)
    stopped = threading.Event()

    def collect() -> None:
        while not stopped.is_set():
            collector.collect()

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for number in range(100):
            session_id = f"s{number}"
            registry.sessions.put("tv", session_id, "10.64.0.1:554", None)
            found = registry.sessions.find("tv", session_id)
            assert found is not None
            for _, pipe in workers:
                pipe.send((session_id, found.serial))
            answers = [pipe.recv() for _, pipe in workers]
            assert sorted(answers) == [[False] * 20] * 3 + [[True] * 20]
            stopped_at = registry.sessions.find("tv", session_id)
            assert stopped_at is not None
            winner = bytes([198, 51, 100, answers.index([True] * 20)])
            assert stopped_at.source in (b"", winner)
    finally:
        stopped.set()
        thread.join()
        for process, pipe in workers:
            process.kill()
            process.join()
            pipe.close()
    collector.collect()
    sources = [view.source for view in registry.sessions.page("tv", "", 1000)]
    assert len(sources) == 100
    assert None not in sources
    registry.close()


# ---- moves ----


def test_each_source_goes_on_and_the_last_one_stays(move: Scene) -> None:
    for source in (*SOURCES, SOURCES[0]):
        assert move.claim(source)
    assert len(move.links()) == 1
    assert move.collector.collect() == 1
    assert (move.source(), move.links()) == (SOURCES[0], [])
    assert move.claim(SOURCES[1])
    move.collector.collect()
    assert move.source() == SOURCES[1]


def test_a_move_while_another_one_is_written_down_is_not_lost(move: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    assert move.claim(SOURCES[0])
    write = move.registry.sessions.claim

    def meanwhile(claims: Iterable[Claim]) -> int:
        changed = write(claims)
        monkeypatch.undo()
        assert move.claim(SOURCES[1])
        return changed

    monkeypatch.setattr(move.registry.sessions, "claim", meanwhile)
    move.collector.collect()
    assert (move.source(), len(move.links())) == (SOURCES[0], 1)
    move.collector.collect()
    assert (move.source(), move.links()) == (SOURCES[1], [])


def test_a_thousand_moves_are_one_link_and_one_write(move: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1000):
        assert move.claim(bytes([10, 0, number // 256, number % 256]))
    assert len(move.links()) == 1
    written: list[Claim] = []
    write = move.registry.sessions.claim

    def counted(claims: Iterable[Claim]) -> int:
        written.extend(claims)
        return write(written)

    monkeypatch.setattr(move.registry.sessions, "claim", counted)
    assert move.collector.collect() == 1
    assert [claim.source for claim in written] == [bytes([10, 0, 3, 231])]


@pytest.mark.parametrize("superseded", [False, True])
def test_what_a_killed_main_process_had_taken_is_written_down_by_the_next(move: Scene, superseded: bool) -> None:
    assert move.claim(SOURCES[0])
    (link,) = directory(str(move.run_dir)).iterdir()
    link.rename(link.with_name(link.name.replace("move", "taken")))
    (link.parent / "new-1").symlink_to("a worker was killed")
    if superseded:
        assert move.claim(SOURCES[1])
    collector = Collector(str(move.run_dir), move.registry.sessions)
    assert collector.collect() == 1
    assert (move.source(), move.links()) == (SOURCES[superseded], [])


def test_a_worker_that_failed_half_way_is_not_in_its_own_way(move: Scene) -> None:
    (directory(str(move.run_dir)) / f"new-{os.getpid()}").symlink_to("left")
    for source in SOURCES:
        assert move.claim(source)
    move.collector.collect()
    assert move.source() == SOURCES[1]


# ---- the main process ----


def test_claims_are_collected_without_being_asked_for_and_failures_are_told(
    move: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    failures = iter(["the disk is full"])
    write = move.registry.sessions.claim

    def sometimes(claims: Iterable[Claim]) -> int:
        for failure in failures:
            raise RegistryError(failure)
        return write(claims)

    monkeypatch.setattr(move.registry.sessions, "claim", sometimes)

    async def run() -> None:
        task = asyncio.create_task(move.collector.keep_collecting(told.append))
        async with asyncio.timeout(30):
            while not move.source():
                await asyncio.sleep(0.01)
        task.cancel()

    assert move.claim(SOURCES[0])
    asyncio.run(run())
    assert (move.source(), told) == (SOURCES[0], ["the disk is full"])


def test_a_run_dir_that_cannot_hold_claims_is_a_sentence(move: Scene, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SteerdError, match=r"/file/claims cannot be prepared for workers: Not a directory$"):
        Collector(str(tmp_path / "file"), move.registry.sessions)
