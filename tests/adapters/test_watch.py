"""Watcher with the kernel's own events, on real directories, joined with NginxFiles as the daemon joins them.

No test here looks again by itself (`rescan` is an hour) unless it is about that, so what is found came by an event.
Silence is proved by a change that must be told, made after the one that must not be.
"""

import asyncio
import ctypes
import errno
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from controller.adapters import watch
from controller.adapters.nginx.files import DiskReader
from controller.adapters.watch import Watcher
from controller.conf.parse import digest
from tests.adapters.watched import HOUR, House, kernel_watches, relink, replace, until, upstream

QUEUE = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
READING = 0x1 | 0x10 | 0x20  # IN_ACCESS, IN_CLOSE_NOWRITE, IN_OPEN


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def test_a_file_replaced_by_a_rename_is_told_and_read(house: House) -> None:
    async with house.watched():
        replace(house.app, upstream("app", 82))
        await house.reads(app=[82])
        assert house.told == [{"sites/app.conf"}]
        assert house.files.parsed == 3  # two at first, and the one that changed


async def test_a_file_written_in_place_is_told_and_read(house: House) -> None:
    async with house.watched():
        house.app.write_text(upstream("app", 82))
        await house.reads(app=[82])
        with house.app.open("a") as file:
            file.write(upstream("more", 83))
        await house.reads(app=[82], more=[83])


async def test_an_editor_that_moves_the_old_file_aside_is_followed_and_its_own_files_are_not(house: House) -> None:
    async with house.watched():
        swap = house.sites / ".app.conf.swp"
        swap.write_bytes(b"b0VIM 9.0")
        (house.sites / "4913").write_text("")
        (house.sites / "4913").unlink()
        backup = house.sites / "app.conf~"
        house.app.rename(backup)
        house.app.write_text(upstream("app", 82))
        backup.unlink()
        swap.unlink()
        await house.reads(app=[82])
        assert set().union(*house.told) == {"sites/app.conf"}


async def test_a_touch_a_chmod_and_a_rewrite_of_the_same_are_not_told(house: House) -> None:
    async with house.watched():
        os.utime(house.app)
        house.app.chmod(0o600)
        house.app.write_text(house.app.read_text())
        replace(house.app, house.app.read_text())
        (house.sites / "app.conf.bak").write_text("upstream {")
        (house.sites / "README").write_text("nothing of nginx")
        await house.says_nothing_but(house.conf, f"http {{ include sites/*.conf; {upstream('more', 83)} }}")


async def test_reading_makes_no_events_and_only_directories_are_watched(house: House) -> None:
    async with house.watched():
        masks = kernel_watches()
        assert masks.keys() == {each.stat().st_ino for each in (house.folder, house.sites, house.toml.parent)}
        assert not any(mask & READING for mask in masks.values())


async def test_a_link_in_sites_enabled_is_followed_when_its_target_is_edited_and_when_it_is_swapped(
    house: House,
) -> None:
    available = house.folder / "available"
    available.mkdir()
    (available / "blue").write_text(upstream("app", 91))
    (available / "green").write_text(upstream("app", 92))
    house.app.unlink()
    house.app.symlink_to("../available/blue")
    async with house.watched():
        await house.watching(available)
        replace(available / "blue", upstream("app", 93))
        await house.reads(app=[93])
        relink(house.app, "../available/green")
        await house.reads(app=[92])
        replace(available / "green", upstream("app", 94))
        await house.reads(app=[94])
        assert house.told == [{"sites/app.conf"}] * 3


async def test_a_config_map_is_followed_when_its_data_link_is_swapped(house: House) -> None:
    for version, port in ("..v1", 91), ("..v2", 92), ("..v3", 93):
        (house.sites / version).mkdir()
        (house.sites / version / "app.conf").write_text(upstream("app", port))
    (house.sites / "..data").symlink_to("..v1")
    house.app.unlink()
    house.app.symlink_to("..data/app.conf")
    async with house.watched():
        for version, port in ("..v2", 92), ("..v3", 93):
            relink(house.sites / "..data", version)
            await house.reads(app=[port])
        shutil.rmtree(house.sites / "..v1")
        (house.sites / "..v3" / "app.conf").write_text(upstream("app", 94))
        await house.reads(app=[94])
        assert house.told == [{"sites/app.conf"}] * 3


