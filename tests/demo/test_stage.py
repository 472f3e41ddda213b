"""The stage: what it needs, and that nothing is left of it whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from controller.demo import stage as stages
from controller.demo.stage import Nginx, Stage, StageError, find_nginx, free_ports, until
from controller.demo.sweep import MARK, members, sweep

STUBBORN = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"


@pytest.fixture
def nginx() -> Nginx:
    try:
        return find_nginx()
    except StageError as error:
        pytest.skip(str(error))


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    (tmp_path / "stage").mkdir()
    return tmp_path / "stage"


def marked(prefix: Path, code: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, MARK: str(prefix)}, stdout=-1)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_sweeping_ends_what_bears_the_mark_and_nothing_else(prefix: Path) -> None:
    ours, stubborn = marked(prefix, "print(flush=True); import time; time.sleep(600)"), marked(prefix, STUBBORN)
    other = marked(prefix.parent, STUBBORN)
    try:
        assert {process.pid for process in members(prefix)} == {ours.pid, stubborn.pid}
        sweep(prefix, patience=0.5)
        assert ours.poll() is not None
        assert stubborn.poll() is not None
        assert other.poll() is None
        assert not prefix.exists()
    finally:
        for child in (ours, stubborn, other):
            child.kill()
            child.wait()


def test_the_watchdog_sweeps_when_its_parent_is_killed(prefix: Path) -> None:
    parent = textwrap.dedent(f"""
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-m", "controller.demo.sweep", {str(prefix)!r}], stdin=subprocess.PIPE)
        print(flush=True)
        time.sleep(600)
    """)
    ours = marked(prefix, "print(flush=True); import time; time.sleep(600)")
    killed = subprocess.Popen([sys.executable, "-c", parent], stdout=-1)
    try:
        assert killed.stdout is not None
        killed.stdout.readline()
        (watchdog,) = psutil.Process(killed.pid).children()
        killed.kill()
        assert ours.wait(20) == -signal.SIGTERM
        until(lambda: gone(watchdog), "the watchdog to end", 20, prefix)
        assert not prefix.exists()
    finally:
        for child in (ours, killed):
            child.kill()
            child.wait()


def test_free_ports_are_distinct_unused_and_never_lent_to_outgoing_connections() -> None:
    ports = free_ports(20)
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == 20
    assert all(1024 <= port < low for port in ports)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        assert all(ports[0] not in free_ports(500) for _ in range(3))


def test_without_nginx_the_message_is_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.shutil, "which", lambda name, path: None)
    with pytest.raises(StageError, match=r"nginx is not installed \(apt install nginx libnginx-mod-http-lua"):
        Stage()


def test_without_the_packages_of_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"no gunicorn and no uvicorn_worker \(pip install 'headgate\[demo\]'\)"):
        Stage()


def test_without_the_lua_module_the_message_names_the_missing_file(tmp_path: Path) -> None:
    fake = tmp_path / "nginx"
    fake.write_text(f"#!/bin/sh\necho 'configure arguments: --modules-path={tmp_path}/modules' >&2\n")
    fake.chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{tmp_path}:{path}"
    try:
        with pytest.raises(StageError, match=rf"{tmp_path}/modules/ndk_http_module.so is missing.*apt install"):
            find_nginx()
    finally:
        os.environ["PATH"] = path


def test_a_server_that_does_not_come_up_is_told_with_its_log(nginx: Nginx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages.WORKERS, "broken", ("--workers", "1", "no_such_module:app"))  # type: ignore[arg-type]
    stage = Stage("broken")
    with pytest.raises(StageError, match=r"(?s)ended with status 3; its log ends with:.*no_such_module"), stage:
        pytest.fail("it came up")
    assert not stage.prefix.exists()
    assert members(stage.prefix) == []


def test_ports_that_somebody_took_meanwhile_are_exchanged_for_others(
    nginx: Nginx, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_ports(1)[0]))
        taken.listen()
        answers = [[taken.getsockname()[1]] * 4]
        monkeypatch.setattr(stages, "free_ports", lambda count: answers.pop() if answers else free_ports(count))
        with Stage("sync") as stage:
            assert not answers
            assert taken.getsockname()[1] not in [int(address.rpartition(":")[2]) for address in stage.addresses]


def test_a_server_that_is_killed_under_load_shows_in_the_figures(nginx: Nginx) -> None:
    with Stage("gthread") as stage:
        load = stage.load(200)
        until(lambda: bool(load.read()) and load.ticks[-1]["requests"] > 100, "traffic", 20, stage.prefix / "load.log")
        pid = stage.master(stage.addresses[0])
        assert pid is not None
        master = psutil.Process(pid)
        for process in (master, *master.children()):
            process.kill()
        until(lambda: bool(load.read()) and bool(load.ticks[-1]["failures"]), "failures", 20, stage.prefix / "load.log")
        summary = load.finish()
    # nginx says 502 where no answer had begun; an answer that was under way breaks off.
    assert set(summary["failures"]) <= {"server_error", "truncated", "incomplete_stream"}
    assert summary["failed"] == sum(summary["failures"].values()) > 0


def test_waiting_in_vain_says_for_what_and_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\ntwo\n")
    with pytest.raises(StageError, match=r"(?s)waited 0 s for a miracle in vain\n    one\n    two"):
        until(lambda: False, "a miracle", 0, tmp_path / "log")
