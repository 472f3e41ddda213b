"""ConfWriter on real files: all or none, whatever goes wrong in between, and killed at every step."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controller.adapters.nginx import writer as module
from controller.adapters.nginx.writer import Changed, CheckFailed, ConfWriter, OwnFile, WriteFailed
from tests.support.nginx import wait_until

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root can mount, and become somebody else")


class House:
    """A directory with three files (the first through a link) and one of ours; `wanted` changes, deletes, creates."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.conf = path / "nginx"
        self.journal = path / "journal"
        self.checks = 0
        self.seen: dict[str, bytes] = {}
        (self.conf / "available").mkdir(parents=True)
        (self.conf / "available" / "site").write_bytes(b"site 1;\r\n")
        (self.conf / "site").symlink_to("available/site")
        (self.conf / "nginx.conf").write_bytes(b"main \xff 1;")
        (self.conf / "gone.conf").write_bytes(b"ours\n")
        (self.conf / "nginx.conf").chmod(0o640)
        self.before = self.files()

    @property
    def wanted(self) -> list[OwnFile]:
        return [
            OwnFile(f"{self.conf}/site", b"site 1;\r\n", b"site 2;\r\n"),
            OwnFile(f"{self.conf}/nginx.conf", b"main \xff 1;", b"main \xff 2;"),
            OwnFile(f"{self.conf}/new.conf", None, b"new\n"),
            OwnFile(f"{self.conf}/gone.conf", b"ours\n", None),
        ]

    def files(self) -> dict[str, bytes]:
        """Everything that lies there, hidden companions included."""
        return {str(p.relative_to(self.conf)): p.read_bytes() for p in self.conf.rglob("*") if p.is_file()}

    def after(self) -> dict[str, bytes]:
        return {
            "available/site": b"site 2;\r\n",
            "site": b"site 2;\r\n",
            "nginx.conf": b"main \xff 2;",
            "new.conf": b"new\n",
        }

    async def check(self) -> None:
        self.checks += 1
        self.seen = {name: data for name, data in self.files().items() if not Path(name).name.startswith(".")}

    def writer(self, checker: Callable[[], object] | None = None) -> ConfWriter:
        async def check() -> None:
            await self.check()
            if checker:
                checker()

        return ConfWriter(self.journal, check)

    def leftovers(self) -> list[str]:
        """What says that a transaction is under way. (A journal that was never finished is none.)"""
        return [path.name for path in self.journal.iterdir() if path.name not in ("lock", "transaction.new")]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def fail(error: BaseException) -> Callable[[], None]:
    def raising() -> None:
        raise error

    return raising


async def test_all_files_are_written_and_then_checked(house: House) -> None:
    await house.writer().apply(house.wanted)
    assert house.files() == house.seen == house.after()
    assert (house.checks, house.leftovers()) == (1, [])


async def test_a_link_stays_a_link_and_its_target_is_written(house: House) -> None:
    await house.writer().apply(house.wanted)
    assert (house.conf / "site").readlink() == Path("available/site")


async def test_mode_and_extended_attributes_stay(house: House) -> None:
    path = house.conf / "nginx.conf"
    os.setxattr(path, "user.note", b"mine")
    await house.writer().apply(house.wanted)
    assert path.stat().st_mode & 0o7777 == 0o640
    assert os.getxattr(path, "user.note") == b"mine"
    assert (house.conf / "new.conf").stat().st_mode & 0o7777 == 0o644


@needs_root
async def test_owner_and_access_list_stay(house: House) -> None:
    path = house.conf / "nginx.conf"
    os.chown(path, 33, 34)
    # version 2; user:: rw, user:1000 r, group:: -, mask r, other -
    entries = [(1, 6, -1), (2, 4, 1000), (4, 0, -1), (16, 4, -1), (32, 0, -1)]
    acl = b"\2\0\0\0" + b"".join(
        t.to_bytes(2, "little") + p.to_bytes(2, "little") + (i & 0xFFFFFFFF).to_bytes(4, "little")
        for t, p, i in entries
    )
    os.setxattr(path, "system.posix_acl_access", acl)
    await house.writer().apply(house.wanted)
    assert path.read_bytes() == b"main \xff 2;"
    assert (path.stat().st_uid, path.stat().st_gid) == (33, 34)
    assert os.getxattr(path, "system.posix_acl_access") == acl