async def test_files_that_join_and_leave_an_include_pattern_are_told(house: House) -> None:
    async with house.watched():
        more = house.sites / "more.conf"
        more.write_text(upstream("more", 83))
        await house.reads(app=[81], more=[83])
        more.unlink()
        await house.reads(app=[81])
        more.symlink_to("gone")
        await until(lambda: "more.conf" in house.error, "a dangling link is an error as for nginx")
        assert house.told == [{"sites/more.conf"}] * 3


async def test_the_directory_of_a_pattern_without_matches_is_watched_and_one_that_is_missing_is_waited_for(
    house: House,
) -> None:
    empty, missing = house.folder / "empty", house.folder / "a" / "b"
    empty.mkdir()
    house.include("empty/*.conf", "a/b/*.conf")
    async with house.watched():
        (empty / "app.conf").write_text(upstream("app", 82))
        await house.reads(app=[82])
        missing.parent.mkdir()
        await house.watching(missing.parent)
        missing.mkdir()
        await house.watching(missing)
        (missing / "more.conf").write_text(upstream("more", 83))
        await house.reads(app=[82], more=[83])


async def test_a_pattern_over_directories_takes_up_new_ones(house: House) -> None:
    (house.sites / "one").mkdir()
    house.include("sites/*/nginx/[a-z]*.conf", "sites/*/upstream")
    async with house.watched():
        await house.watching(house.sites / "one")
        (house.sites / "one" / "nginx").mkdir()
        await house.watching(house.sites / "one" / "nginx")
        (house.sites / "one" / "nginx" / "app.conf").write_text(upstream("app", 82))
        await house.reads(app=[82])
        (house.sites / "two").mkdir()
        await house.watching(house.sites / "two")
        (house.sites / "two" / "upstream").write_text(upstream("more", 83))
        await house.reads(app=[82], more=[83])


async def test_a_directory_that_vanishes_and_comes_back_is_watched_again(house: House) -> None:
    async with house.watched():
        shutil.rmtree(house.sites)
        await house.reads()
        house.sites.mkdir()
        await house.watching(house.sites)
        house.app.write_text(upstream("app", 82))
        await house.reads(app=[82])
        house.sites.rename(house.folder / "old")
        house.sites.mkdir()
        house.app.write_text(upstream("app", 84))
        await house.reads(app=[84])
        await house.watching(house.sites)
        replace(house.app, upstream("app", 85))
        await house.reads(app=[85])
        (house.folder / "old").rename(house.folder / "older")


async def test_a_link_to_a_directory_is_followed(house: House) -> None:
    for name, port in ("blue", 91), ("green", 92):
        (house.folder / name).mkdir()
        (house.folder / name / "app.conf").write_text(upstream("app", port))
    current = house.folder / "links" / "current"
    current.parent.mkdir()
    current.symlink_to(house.folder / "blue")
    house.include("links/current/*.conf")
    async with house.watched():
        await house.watching(current.parent, house.folder / "blue")
        relink(current, "../green")
        await house.reads(app=[92])
        await house.watching(house.folder / "green")
        (house.folder / "green" / "app.conf").write_text(upstream("app", 93))
        await house.reads(app=[93])


async def test_links_in_a_circle_are_survived(house: House) -> None:
    (house.folder / "x").symlink_to("y")
    (house.folder / "y").symlink_to("x")
    house.include("x/*.conf", "sites/*.conf")
    async with house.watched():
        replace(house.app, upstream("app", 82))
        await house.reads(app=[82])


async def test_a_broken_file_is_told_and_so_is_its_mending(house: House) -> None:
    async with house.watched():
        house.app.write_text("upstream app { server 127.0.0.1:82\n}")
        await until(lambda: f"{house.app}:2" in house.error, "the error")
        assert house.ports == {"app": [81]}
        house.app.write_text(upstream("app", 82))
        await house.reads(app=[82])


