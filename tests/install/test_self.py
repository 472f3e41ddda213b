"""`drain --self` and `enable --self`, as a unit runs them: at a real daemon's socket, and never in the unit's way."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller import cli_self
from tests.support.house import APP, House

FIRST, SECOND, THIRD = (server.key for server in APP.servers)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    settings(tmp_path)
    with House(tmp_path) as started:
        yield started


def settings(directory: Path) -> None:
    (directory / "headgate.toml").write_text(f'[api]\nsocket = "{directory}/run/api.sock"\nlisten = ""\n')


def run(directory: Path, *words: str, main: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "controller", "--config", f"{directory}/headgate.toml", *words]
    environment = {**os.environ, "MAINPID": main}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_a_unit_leaves_when_nothing_is_in_flight_and_comes_back(house: House) -> None:
    house.plane.busy[FIRST] = 1
    end = threading.Timer(0.0, house.plane.busy.clear)

    def once_asked() -> None:
        house.plane.asked.wait(20)
        end.start()

    house.plane.asked.clear()
    threading.Thread(target=once_asked).start()
    left = run(house.directory, "drain", "--self", "--wait", "--port", "8001")
    assert (left.returncode, left.stderr) == (0, "")
    assert re.fullmatch(rf"app: {FIRST} gets no new request \(table \d+\); none is under way\n", left.stdout)
    assert end.finished.is_set()
    (entry,) = house.do(lambda: house.runtime.state.groups["app"].peers[FIRST].quarantine)
    assert (entry.kind, entry.why) == ("notice", "its unit stops")
    back = run(house.directory, "enable", "--self", "--port", "8001")
    assert (back.returncode, back.stderr) == (0, "")
    assert house.do(lambda: house.runtime.state.groups["app"].peers[FIRST].quarantine) == ()


def test_what_an_operator_wished_stays(house: House) -> None:
    house.do(lambda: None)
    assert run(house.directory, "maint", "app", FIRST).returncode == 0
    assert run(house.directory, "drain", "--self", "--wait", "--port", "8001").returncode == 0
    assert run(house.directory, "enable", "--self", "--port", "8001").returncode == 0
    assert house.do(lambda: house.runtime.state.groups["app"].peers[FIRST].admin) == "maint"


def test_requests_that_do_not_end_hold_a_stop_for_its_time_and_no_longer(house: House) -> None:
    house.plane.busy[FIRST] = 2
    left = run(house.directory, "drain", "--self", "--wait", "--timeout", "0.3", "--port", "8001")
    assert left.returncode == 0
    assert "2 still under way" in left.stdout


def test_the_last_server_stops_at_once_and_it_is_said(house: House) -> None:
    for port in ("8001", "8002"):
        assert run(house.directory, "drain", "--self", "--port", port).stderr == ""
    left = run(house.directory, "drain", "--self", "--wait", "--port", "8003")
    assert (left.returncode, left.stdout) == (0, "")
    assert "no other server of app serves" in left.stderr.replace("\n", " ")


def test_a_restart_of_all_servers_goes_in_turn(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    monkeypatch.setattr(cli_self, "_restarting", lambda: asked.set() or True)
    for port in ("8001", "8002"):
        assert run(house.directory, "drain", "--self", "--port", port).returncode == 0
    words = (f"{house.directory}/headgate.toml", 8003, True, None)
    leaving = threading.Thread(target=cli_self.leave, args=words)
    leaving.start()
    assert asked.wait(20)
    assert house.do(lambda: house.runtime.state.groups["app"].peers[THIRD].quarantine) == ()
    assert run(house.directory, "enable", "--self", "--port", "8001").returncode == 0
    leaving.join(20)
    assert not leaving.is_alive()
    assert len(house.do(lambda: house.runtime.state.groups["app"].peers[THIRD].quarantine)) == 1


def test_where_no_other_server_can_come_a_restart_does_not_wait(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_self, "_restarting", lambda: pytest.fail("it would have waited"))
    for server in (FIRST, SECOND):
        assert run(house.directory, "maint", "app", server).returncode == 0
    cli_self.leave(f"{house.directory}/headgate.toml", 8003, True, None)
    assert "no other server of app serves" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["drain", "enable"])
def test_where_no_daemon_runs_the_unit_goes_on(tmp_path: Path, verb: str) -> None:
    settings(tmp_path)
    done = run(tmp_path, verb, "--self", main=str(os.getpid()))
    assert (done.returncode, done.stdout) == (0, "")
    assert "no daemon answers" in done.stderr


def test_broken_settings_do_not_hold_the_unit_up(tmp_path: Path) -> None:
    (tmp_path / "headgate.toml").write_text("[apii]\n")
    done = run(tmp_path, "drain", "--self", "--wait", main=str(os.getpid()))
    assert done.returncode == 0
    assert "unknown key; did you mean api?" in done.stderr
    assert "it stops without a drain" in done.stderr


@pytest.mark.slow
def test_a_daemon_that_hangs_does_not_hold_the_unit_up(tmp_path: Path) -> None:
    settings(tmp_path)
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "run" / "api.sock"))
        deaf.listen()
        done = run(tmp_path, "drain", "--self", "--wait", main=str(os.getpid()))
    assert done.returncode == 0
    assert "does not answer in time" in done.stderr


def test_a_process_that_nginx_does_not_know_is_told(house: House) -> None:
    done = run(house.directory, "drain", "--self", "--wait", main=str(os.getpid()))
    assert done.returncode == 0
    assert f"process {os.getpid()} is no server of an upstream" in done.stderr
    done = run(house.directory, "drain", "--self", "--wait")
    assert done.returncode == 0
    assert "systemd names no main process (MAINPID)" in done.stderr
    done = run(house.directory, "enable", "--self", "--port", "9")
    assert done.returncode == 0
    assert "port 9 of this machine is no server" in done.stderr


@pytest.mark.parametrize(
    "words", [("drain",), ("drain", "app"), ("drain", "app", "--self"), ("enable", "app", FIRST, "--self"), ("enable",)]
)
def test_either_a_server_is_named_or_self_is_said(tmp_path: Path, words: tuple[str, ...]) -> None:
    settings(tmp_path)
    done = run(tmp_path, *words)
    assert done.returncode == 2
    assert "--self" in done.stderr
