"""The SQLite store against real files: round trips, faults of the file system, a second daemon, kill -9."""
# ruff: noqa: ASYNC220, ASYNC221, ASYNC240 - a test may block its own loop

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller.adapters.store.schema import MIGRATIONS
from controller.adapters.store.sqlite import SqliteStore
from controller.core.events import Note
from controller.core.model import (
    Admin,
    Change,
    ChangeKind,
    ChangeStatus,
    Foreseen,
    Health,
    Master,
    Mate,
    Peer,
    Quarantine,
    Step,
    StepName,
    StepState,
    Warmth,
    WarmUp,
)
from controller.core.outcome import Happened
from controller.ports import ChangeRecord, Delta, EventRecord, Saved, StepRecord, StoreError

PEER = Peer(
    admin=Admin.DRAIN,
    health=Health.DOWN,
    reason="refused after 3 tries — “Ω”",
    passes=0,
    fails=3,
    incumbent=True,
    warm_up=WarmUp(Warmth.RUNNING, elapsed=1.25, since=100.5, epoch=7, cause="restart"),
    quarantine=(Quarantine(130.0, "outlier"), Quarantine(float("inf"), "flapping")),
)
MASTER = Master(
    4711, 1700000000.25, "/usr/bin/python3.11", ((4712, 1700000001.0), (4713, 1700000002.0)), "app@1.service"
)
CHANGE = Change(
    id=3,
    kind=ChangeKind.RESTART,
    upstream="app",
    created=90.0,
    forced=True,
    steps=(
        Step(StepName.FIND, "a:1", state=StepState.DONE, started=91.0, ended=92.0, detail="pid 4711", master=MASTER),
        Step(StepName.DRAIN, "a:1", batch=1, state=StepState.RUNNING, started=92.0),
        Step(StepName.EMPTY, "a:1", batch=1),
    ),
)


def delta(**fields: object) -> Delta:
    values = {"now": 100.0, "wall": 5000.0, "boot": "boot-1", "revision": 1, "next_change": 4, "next_epoch": 8}
    return Delta(**{**values, **fields})  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "var" / "state.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    opened = SqliteStore(f"sqlite:///{path}")
    yield opened
    await opened.close()


async def reopened(store: SqliteStore) -> Saved:
    await store.close()
    again = SqliteStore(f"sqlite:///{store.path}")
    try:
        return await again.load()
    finally:
        await again.close()


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own that can really be full or read-only."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


async def test_an_empty_store_loads_as_nothing(store: SqliteStore) -> None:
    assert await store.load() == Saved()


async def test_what_was_saved_is_loaded_by_the_next_life(store: SqliteStore) -> None:
    await store.save(delta(peers={("app", "a:1"): PEER, ("app", "unix:/run/ä b.sock"): Peer()}, changes={3: CHANGE}))
    assert await reopened(store) == Saved(
        now=100.0,
        boot="boot-1",
        revision=1,
        next_change=4,
        next_epoch=8,
        peers={("app", "a:1"): PEER, ("app", "unix:/run/ä b.sock"): Peer()},
        changes={3: CHANGE},
    )


async def test_a_forgotten_peer_and_a_finished_change_are_not_loaded(store: SqliteStore) -> None:
    await store.save(delta(peers={("app", "a:1"): PEER, ("app", "b:1"): PEER}, changes={3: CHANGE}))
    finished = replace(CHANGE, status=ChangeStatus.DONE, ended=100.0)
    await store.save(delta(peers={("app", "a:1"): None}, changes={3: finished}))
    saved = await reopened(store)
    assert dict(saved.peers) == {("app", "b:1"): PEER}
    assert dict(saved.changes) == {}


async def test_a_record_has_wall_times_that_do_not_move_with_the_clock(store: SqliteStore) -> None:
    await store.save(delta(changes={3: CHANGE}))
    done = tuple(
        replace(step, state=StepState.DONE, started=step.started or 103.0, ended=104.0) for step in CHANGE.steps
    )
    later = replace(CHANGE, steps=done, status=ChangeStatus.FAILED, ended=104.0, error="it did not")
    await store.save(delta(now=104.0, wall=9004.0, changes={3: later}))
    assert await store.change(3) == ChangeRecord(
        *(3, "restart", "app", "failed", True),
        created_at=4990.0,
        ended_at=9004.0,
        error="it did not",
        steps=(
            StepRecord("find", "a:1", 0, "done", 4991.0, 4992.0, "pid 4711"),
            StepRecord("drain", "a:1", 1, "done", 4992.0, 9004.0, ""),
            StepRecord("empty", "a:1", 1, "done", 9003.0, 9004.0, ""),
        ),
        batch=1,
    )
    assert await store.change(4) is None


