"""What must never be signalled, what cannot be found or started, and who may outlive whom."""
# ruff: noqa: ASYNC221 - a test may block its own loop

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller.adapters import procfs
from controller.adapters.pidfd import is_alive, send, wait_gone
from controller.adapters.process import Processes, fill
from controller.core.model import Master, Server
from controller.core.policy import ProcessPolicy
from controller.ports import ProcessError
from tests.support.gunicorn import Gunicorns, eventually, free_port, get, tcp, unix


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Gunicorns]:
    programs = Gunicorns(tmp_path)
    yield programs
    programs.close()
    assert not programs.alive()


@pytest.fixture
def processes() -> Processes:
    return Processes()


def identity(pid: int) -> tuple[int, float]:
    process = procfs.read(pid)
    assert process is not None
    return pid, process.created


def as_master(pid: int) -> Master:
    return Master(*identity(pid), executable=procfs.executable(pid))


# --- placeholders -------------------------------------------------------------------------------------------------


def test_placeholders_are_replaced_once_and_other_braces_stay():
    server = Server(key="k", address="[::1]:8001", ip="::1", port=8001)
    text = "{upstream} {address} {host} {port} {} {other} ${HOME} {{port}} {0.__class__}"
    assert fill(text, "{port}", server) == "{port} [::1]:8001 ::1 8001 {} {other} ${HOME} {8001} {0.__class__}"


# --- finding ------------------------------------------------------------------------------------------------------


async def test_where_nothing_listens_nothing_is_found(processes, tmp_path):
    assert await processes.find("app", tcp(free_port()), ProcessPolicy()) is None
    assert await processes.find("app", tcp(free_port("::1"), "::1"), ProcessPolicy()) is None
    assert await processes.find("app", unix(tmp_path / "app.sock"), ProcessPolicy()) is None
    assert await processes.find("app", tcp(free_port()), ProcessPolicy(pid_file=str(tmp_path / "no.pid"))) is None


@pytest.mark.parametrize("content", ["", "\n"])
async def test_an_empty_pid_file_is_as_good_as_none(processes, tmp_path, content):
    (tmp_path / "app.pid").write_text(content)
    assert await processes.find("app", tcp(free_port()), ProcessPolicy(pid_file=str(tmp_path / "app.pid"))) is None


@pytest.mark.parametrize("content", ["garbage", "-1", "0", "12 13", "1" * 30, "1\x00", "٣"])
async def test_a_pid_file_with_garbage_is_an_error_that_names_it(processes, tmp_path, content):
    (tmp_path / "app-80.pid").write_text(content)
    policy = ProcessPolicy(pid_file="{upstream}-{port}.pid", directory=str(tmp_path))
    with pytest.raises(ProcessError, match=r"app-80\.pid holds no pid but .*\(correct pid_file"):
        await processes.find("app", tcp(80), policy)


async def test_a_pid_file_that_is_a_directory_is_an_error_that_names_it(processes, tmp_path):
    with pytest.raises(ProcessError, match=f"pid file {tmp_path}: Is a directory"):
        await processes.find("app", tcp(80), ProcessPolicy(pid_file=str(tmp_path)))


async def test_a_foreign_pid_in_a_pid_file_is_never_taken(processes, programs):
    server = tcp(free_port())
    stranger = programs.run("sleep", "60")
    (programs.directory / "app.pid").write_text(str(stranger.pid))
    policy = programs.policy("false", pid_file="app.pid")
    expected = (
        rf"pid {stranger.pid} in .*/app\.pid is not the process that listens on {server.address} \(it is `sleep 60`\)"
    )
    with pytest.raises(ProcessError, match=expected):
        await processes.find("app", server, policy)
    with pytest.raises(ProcessError, match=expected):
        await processes.start("app", server, policy)
    assert stranger.poll() is None


async def test_a_foreign_pid_beside_a_live_master_names_both(processes, programs):
    server = tcp(free_port())
    master, stranger = programs.master(server.address, workers=1), programs.run("sleep", "60")
    (programs.directory / "app.pid").write_text(str(stranger.pid))
    with pytest.raises(ProcessError, match=rf"\(it is `sleep 60`\).*is held by pid {master.pid} "):
        await processes.find("app", server, programs.policy(pid_file="app.pid"))