async def test_a_file_that_is_missing_at_the_start_is_waited_for(house: House) -> None:
    house.include("parts/app.conf")
    async with house.watched():
        assert "parts/app.conf" in house.error
        (house.folder / "parts").mkdir()
        await house.watching(house.folder / "parts")
        (house.folder / "parts" / "app.conf").write_text(upstream("app", 82))
        await house.reads(app=[82])
        house.conf.rename(house.folder / "away")
        await until(lambda: "nginx.conf" in house.error, "the main file is gone")
        (house.folder / "away").rename(house.conf)
        await house.reads(app=[82])


async def test_the_file_of_a_lua_hook_is_followed(house: House) -> None:
    lua = house.folder / "lua"
    lua.mkdir()
    hook = lua / "app.lua"
    hook.write_text("-- nothing yet")
    house.app.write_text(f"upstream app {{ server 127.0.0.1:81; balancer_by_lua_file {hook}; }}")
    async with house.watched():
        assert house.ports == {}
        hook.write_text('require("headgate").balance("app")')
        await house.reads(app=[81])


async def test_headgate_s_own_settings_are_followed_whatever_nginx_includes(house: House) -> None:
    async with house.watched():
        house.include()
        await house.reads()
        replace(house.toml, "[log]")
        await until(lambda: {"etc/headgate.toml"} in house.told, "the settings")
        replace(house.toml, "[api]")
        await until(lambda: house.told.count({"etc/headgate.toml"}) > 1, "the settings again")
        await asyncio.gather(*house.reading)
        house.include("sites/*.conf")
        await house.reads(app=[81])
        assert house.told == [{"nginx.conf"}, {"etc/headgate.toml"}, {"etc/headgate.toml"}, {"nginx.conf"}]


async def test_a_change_between_reading_and_following_is_not_missed(house: House) -> None:
    async with house.watched() as watcher:
        former = {str(house.app): digest(b"as it was read")}
        watcher.follow(former, {})
        await until(lambda: house.told == [{"sites/app.conf"}], "the change")


async def test_directories_that_are_not_followed_any_more_are_not_watched(house: House) -> None:
    inode = house.sites.stat().st_ino
    async with house.watched():
        house.include()
        await house.reads()
        await until(lambda: inode not in kernel_watches(), "sites is let go")
        assert house.conf.parent.stat().st_ino in kernel_watches()


@asynccontextmanager
async def alone(path: Path, told: list[frozenset[str]]) -> AsyncIterator[None]:
    """A watcher that nobody tells to follow anything: after its first look, only time makes it look again."""
    watcher = Watcher(told.append, {str(path): DiskReader().digest(str(path))}, quiet=0.01, rescan=0.05)
    watcher.start()
    try:
        yield
    finally:
        await watcher.close()


async def test_changes_without_an_event_are_found_by_looking_again(tmp_path: Path) -> None:
    path = tmp_path / "nginx.conf"
    told: list[frozenset[str]] = []
    with path.open("w") as file:  # no event before it is closed
        async with alone(path, told):
            for count in 1, 2, 3:
                file.write("#\n")
                file.flush()
                await until(lambda count=count: told == [{str(path)}] * count, "the change")


async def test_without_the_kernel_s_watches_changes_are_found_by_looking_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted() -> None:
        raise OSError(errno.EMFILE, "inotify instance limit reached")

    monkeypatch.setattr(watch, "InotifyFD", exhausted)
    path = tmp_path / "nginx.conf"
    told: list[frozenset[str]] = []
    with capture_logs() as logs:
        async with alone(path, told):
            for count in 1, 2, 3:
                replace(path, "#" * count)
                await until(lambda count=count: told == [{str(path)}] * count, "the change")
    assert [line["reason"] for line in logs] == ["inotify instance limit reached; raise fs.inotify.max_user_instances"]