async def test_nothing_to_write_is_neither_written_nor_checked(house: House) -> None:
    inode = (house.conf / "nginx.conf").stat().st_ino
    await house.writer().apply([OwnFile(f"{house.conf}/nginx.conf", b"main \xff 1;", b"main \xff 1;")])
    assert (house.conf / "nginx.conf").stat().st_ino == inode
    assert house.checks == 0


async def test_a_failed_check_brings_every_file_back_with_its_times(house: House) -> None:
    stats = {name: (house.conf / name).stat() for name in house.before}
    with pytest.raises(CheckFailed, match=r'unknown directive "x" in /a:3 .*every file is as it was before'):
        await house.writer(fail(CheckFailed('[emerg] unknown directive "x" in /a:3'))).apply(house.wanted)
    assert house.seen == house.after(), "the check must see the new files"
    assert house.files() == house.before
    for name, was in stats.items():
        now = (house.conf / name).stat()
        assert (now.st_ino, now.st_mtime_ns, now.st_mode) == (was.st_ino, was.st_mtime_ns, was.st_mode)
    assert house.leftovers() == []


async def test_a_cancelled_check_brings_every_file_back(house: House) -> None:
    checking = asyncio.Event()

    async def for_ever() -> None:
        checking.set()
        await asyncio.Event().wait()

    applying = asyncio.create_task(ConfWriter(house.journal, for_ever).apply(house.wanted))
    await checking.wait()
    applying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await applying
    assert house.files() == house.before
    assert house.leftovers() == []


async def test_a_write_that_is_cancelled_in_its_middle_brings_every_file_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    real = module._sync_directory

    def slow(path: str) -> None:
        if path == str(house.conf):
            reached.set()
            go_on.wait(10)
        real(path)

    monkeypatch.setattr(module, "_sync_directory", slow)
    applying = asyncio.create_task(house.writer().apply(house.wanted))
    await asyncio.to_thread(reached.wait, 10)
    assert (house.conf / "new.conf").exists()
    applying.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await applying
    assert (house.files(), house.leftovers(), house.checks) == (house.before, [], 0)


@pytest.mark.parametrize("number", range(4))
def test_a_file_that_somebody_changed_since_it_was_read_stops_everything(house: House, number: int) -> None:
    wanted = house.wanted
    path = Path(wanted[number].path)
    path.write_bytes(b"by somebody else")
    there = house.files()
    with pytest.raises(Changed, match=path.name):
        asyncio.run(house.writer().apply(wanted))
    assert house.files() == there
    assert house.checks == 0


async def test_a_file_deleted_between_read_and_write_stops_everything(house: House) -> None:
    (house.conf / "nginx.conf").unlink()
    with pytest.raises(Changed, match=r"nginx\.conf vanished after it was read"):
        await house.writer().apply(house.wanted)
    assert house.files() == {name: data for name, data in house.before.items() if name != "nginx.conf"}


async def test_a_file_changed_while_we_write_keeps_that_change_and_the_others_go_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._create

    def edited_meanwhile(path: Path, content: bytes, file: module._File) -> None:
        real(path, content, file)
        if path.name.startswith(".new.conf"):
            other = house.conf / "saved"
            other.write_bytes(b"by somebody else")
            other.replace(house.conf / "nginx.conf")

    monkeypatch.setattr(module, "_create", edited_meanwhile)
    with pytest.raises(Changed, match=r"nginx\.conf was changed"):
        await house.writer().apply(house.wanted)
    assert house.files() == house.before | {"nginx.conf": b"by somebody else"}
    assert house.leftovers() == []


async def test_a_file_changed_during_a_check_that_fails_is_left_and_its_original_kept(house: House) -> None:
    def meddle() -> None:
        (house.conf / "nginx.conf").write_bytes(b"by somebody else")
        raise CheckFailed("no")

    with pytest.raises(CheckFailed, match=r"nginx\.conf was changed by somebody else and stays; its original is (\S+)"):
        await house.writer(meddle).apply(house.wanted)
    kept = {".nginx.conf.headgate-old": b"main \xff 1;"}
    assert house.files() == house.before | {"nginx.conf": b"by somebody else"} | kept


async def test_two_names_of_one_file_are_refused(house: House) -> None:
    both = [OwnFile(f"{house.conf}/{name}", b"site 1;\r\n", b"x") for name in ("site", "available/site")]
    with pytest.raises(WriteFailed, match="one and the same"):
        await house.writer().apply(both)
    assert house.files() == house.before