async def test_what_was_planned_of_a_change_and_what_it_did_stand_in_its_record(store: SqliteStore) -> None:
    foreseen = Foreseen(61.5, 2 / 3, 2, 3, 1.5, "a:2", 120.25)
    step = Step(StepName.EMPTY, "a:1", state=StepState.RUNNING, mates=(Mate("api", "a:1", True),))
    planned = replace(CHANGE, foreseen=foreseen, steps=(step,))
    await store.save(delta(changes={3: planned, 4: replace(CHANGE, id=4)}, peers={("api", "a:1"): Peer(held=3)}))
    assert (await store.unjudged(), (await store.load()).changes[3]) == ((), planned)
    ended = replace(planned, status=ChangeStatus.DONE, ended=99.0)
    await store.save(delta(changes={3: ended, 4: replace(CHANGE, id=4, status=ChangeStatus.DONE, ended=99.0)}))
    assert await store.unjudged() == (3,)
    happened = Happened(60.0, 2, None, "", 118.0)
    await store.save_outcome(3, happened)
    await store.save(delta(changes={3: ended}))
    record = await store.change(3)
    assert record is not None
    assert (record.plan, record.outcome, await store.unjudged()) == (foreseen, happened, ())
    plain = await store.change(4)
    assert plain is not None
    assert (plain.plan, plain.outcome) == (None, None)


async def test_a_store_of_an_older_version_is_taken_over(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(";".join(MIGRATIONS[:2]))
        document = '{"id":1,"kind":"restart","upstream":"app","steps":[],"created":90.0}'
        db.execute("INSERT INTO meta VALUES (1, 100.0, 'boot', 7, 2, 1)")
        db.execute("INSERT INTO change VALUES (1, 'restart', 'app', 'running', 0, 90.0, NULL, '', ?)", (document,))
        db.execute("PRAGMA user_version = 2")
        db.commit()
    store = SqliteStore(f"sqlite:///{path}")
    saved = await store.load()
    assert saved.changes == {1: Change(1, ChangeKind.RESTART, "app", (), 90.0)}
    record = await store.change(1)
    assert record is not None
    assert (record.status, record.plan, record.batch) == ("running", None, None)
    await store.save(delta(changes=saved.changes))
    record = await store.change(1)
    assert record is not None
    assert (record.batch, record.max_unavailable, record.workers) == (1, None, None)
    await store.close()


async def test_what_a_change_goes_by_stands_in_its_record_after_its_end(store: SqliteStore) -> None:
    asked = replace(CHANGE, batch=2, max_unavailable=1, workers=4)
    await store.save(delta(changes={3: asked, 4: replace(CHANGE, id=4)}))
    await store.save(delta(changes={3: replace(asked, status=ChangeStatus.DONE, ended=99.0)}))
    found = [(each.batch, each.max_unavailable, each.workers) for each in await store.changes()]
    assert found == [(1, None, None), (2, 1, 4)]
    record = await store.change(3)
    assert record is not None
    assert (record.status, record.batch, record.max_unavailable, record.workers) == ("done", 2, 1, 4)


async def test_changes_are_listed_newest_first_in_pages(store: SqliteStore) -> None:
    await store.save(delta(changes={n: replace(CHANGE, id=n) for n in range(1, 6)}))
    assert [record.id for record in await store.changes(limit=2)] == [5, 4]
    assert [record.id for record in await store.changes(limit=9, before=4)] == [3, 2, 1]
    assert (await store.changes(limit=1))[0].steps == ()


async def test_events_come_back_in_order_as_they_were_recorded(store: SqliteStore) -> None:
    notes = (
        Note("health", "a is down", "app", "a:1"),
        Note("change", "began", "app", change=3),
        Note("started", "hello"),
    )
    recorded = await store.save(delta(notes=notes))
    assert recorded == (
        EventRecord(1, 5000.0, "health", "a is down", "app", "a:1", None),
        EventRecord(2, 5000.0, "change", "began", "app", "", 3),
        EventRecord(3, 5000.0, "started", "hello"),
    )
    assert await store.events() == recorded
    assert await store.events(limit=2) == recorded[1:]
    assert await store.events(after=1, limit=1) == recorded[1:2]
    assert await store.events(after=3) == ()


async def test_only_the_newest_events_stay_and_no_id_comes_twice(path: Path) -> None:
    store = SqliteStore(f"sqlite:///{path}", keep_events=3)
    for number in range(5):
        await store.save(delta(notes=(Note("k", str(number)),)))
    assert [event.id for event in await store.events()] == [3, 4, 5]
    await store.close()


async def test_only_the_newest_changes_stay_with_their_steps_and_all_that_are_not_finished(path: Path) -> None:
    store = SqliteStore(f"sqlite:///{path}", keep_changes=3)
    done = replace(CHANGE, status=ChangeStatus.DONE, ended=99.0)
    await store.save(delta(next_change=6, changes={n: replace(done, id=n) for n in (1, 3, 4, 5)}))
    await store.save(delta(next_change=6, changes={2: replace(CHANGE, id=2)}))
    assert [record.id for record in await store.changes()] == [5, 4, 3, 2]
    await store.save(delta(next_change=8, changes={6: replace(CHANGE, id=6), 7: replace(done, id=7)}))
    assert [record.id for record in await store.changes()] == [7, 6, 5, 2]
    assert await store.change(4) is None
    found = [await store.change(number) for number in (2, 5)]
    assert [len(record.steps) for record in found if record] == [3, 3]
    await store.save(delta(next_change=8, changes={2: replace(done, id=2)}))
    assert [record.id for record in await store.changes()] == [7, 6, 5]
    await store.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert {change for (change,) in db.execute("SELECT change FROM step")} == {5, 6, 7}


async def test_a_failed_save_writes_nothing_of_it(store: SqliteStore) -> None:
    await store.save(delta(peers={("app", "a:1"): PEER}))
    broken = Note("kind", None)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="NOT NULL"):
        await store.save(delta(revision=2, peers={("app", "a:1"): None}, notes=(Note("k", "t"), broken)))
    assert (await store.load()).revision == 1
    assert await store.events() == ()
    await store.save(delta(revision=3))
    saved = await store.load()
    assert (saved.revision, set(saved.peers)) == (3, {("app", "a:1")})