@pytest.fixture
def held_interpreter() -> Iterator[None]:
    """No other thread runs unless the test waits."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(before)


async def test_after_an_overflow_of_the_kernel_s_queue_the_change_is_found(
    house: House, held_interpreter: None, caplog: pytest.LogCaptureFixture
) -> None:
    rename = ctypes.PyDLL(None).rename  # unlike os.rename, it lets no other thread run: nobody reads the queue
    names = [os.fsencode(house.sites / name) for name in ("a", "b")]
    (house.sites / "a").touch()
    async with house.watched():
        for _ in range(QUEUE // 4 + 1):
            assert rename(*names) == rename(*names[::-1]) == 0
        assert rename(os.fsencode(house.sites / "a"), os.fsencode(house.sites / "more.conf")) == 0
        await until(lambda: {"sites/more.conf"} in house.told, "the change whose event was lost")
    assert "overflowed" in caplog.text


async def test_a_burst_of_writes_is_told_a_few_times_and_ends_with_the_last_content(house: House) -> None:
    async with house.watched(quiet=0.3, patience=2.0):
        began = time.monotonic()
        for port in range(1001, 2001):
            await asyncio.to_thread(replace, house.app, upstream("app", port))
        took = time.monotonic() - began
        await house.reads(app=[2000])
        assert 1 <= len(house.told) <= 2 + took / 0.3


async def test_an_unending_stream_of_writes_is_told_all_the_same(house: House) -> None:
    async with house.watched(quiet=HOUR, patience=0.2):
        deadline = time.monotonic() + 20
        while not house.told:
            assert time.monotonic() < deadline
            await asyncio.to_thread(replace, house.app, upstream("app", 82))


async def test_our_own_write_is_not_told(house: House) -> None:
    async with house.watched() as watcher:
        mine, created = upstream("app", 82), house.sites / "ours.conf"
        watcher.expect(str(house.app), digest(mine.encode()))
        watcher.expect(str(created), digest(b"# ours\n"))
        replace(house.app, mine)
        replace(created, "# ours\n")
        await house.says_nothing_but(house.conf, f"http {{ include sites/*.conf; {upstream('more', 83)} }}")
        await house.reads(app=[82], more=[83])
        house.told.clear()
        watcher.expect(str(created), "")
        created.unlink()
        await house.says_nothing_but(house.conf, "http { include sites/*.conf; }")


async def test_our_own_write_through_a_link_is_not_told(house: House) -> None:
    target = house.folder / "target"
    house.app.rename(target)
    house.app.symlink_to(target)
    (house.sites / "twin.conf").symlink_to(house.app)
    house.include("sites/app.conf")
    async with house.watched() as watcher:
        mine = upstream("app", 82)
        watcher.expect(str(target), digest(mine.encode()))
        replace(target, mine)
        await until(lambda: not watcher._expected, "it was seen")
        mine = upstream("app", 83)
        watcher.expect(str(house.sites / "twin.conf"), digest(mine.encode()))
        replace(target, mine)
        await house.says_nothing_but(house.conf, "http { include sites/app.conf; include sites/app.conf*; }")


async def test_somebody_else_s_write_in_the_place_of_our_own_is_told(house: House) -> None:
    async with house.watched() as watcher:
        watcher.expect(str(house.app), digest(upstream("app", 82).encode()))
        replace(house.app, upstream("app", 83))
        await house.reads(app=[83])
        replace(house.app, upstream("app", 82))
        await house.reads(app=[82])


async def test_a_write_that_was_taken_back_leaves_nothing_expected(house: House) -> None:
    async with house.watched() as watcher:
        former, mine = house.app.read_text(), upstream("app", 82)
        watcher.expect(str(house.app), digest(mine.encode()))
        replace(house.app, mine)
        watcher.expect(str(house.app), digest(former.encode()))
        replace(house.app, former)
        replace(house.conf, "http { include sites/*.conf; }")
        await until(lambda: {"nginx.conf"} in house.told, "the marker")
        replace(house.app, mine)
        await house.reads(app=[82])


async def test_a_defect_while_looking_is_logged_and_watching_goes_on(house: House) -> None:
    async with house.watched() as watcher:
        with capture_logs() as logs:
            watcher.follow({"not\0a path": ""}, {})
            await until(lambda: logs, "the log")
            await house.read()
            replace(house.app, upstream("app", 82))
            await house.reads(app=[82])
        assert "failed" in logs[0]["event"]


async def test_closing_ends_the_watches_and_what_comes_after_is_not_told(house: House) -> None:
    async with house.watched() as watcher:
        pass
    assert kernel_watches() == {}
    replace(house.app, upstream("app", 82))
    watcher.follow({str(house.app): "other"}, {})
    await watcher.close()
    assert house.told == []