async def test_without_hard_links_the_original_is_kept_as_a_copy(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(CheckFailed):
        await house.writer(fail(CheckFailed("no"))).apply(house.wanted)
    assert house.files() == house.before
    assert (house.conf / "nginx.conf").stat().st_mode & 0o7777 == 0o640
    await house.writer().apply(house.wanted)
    assert house.files() == house.after()


async def test_another_writer_waits_for_its_turn(house: House) -> None:
    order = []
    checking, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        order.append("first checks")
        checking.set()
        await go_on.wait()

    first = asyncio.create_task(ConfWriter(house.journal, slow).apply(house.wanted))
    await checking.wait()
    after = OwnFile(f"{house.conf}/new.conf", b"new\n", b"newer\n")
    second = asyncio.create_task(house.writer(lambda: order.append("second checks")).apply([after]))
    lock = str(house.journal / "lock")  # one descriptor holds it, one waits
    await asyncio.to_thread(wait_until, lambda: _opened().count(lock) == 2, "the second one waits")
    order.append("second waits")
    go_on.set()
    await asyncio.gather(first, second)
    assert order == ["first checks", "second waits", "second checks"]
    assert house.files() == house.after() | {"new.conf": b"newer\n"}


def _opened() -> list[str]:
    descriptors = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
    return [os.readlink(each) for each in descriptors if os.path.lexists(each)]


async def test_a_lock_that_never_becomes_free_is_an_error(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT", 0.1)
    house.journal.mkdir()
    with (house.journal / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(WriteFailed, match=r"another headgate has been writing .*fuser"):
            await house.writer().apply(house.wanted)
    assert house.files() == house.before


# --- the disk and its rights --------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(target: Path, *options: str) -> Iterator[None]:
    """Something mounted at `target` for a while."""
    if subprocess.run(["mount", *options, target], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


def small_disk(target: Path) -> contextlib.AbstractContextManager[None]:
    target.mkdir()
    return mounted(target, "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs")


def fill(path: Path) -> None:
    """Take all the room that is left on this disk."""
    with path.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while out.write(b"x" * 512):
            pass


@needs_root
@pytest.mark.parametrize("full", ["nginx", "journal"])
def test_a_disk_that_is_full_in_the_middle_of_a_write_leaves_all_as_it_was(tmp_path: Path, full: str) -> None:
    with small_disk(tmp_path / full):
        house = House(tmp_path)
        filler = tmp_path / full / "filler"
        fill(filler)
        os.truncate(filler, filler.stat().st_size - 4096 * (full == "nginx"))  # the first file still has room
        before = house.files()
        large = OwnFile(f"{house.conf}/nginx.conf", b"main \xff 1;", b"y" * 40000)
        with pytest.raises(
            WriteFailed, match=r"No space left on device \(make room on the disk; every file is as it was"
        ):
            asyncio.run(house.writer().apply([house.wanted[0], large, *house.wanted[2:]]))
        assert house.files() == before
        assert house.checks == 0
        filler.unlink()
        asyncio.run(house.writer().apply(house.wanted))
        assert house.files() == house.after()


@needs_root
def test_a_full_disk_does_not_keep_files_from_going_back(tmp_path: Path) -> None:
    with small_disk(tmp_path / "nginx"):
        house = House(tmp_path)

        def refuse() -> None:
            fill(house.conf / "filler")
            raise CheckFailed("no")

        with pytest.raises(CheckFailed):
            asyncio.run(house.writer(refuse).apply(house.wanted))
        assert (house.conf / "filler").stat().st_size > 10_000
        (house.conf / "filler").unlink()
        assert house.files() == house.before


@needs_root
def test_a_read_only_file_system_is_named_with_the_remedy(tmp_path: Path) -> None:
    house = House(tmp_path)
    with mounted(house.conf, "--bind", str(house.conf)):
        subprocess.run(["mount", "-o", "remount,ro,bind", house.conf], check=True)
        with pytest.raises(WriteFailed, match=r"Read-only file system .*mount it for writing; every file is as it was"):
            asyncio.run(house.writer().apply(house.wanted))
        assert (house.files(), house.leftovers()) == (house.before, [])


@needs_root
def test_a_file_that_is_mounted_on_its_own_is_named_with_the_remedy(tmp_path: Path) -> None:
    house = House(tmp_path)
    path = house.conf / "nginx.conf"
    with mounted(path, "--bind", str(path)):
        with pytest.raises(WriteFailed, match=r"nginx\.conf cannot be written: .*mounted on its own"):
            asyncio.run(house.writer().apply(house.wanted))
        assert (house.files(), house.leftovers()) == (house.before, [])


@needs_root
@pytest.mark.parametrize("denied", ["directory", "journal", "owner", "file"])
def test_what_is_not_permitted_is_named_and_changes_nothing(tmp_path: Path, denied: str) -> None:
    house = House(tmp_path)
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.chown(path, 65534, 65534, follow_symlinks=False)
    if denied == "directory":
        house.conf.chmod(0o555)
    elif denied == "journal":
        tmp_path.chmod(0o555)
    else:
        os.chown(house.conf / "nginx.conf", 0, 0)
        (house.conf / "nginx.conf").chmod(0o644 if denied == "owner" else 0o600)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    child = os.fork()
    if child == 0:
        status = 3
        try:
            os.setgid(65534)
            os.setuid(65534)
            asyncio.run(house.writer().apply(house.wanted))
        except WriteFailed as error:
            told = "denied" in error.message or "not permitted" in error.message
            status = 0 if told and "sudo" in error.remedy else 4
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert house.files() == house.before
    assert not house.journal.exists() or house.leftovers() == []


# --- killed at every step -----------------------------------------------------------------------------------------

KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from controller.adapters.nginx.writer import ConfWriter
from tests.adapters.test_writer import House

house = object.__new__(House)
house.path, house.checks = Path(sys.argv[1]), 0
house.conf, house.journal = house.path / "nginx", house.path / "journal"
wanted, last, steps = house.wanted, int(sys.argv[2]), 0

def audit(event, arguments):
    global steps
    if event in ("open", "os.rename", "os.remove", "os.link", "os.mkdir") and str(house.path) in str(arguments[0]):
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)

async def check():
    open(house.conf / "nginx.conf").close()

sys.addaudithook(audit)
asyncio.run(getattr(ConfWriter(house.journal, check), sys.argv[3])(*([wanted] if sys.argv[3] == "apply" else [])))
print(steps)
"""


def killed_at(house: House, step: int, method: str = "apply") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(house.path), str(step), method]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=30)


def test_a_kill_at_any_step_leaves_all_or_nothing_after_recovery(tmp_path: Path) -> None:
    whole = killed_at(House(tmp_path / "whole"), 0)
    assert whole.returncode == 0, whole.stderr
    steps = int(whole.stdout)
    assert steps > 20
    outcomes, mixed = [], 0
    for step in range(1, steps + 1):
        house = House(tmp_path / str(step))
        assert killed_at(house, step).returncode == -signal.SIGKILL
        mixed += house.files() not in (house.before, house.after())
        said = asyncio.run(house.writer().recover())
        assert house.files() in (house.before, house.after()), f"step {step}"
        assert (house.conf / "nginx.conf").stat().st_mode & 0o7777 == 0o640
        assert not house.journal.exists() or house.leftovers() == []
        assert house.checks == 0
        outcomes.append(house.files() == house.after())
        assert not (said and outcomes[-1]), "what is said to be undone must be undone"
        assert asyncio.run(house.writer().recover()) == ()
    assert outcomes == sorted(outcomes), "once it is done it stays done"
    assert True in outcomes
    assert mixed > 5, "kills in between must have been among them"


@pytest.mark.slow
def test_a_kill_during_the_recovery_of_a_kill_is_recovered_as_well(tmp_path: Path) -> None:
    steps = int(killed_at(House(tmp_path / "whole"), 0).stdout)
    for step in range(steps * 2 // 3, 0, -steps // 6):
        for second in range(1, 40):
            house = House(tmp_path / f"{step} {second}")
            killed_at(house, step)
            again = killed_at(house, second, "recover")
            asyncio.run(house.writer().recover())
            assert house.files() == house.before
            assert not house.journal.exists() or house.leftovers() == []
            if again.returncode == 0:
                break
        else:
            pytest.fail("the recovery never came to its end")


async def test_the_next_write_recovers_first(house: House) -> None:
    steps = int(killed_at(House(house.path / "whole"), 0).stdout)
    killed_at(house, steps // 2)
    await house.writer().apply(house.wanted)
    assert house.files() == house.after()


async def test_a_journal_that_cannot_be_read_is_named(house: House) -> None:
    house.journal.mkdir()
    (house.journal / "transaction.json").write_text("{")
    with pytest.raises(WriteFailed, match=r"transaction\.json cannot be read"):
        await house.writer().recover()