async def test_directory_and_files_are_not_for_others(store: SqliteStore, path: Path) -> None:
    await store.save(delta())
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o027 == 0
    files = list(path.parent.iterdir())
    assert {file.name for file in files} >= {"state.db", "state.db-wal", "state.db.lock"}
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o137 == 0 for file in files)


async def test_a_second_daemon_is_told_who_holds_the_store_and_may_have_it_afterwards(
    store: SqliteStore, path: Path
) -> None:
    await store.save(delta(revision=7))
    second = SqliteStore(f"sqlite:///{path}")
    with pytest.raises(StoreError, match=rf"state.db is in use by another daemon \(pid {os.getpid()}\).*store.url"):
        await second.load()
    await store.close()
    assert (await second.load()).revision == 7
    await second.close()


async def test_a_file_that_is_no_database_is_kept_aside_and_a_new_store_begins(store: SqliteStore, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"hello " * 1000)
    path.with_name("state.db.corrupt-1").write_bytes(b"an earlier one")
    saved = await store.load()
    assert "state.db could not be read (file is not a database); it is kept as state.db.corrupt-2" in saved.lost
    assert replace(saved, lost="") == Saved()
    assert path.with_name("state.db.corrupt-2").read_bytes() == b"hello " * 1000
    assert path.with_name("state.db.corrupt-1").read_bytes() == b"an earlier one"
    await store.save(delta(peers={("app", "a:1"): PEER}))
    again = await reopened(store)
    assert (again.lost, dict(again.peers)) == ("", {("app", "a:1"): PEER})


async def test_a_damaged_database_is_kept_aside_with_its_log_and_a_new_store_begins(
    store: SqliteStore, path: Path
) -> None:
    await store.save(delta(notes=[Note("k", "t" * 500) for _ in range(200)]))
    await store.close()
    content = bytearray(path.read_bytes())
    for page in range(4096, len(content), 4096):
        content[page : page + 64] = b"\xff" * 64
    path.write_bytes(content)
    path.with_name("state.db-wal").write_bytes(b"its log")
    again = SqliteStore(f"sqlite:///{path}")
    assert "it is kept as state.db.corrupt-1" in (await again.load()).lost
    assert await again.events() == ()
    assert path.with_name("state.db.corrupt-1").exists()
    await again.close()


async def test_a_store_that_was_deleted_begins_anew(store: SqliteStore, path: Path) -> None:
    await store.save(delta(peers={("app", "a:1"): PEER}))
    await store.close()
    path.unlink()
    again = SqliteStore(f"sqlite:///{path}")
    assert await again.load() == Saved()
    await again.close()


