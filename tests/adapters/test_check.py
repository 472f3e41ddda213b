"""`nginx -t` as it is run, and which nginx is found: real ones, and programs that misbehave on purpose."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from controller.adapters.nginx import check as module
from controller.adapters.nginx.check import Nginx, NginxMissing, check, find
from controller.adapters.nginx.writer import CheckFailed, ConfWriter, OwnFile
from tests.support.nginx import Nginx as Running
from tests.support.nginx import missing_parts, wait_until

real = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "")


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@real
async def test_a_good_configuration_passes_and_a_bad_one_is_told_in_nginx_own_line(tmp_path: Path) -> None:
    conf = tmp_path / "nginx.conf"
    good = f"pid '{tmp_path}/pid'; error_log '{tmp_path}/log';\nevents {{}}\n"
    await asyncio.to_thread(conf.write_text, good)
    await check(Nginx("nginx", str(conf)))
    await asyncio.to_thread(conf.write_text, good + "nonsense;\n")
    with pytest.raises(CheckFailed) as caught:
        await check(Nginx("nginx", str(conf)))
    assert caught.value.message == f'[emerg] unknown directive "nonsense" in {conf}:3'


@real
def test_a_running_nginx_is_found_with_the_words_that_it_was_started_with() -> None:
    with Running("", plane=False) as nginx:
        conf = nginx.prefix / "nginx.conf"
        found = find(str(conf))
        assert nginx.process is not None
        assert found.master == nginx.process.pid
        assert found.conf == str(conf)
        assert found.options == ("-p", str(nginx.prefix), "-e", str(nginx.error_log), "-g", "daemon off;")
        asyncio.run(check(found))
        link = nginx.prefix / "link.conf"
        link.symlink_to(conf)
        assert find(str(link)).master == nginx.process.pid
        assert find(str(nginx.prefix / "other.conf")).master is None
        nginx.stop()
        assert find(str(conf)) == Nginx(found.program, str(conf))


@real
def test_relative_words_start_where_nginx_was_started(tmp_path: Path) -> None:
    (tmp_path / "nginx.conf").write_text("pid pid; error_log log; daemon off;\nuser root;\nevents {}\n")
    nginx = subprocess.Popen(["nginx", "-p", ".", "-c", "nginx.conf", "-e", "log"], cwd=tmp_path)
    try:
        wait_until((tmp_path / "pid").exists, "nginx runs")
        wait_until(lambda: find(f"{tmp_path}/nginx.conf").master == nginx.pid, "nginx is found")
        assert find(f"{tmp_path}/nginx.conf").options[:2] == ("-p", f"{tmp_path}/.")
        asyncio.run(check(find(f"{tmp_path}/nginx.conf")))
    finally:
        nginx.terminate()
        nginx.wait()


@real
def test_two_masters_of_one_configuration_are_not_chosen_between(tmp_path: Path) -> None:
    conf = tmp_path / "nginx.conf"
    conf.write_text("daemon off;\nevents {}\n")
    command = ["nginx", "-c", str(conf), "-e", f"{tmp_path}/log", "-g"]
    running = [subprocess.Popen([*command, f"pid {tmp_path}/{name}.pid;"]) for name in "ab"]
    try:
        for name in "ab":
            wait_until((tmp_path / f"{name}.pid").exists, "nginx runs")
        pids = sorted(str(each.pid) for each in running)
        with pytest.raises(NginxMissing, match="2 nginx masters run with ") as caught:
            find(str(conf))
        assert sorted(re.findall(r"\d+", caught.value.message.rpartition(":")[2])) == pids
    finally:
        for each in running:
            each.terminate()
            each.wait()


def test_without_nginx_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SBIN", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NginxMissing, match=r"not installed \(apt install nginx\)"):
        find(str(tmp_path / "nginx.conf"))
    with pytest.raises(NginxMissing, match="does not run"):
        asyncio.run(check(Nginx(f"{tmp_path}/nginx", "x")))


async def test_an_nginx_that_hangs_is_killed_with_its_children_and_everything_goes_back(tmp_path: Path) -> None:
    hanging = program(tmp_path / "nginx", f"sleep 600 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/pid; wait")
    conf = tmp_path / "nginx.conf"
    await asyncio.to_thread(conf.write_bytes, b"before")
    began = time.monotonic()
    writer = ConfWriter(tmp_path / "journal", lambda: check(Nginx(hanging, str(conf)), timeout=0.5))
    with pytest.raises(CheckFailed, match=r"had not ended after 0.5 s and was killed .*every file is as it was before"):
        await writer.apply([OwnFile(str(conf), b"before", b"after")])
    assert time.monotonic() - began < 60
    assert await asyncio.to_thread(conf.read_bytes) == b"before"
    for name in ("pid", "child"):
        pid = int(await asyncio.to_thread((tmp_path / name).read_text))
        await asyncio.to_thread(wait_until, lambda pid=pid: _gone(pid), f"{name} is gone")


def _gone(pid: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "nginx: [warn] odd\nnginx: [emerg] bad in /a:3\nnginx: configuration file /a test failed",
            "[emerg] bad in /a:3",
        ),
        (
            "nginx: [error] init_by_lua error: x:1: module 'cjson' not found\nno file a",
            "[error] init_by_lua error: x:1:",
        ),
        ("Killed", "Killed"),
        ("", "`nginx -t` ended with 1"),
    ],
)
async def test_the_line_that_matters_is_shown(tmp_path: Path, said: str, shown: str) -> None:
    failing = await asyncio.to_thread(program, tmp_path / "nginx", f'cat >&2 <<"END"\n{said}\nEND\nexit 1')
    with pytest.raises(CheckFailed) as caught:
        await check(Nginx(failing, "x"))
    assert caught.value.message.startswith(shown)