async def test_two_unrelated_masters_on_one_address_are_told_apart_only_by_a_pid_file(processes, programs):
    server = tcp(free_port())
    first = programs.master(server.address, "--reuse-port", "--pid", "first.pid", workers=1)
    second = programs.run(*programs.command(server.address, "--reuse-port"))
    await eventually(lambda: programs.printed().count("Booting worker") == 2, "the second master")
    await asyncio.gather(*(get(server) for _ in range(8)))
    with pytest.raises(ProcessError, match="more than one gunicorn master") as refused:
        await processes.find("app", server, ProcessPolicy())
    assert {str(first.pid), str(second.pid)} <= set(refused.value.message.replace(",", " ").split())
    master = await processes.find("app", server, programs.policy(pid_file="first.pid"))
    assert master is not None
    assert master.pid == first.pid


async def test_a_server_on_another_machine_is_no_process_of_ours(processes, programs):
    port = free_port()
    programs.master(f"0.0.0.0:{port}", workers=1)
    with pytest.raises(ProcessError, match=rf"192\.0\.2\.7:{port} is no address of this machine"):
        await processes.find("app", tcp(port, "192.0.2.7"), ProcessPolicy())


async def test_a_listener_in_another_network_is_found_through_its_pid_file_only(processes, programs):
    server = tcp(free_port())
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare --net needs root")
    up = 'ip link set lo up 2>/dev/null; exec "$@"'
    programs.run(
        "unshare", "--net", "sh", "-c", up, "sh", *programs.command(f"0.0.0.0:{server.port}", "--pid", "a.pid")
    )
    await eventually(lambda: "Booting worker" in programs.printed(), "gunicorn")
    assert await processes.find("app", server, ProcessPolicy()) is None
    master = await processes.find("app", server, programs.policy(pid_file="a.pid"))
    assert master is not None
    assert master.pid == int((programs.directory / "a.pid").read_text())


async def test_what_may_not_be_looked_into_is_an_error_that_names_the_capability(programs):
    if os.geteuid():
        pytest.skip("needs root to become somebody else")
    server = tcp(free_port())
    child = programs.master(server.address, workers=1)
    script = (
        "import asyncio, concurrent.futures.thread, os, sys\n"
        "from controller.adapters.process import Processes\n"
        "from controller.core.policy import ProcessPolicy\n"
        "from controller.ports import ProcessError\n"
        "from tests.support.gunicorn import tcp\n"
        "policy = ProcessPolicy(pid_file=sys.argv[2] or None)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: asyncio.run(Processes().find('app', tcp(int(sys.argv[1])), policy))\n"
        "except ProcessError as error: print(error)\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".pid") as file:  # in a directory that everybody may enter
        file.write(str(child.pid))
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        for pid_file in ("", file.name):
            command = [sys.executable, "-c", script, str(server.port), pid_file]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            assert "CAP_SYS_PTRACE" in answer.stdout, answer


async def test_a_kind_that_is_no_gunicorn_needs_its_unit(processes):
    with pytest.raises(
        ProcessError, match=r"driven by its unit, and none is set \(set unit .* \[upstream\.app\.process\]"
    ):
        await processes.find("app", tcp(80), ProcessPolicy(kind="systemd"))


# --- signalling ---------------------------------------------------------------------------------------------------


async def test_a_pid_that_is_another_process_by_now_is_never_signalled(processes, programs):
    stranger = programs.run("sleep", "60")
    reused = replace(as_master(stranger.pid), created=identity(stranger.pid)[1] - 1)
    worker = replace(reused, pid=os.getpid(), workers=((stranger.pid, 1.0),))
    for master in (reused, worker):
        await processes.terminate(master, ProcessPolicy())
        assert await processes.wait_exit(master, 0), "what was meant is gone"
        assert await processes.kill(master, ProcessPolicy()) == ()
    assert not send((stranger.pid, 1.0), signal.SIGKILL)
    assert stranger.poll() is None


async def test_a_process_that_runs_another_program_by_now_is_never_signalled(processes, programs):
    stranger = programs.run("sleep", "60")
    master = replace(as_master(stranger.pid), executable="/usr/bin/gunicorn")
    await processes.terminate(master, ProcessPolicy())
    assert await processes.kill(master, ProcessPolicy()) == ()
    assert not send(identity(stranger.pid), signal.SIGKILL, "/usr/bin/gunicorn")
    assert stranger.poll() is None


async def test_a_signal_that_is_not_allowed_names_the_capability(programs):
    if os.geteuid():
        pytest.skip("needs root to become somebody else")
    stranger = programs.run("sleep", "60")
    script = (
        "import os, signal, sys\n"
        "from controller.adapters import pidfd, procfs\n"
        "pid = int(sys.argv[1]); created = procfs.read(pid).created\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: pidfd.send((pid, created), signal.SIGTERM)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(stranger.pid)], capture_output=True, text=True, check=False
    )
    assert answer.stdout.startswith("ProcessError"), answer
    assert "CAP_KILL" in answer.stdout
    assert stranger.poll() is None


async def test_the_end_is_noticed_when_it_comes_and_zombies_have_ended(programs):
    child, other = programs.run("sleep", "60"), programs.run("sleep", "60")
    victims = [identity(child.pid), identity(other.pid)]
    waiting = asyncio.ensure_future(wait_gone(victims, 30))
    assert not await wait_gone(victims, 0.05)
    began = time.monotonic()
    assert send(victims[0], signal.SIGKILL)
    assert send(victims[1], signal.SIGKILL)
    assert await waiting
    assert time.monotonic() - began < 10
    assert not is_alive(victims[0]), "it is a zombie until its parent reaps it"
    assert child.wait(1) == -signal.SIGKILL
    assert await wait_gone(victims, 0)
    assert not send(victims[0], signal.SIGKILL)
    assert await wait_gone([], 0)


# --- starting -----------------------------------------------------------------------------------------------------


async def test_without_a_command_there_is_an_error_that_names_the_setting(processes):
    with pytest.raises(
        ProcessError, match=r"no command is configured \(set start, or unit, in \[upstream\.app\.process\]"
    ):
        await processes.start("app", tcp(free_port()), ProcessPolicy())


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        (["/no/such/program"], {}, r"`/no/such/program` in .*: No such file or directory \(/no/such/program\)"),
        (["true"], {"directory": "/no/such/{upstream}"}, r"No such file or directory \(/no/such/app\)"),
        (["true"], {"log": "/no/such/{port}.log"}, r"log /no/such/\d+\.log: No such file or directory"),
        (["/etc/passwd"], {}, "Permission denied"),
    ],
)
async def test_a_command_that_cannot_be_run_is_an_error_at_once(processes, programs, command, changes, message):
    with pytest.raises(ProcessError, match=message):
        await processes.start("app", tcp(free_port()), programs.policy(*command, **changes))