async def test_a_document_that_does_not_fit_the_model_is_named(store: SqliteStore, path: Path) -> None:
    await store.save(delta(peers={("app", "a:1"): PEER}))
    await store.close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE peer SET document = replace(document, 'drain', 'drian')")
    again = SqliteStore(f"sqlite:///{path}")
    with pytest.raises(StoreError, match="peer app a:1 that cannot be read"):
        await again.load()
    await again.close()


async def test_a_store_of_a_newer_headgate_is_refused_and_not_touched(store: SqliteStore, path: Path) -> None:
    await store.load()
    await store.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    again = SqliteStore(f"sqlite:///{path}")
    with pytest.raises(StoreError, match="newer Headgate"):
        await again.load()
    await again.close()


@pytest.mark.parametrize("url", ["sqlite://state.db", "sqlite:///state.db", "sqlite:////var/", "postgres://x/y", ""])
def test_another_url_is_refused_with_the_right_form(url: str) -> None:
    with pytest.raises(StoreError, match="sqlite:////absolute/path"):
        SqliteStore(url)


async def test_a_full_disk_is_an_error_with_place_and_remedy_and_the_store_recovers(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "512k") as disk:
        store = SqliteStore(f"sqlite:///{disk}/state.db")
        await store.save(delta(revision=1, peers={("app", "a:1"): PEER}))
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        notes = [Note("k", "t" * 1000) for _ in range(300)]
        with pytest.raises(StoreError, match=r"state\.db.*full.*free space"):
            await store.save(delta(revision=2, peers={("app", "a:1"): None}, notes=notes))
        saved = await store.load()
        assert (saved.revision, dict(saved.peers)) == (1, {("app", "a:1"): PEER})
        ballast.unlink()
        await store.save(delta(revision=3))
        assert (await reopened(store)).revision == 3


async def test_a_read_only_directory_is_an_error_with_place_and_remedy(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "512k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        store = SqliteStore(f"sqlite:///{disk}/new/state.db")
        with pytest.raises(StoreError, match=r"disk/new/state\.db cannot be opened: Read-only.*writable"):
            await store.load()
        await store.close()


async def test_a_directory_that_is_a_file_is_an_error_with_place_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = SqliteStore(f"sqlite:///{tmp_path}/file/state.db")
    with pytest.raises(StoreError, match=r"file/state\.db cannot be opened"):
        await store.load()
    await store.close()


_SAVER = """
    import asyncio, sys
    from controller.adapters.store.sqlite import SqliteStore
    from controller.core.events import Note
    from controller.core.model import (Change, ChangeKind, Peer, Step, StepName)
    from controller.ports import Delta

    async def main():
        store = SqliteStore(sys.argv[1])
        n = (await store.load()).revision
        while True:
            n += 1
            steps = tuple(Step(StepName.UP, f"s{i}", detail=str(n)) for i in range(20))
            await store.save(Delta(
                now=n, wall=n, boot="b", revision=n, next_change=n, next_epoch=n,
                peers={("app", f"s{i}"): Peer(fails=n) for i in range(20)},
                changes={1: Change(1, ChangeKind.RESTART, "app", steps, created=0.0)}, notes=[Note("k", str(n))]))
            print(n, flush=True)

    asyncio.run(main())
"""


async def test_after_kill_9_in_the_middle_of_saves_the_last_whole_one_is_there(path: Path) -> None:
    source = random.Random(1)
    for _ in range(8):
        saver = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_SAVER), f"sqlite:///{path}"], stdout=subprocess.PIPE, text=True
        )
        assert saver.stdout is not None
        try:
            acknowledged = [int(saver.stdout.readline()) for _ in range(source.randrange(1, 60))][-1]
        finally:
            saver.send_signal(signal.SIGKILL)
            acknowledged = max([acknowledged, *map(int, saver.stdout.read().split())])
            saver.wait()
            saver.stdout.close()
        store = SqliteStore(f"sqlite:///{path}")
        saved = await store.load()
        assert saved.revision in (acknowledged, acknowledged + 1)
        assert {peer.fails for peer in saved.peers.values()} == {saved.revision}
        assert {step.detail for step in saved.changes[1].steps} == {str(saved.revision)}
        assert [event.text for event in await store.events(limit=1)] == [str(saved.revision)]
        record = await store.change(1)
        assert record is not None
        assert {step.detail for step in record.steps} == {str(saved.revision)}
        await store.close()
