"""The `server` lines of scale-out and scale-in in real files: added and taken out, however often that is asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from controller.adapters.nginx.members import ATTEMPTS, NginxMembers
from controller.adapters.nginx.writer import Changed, CheckFailed, ConfWriter, Edit
from controller.ports import ConfigError

CONF = b"http {\n    include app.conf;\n}\n"
APP = b"upstream app { # ours\n    server 127.0.0.1:8001;  # first\n    server 127.0.0.1:8002;\n}"
LINE = b"    server 127.0.0.1:8003 weight=3;\n"


class Files:
    """nginx.conf, the file of an upstream, and a writer whose check can refuse them."""

    def __init__(self, path: Path) -> None:
        self.path, self.refuses = path / "nginx", ""
        self.path.mkdir()
        (self.path / "nginx.conf").write_bytes(CONF)
        (self.path / "app.conf").write_bytes(APP)
        self.writer = ConfWriter(path / "journal", self._check)
        self.members = NginxMembers(str(self.path / "nginx.conf"), self.writer)

    async def _check(self) -> None:
        if self.refuses:
            raise CheckFailed(self.refuses, "mend it")

    def app(self) -> bytes:
        return (self.path / "app.conf").read_bytes()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def test_a_line_is_added_and_taken_out_and_each_may_be_asked_again(files: Files) -> None:
    said = await files.members.add("app", "127.0.0.1:8003", 3)
    assert said == f"added to {files.path}/app.conf"
    assert files.app() == APP[:-1] + LINE + b"}"
    assert await files.members.add("app", "127.0.0.1:8003", 3) == "it stands there already"
    assert await files.members.remove("app", "127.0.0.1:8003") == f"taken out of {files.path}/app.conf"
    assert files.app() == APP
    assert await files.members.remove("app", "127.0.0.1:8003") == "it is gone already"
    assert files.app() == APP
    await files.members.add("app", "127.0.0.1:8004", 1)
    assert b"server 127.0.0.1:8004;" in files.app()


async def test_many_at_once_do_not_lose_each_other(files: Files) -> None:
    addresses = [f"127.0.0.1:{port}" for port in range(8010, 8020)]
    await asyncio.gather(*(files.members.add("app", each, 1) for each in addresses))
    assert all(f"server {each};".encode() in files.app() for each in addresses)
    await asyncio.gather(*(files.members.remove("app", each) for each in addresses))
    assert files.app() == APP


async def test_what_nginx_does_not_take_leaves_the_file_as_it_was(files: Files) -> None:
    files.refuses = "[emerg] no"
    with pytest.raises(CheckFailed, match="no"):
        await files.members.add("app", "127.0.0.1:8003", 1)
    assert files.app() == APP


@pytest.mark.parametrize("often", [1, ATTEMPTS])
async def test_an_edit_by_somebody_else_meanwhile_stays_and_ours_is_planned_anew(
    files: Files, monkeypatch: pytest.MonkeyPatch, often: int
) -> None:
    written, left = files.writer.apply, often

    async def apply(edits: Sequence[Edit]) -> None:
        nonlocal left
        if left:
            left -= 1
            (files.path / "app.conf").write_bytes(files.app() + b"\n# %d" % left)
        await written(edits)

    monkeypatch.setattr(files.writer, "apply", apply)
    if often < ATTEMPTS:
        await files.members.add("app", "127.0.0.1:8003", 3)
        assert files.app() == APP[:-1] + LINE + b"}\n# 0"
    else:
        with pytest.raises(Changed):
            await files.members.add("app", "127.0.0.1:8003", 3)
        assert files.app().startswith(APP)


@pytest.mark.parametrize(
    ("adding", "removing", "said"),
    [
        (["127.0.0.1:8001"], [], "127.0.0.1:8001 is a server of upstream"),
        ([], ["127.0.0.1:9"], "has no server 127.0.0.1:9"),
        ([], ["127.0.0.1:8001", "127.0.0.1:8002"], "would have no server"),
    ],
)
async def test_what_cannot_be_edited_is_told_before_anything_is_written(
    files: Files, adding: list[str], removing: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        await files.members.check("app", adding, removing, 1)
    await files.members.check("app", ["127.0.0.1:8003"], ["127.0.0.1:8001"], 1)
    assert files.app() == APP


async def test_a_file_that_cannot_be_read_as_nginx_would_is_named(files: Files) -> None:
    (files.path / "app.conf").write_bytes(b"upstream app {")
    for work in (files.members.check("app", ["127.0.0.1:8003"], [], 1), files.members.add("app", "127.0.0.1:8003", 1)):
        with pytest.raises(ConfigError, match=r"app\.conf:1"):
            await work


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """A directory as a unit with ProtectSystem=strict finds it; for root, whom no mode keeps out, by a mount."""
    if os.geteuid():
        path.chmod(0o500)
        yield
        path.chmod(0o700)
        return
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", path], check=True)
        yield
    finally:
        subprocess.run(["umount", path], check=True)


async def test_a_daemon_that_may_not_write_says_so_before_anything_begins_and_what_helps(files: Files) -> None:
    with read_only(files.path), pytest.raises(ConfigError) as refused:
        await files.members.check("app", ["127.0.0.1:8003"], [], 1)
    assert refused.value.message.startswith(f"the daemon may not write {files.path}")
    assert f"ReadWritePaths={files.path}" in refused.value.remedy