async def test_a_command_that_fails_tells_its_status_and_last_lines_of_this_time(processes, programs):
    command = ["sh", "-c", "for n in $(seq 99); do echo line $n; done; echo '{port} is bad' >&2; exit 3"]
    server = tcp(free_port())
    (programs.directory / "app.log").write_text("of another time\n")
    for log in (None, "app.log"):
        with pytest.raises(ProcessError) as failed:
            await processes.start("app", server, programs.policy(*command, log=log))
        text = failed.value.message
        assert text.startswith(f"{server.address} ended with exit status 3 before it listened; it printed: line 81\n")
        assert text.endswith(f"line 99\n{server.port} is bad")
    assert (programs.directory / "app.log").read_text().startswith("of another time\nline 1\n")


async def test_a_command_that_is_killed_says_by_what(processes, programs):
    with pytest.raises(
        ProcessError, match=r"was killed by signal 11 \(Segmentation fault\) before it listened; it printed: nothing"
    ):
        await processes.start("app", tcp(free_port()), programs.policy("sh", "-c", "kill -SEGV $$"))


async def test_a_start_that_takes_too_long_kills_all_that_it_started_and_nothing_else(processes, programs):
    bystander = programs.run("sleep", "60")
    background = "setsid sleep 61 & sleep 62 & echo waiting; wait"
    for command in (["sh", "-c", background], ["sh", "-c", "setsid sleep 63 & echo waiting"]):
        with pytest.raises(ProcessError, match=r"did not listen within 0\.5 s; it printed: waiting"):
            await processes.start("app", tcp(free_port()), programs.policy(*command, start_timeout=0.5))
        assert programs.alive() == {bystander.pid}


async def test_a_start_whose_address_another_program_takes_first_is_undone(processes, programs):
    server = tcp(free_port())
    policy = programs.policy(sys.executable, "-m", "http.server", "-b", "{host}", "{port}")
    with pytest.raises(ProcessError, match="which is no gunicorn master"):
        await processes.start("app", server, policy)
    assert not programs.alive()


async def test_what_is_started_sees_its_settings_and_nothing_of_our_supervisor(processes, programs, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/ours")
    monkeypatch.setenv("HOME", "/ours")
    policy = programs.policy("sh", "-c", 'echo "$WHO $HOME [$NOTIFY_SOCKET] $PWD"; exit 1')
    policy = replace(policy, environment={**policy.environment, "WHO": "{upstream}:{port}"})
    server = tcp(free_port())
    with pytest.raises(ProcessError, match=rf"app:{server.port} /ours \[\] {programs.directory}"):
        await processes.start("app", server, policy)
