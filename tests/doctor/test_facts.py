"""The facts of real processes: nginx with workers that leave, gunicorns, a uvicorn, and systemd as it answers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from controller.adapters.nginx import check
from controller.doctor import servers
from controller.doctor.checks import examine
from controller.doctor.facts import gather
from controller.doctor.model import Facts, Finding
from controller.settings import build
from tests.support.gunicorn import GTHREAD, UVICORN, Gunicorns, free_port
from tests.support.nginx import Nginx, missing_parts, wait_until

needs_nginx = pytest.mark.skipif(missing_parts() is not None, reason=missing_parts() or "")


@pytest.fixture
def gunicorns(tmp_path: Path) -> Iterator[Gunicorns]:
    started = Gunicorns(tmp_path)
    yield started
    started.close()


def look(conf: Path, *, process: dict[str, Any] | None = None, **tables: Any) -> Facts:
    raw: dict[str, Any] = {"nginx": {"conf": str(conf)}, **tables}
    if process is not None:
        raw["upstream"] = {"app": {"process": process}}
    return asyncio.run(gather(build(raw, {}, "headgate.toml"), "headgate.toml"))


def upstream(directory: Path, *servers: str, more: str = "") -> Path:
    """A file with an upstream `app`; no nginx runs on it."""
    lines = "".join(f"    server {server};\n" for server in servers)
    path = directory / "nginx.conf"
    path.write_text(f"pid {directory}/nginx.pid;\nhttp {{\n  upstream app {{\n{lines}{more}  }}\n}}\n")
    return path


def of(check: str, facts: Facts) -> list[Finding]:
    return [finding for finding in examine(facts) if finding.check == check]


# --- servers ----------------------------------------------------------------------------------------------------


def test_a_running_gunicorn_is_seen_with_its_settings(tmp_path: Path, gunicorns: Gunicorns) -> None:
    port = free_port()
    options = ("--keep-alive", "7", "--timeout", "9", "--backlog", "100")
    master = gunicorns.master(f"127.0.0.1:{port}", *options, worker=GTHREAD)
    facts = look(upstream(tmp_path, f"127.0.0.1:{port}", more="keepalive 4;\n"))
    (app,) = facts.apps
    assert app.where == f"pid {master.pid}"
    assert [(name, server.address) for name, server in app.serves] == [("app", f"127.0.0.1:{port}")]
    assert {name: app.known[name] for name in ("timeout", "graceful_timeout", "backlog", "worker_class")} == {
        "timeout": 9,
        "graceful_timeout": 20,
        "backlog": 100,
        "worker_class": "gthread",
    }
    assert (app.keep_alive, app.uvicorn) == (7.0, False)
    (kept,) = of("upstream-keepalive", facts)
    assert kept.evidence == f"{tmp_path}/nginx.conf:5, pid {master.pid}"
    (timeout,) = of("gunicorn-timeout", facts)
    assert timeout.evidence == f"pid {master.pid}"


def test_a_gunicorn_with_good_settings_raises_nothing(tmp_path: Path, gunicorns: Gunicorns) -> None:
    port = free_port()
    gunicorns.master(f"127.0.0.1:{port}", "--keep-alive", "75", "--timeout", "60", worker=GTHREAD)
    facts = look(upstream(tmp_path, f"127.0.0.1:{port}", more="keepalive 4;\n"))
    assert len(facts.apps) == 1
    # Ports of tests are ephemeral ones.
    assert {each.check for each in examine(facts) if each.severity != "hint"} <= {"ephemeral-port"}


def test_one_master_behind_two_addresses_is_one_app(tmp_path: Path, gunicorns: Gunicorns) -> None:
    port = free_port()
    master = gunicorns.master(f"127.0.0.1:{port}", "--bind", f"unix:{tmp_path}/app.sock")
    (app,) = look(upstream(tmp_path, f"localhost:{port}", f"unix:{tmp_path}/app.sock")).apps
    assert app.where == f"pid {master.pid}"
    assert {server.address for _, server in app.serves} == {f"localhost:{port}", f"unix:{tmp_path}/app.sock"}


def test_a_gunicorn_that_went_to_another_directory_is_read_where_it_began(
    tmp_path: Path, gunicorns: Gunicorns, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("PWD", str(tmp_path))
    (tmp_path / "gunicorn.conf.py").write_text(
        f"chdir = {str(Path(__file__).parents[2])!r}\nkeepalive = 33\nthreads = 2\n"
    )
    gunicorns.master(f"127.0.0.1:{port}")
    (app,) = look(upstream(tmp_path, f"127.0.0.1:{port}")).apps
    assert (app.known["keepalive"], app.keep_alive) == (33, 33.0)


def test_uvicorn_workers_have_no_graceful_timeout_of_their_own(tmp_path: Path, gunicorns: Gunicorns) -> None:
    port = free_port()
    master = gunicorns.master(f"127.0.0.1:{port}", worker=UVICORN)
    (found,) = of("uvicorn-graceful", look(upstream(tmp_path, f"127.0.0.1:{port}")))
    assert found.evidence == f"pid {master.pid}"
    assert "after 20 s" in found.message


def test_a_uvicorn_on_its_own_closes_idle_connections_after_5_s(tmp_path: Path, gunicorns: Gunicorns) -> None:
    port = free_port()
    child = gunicorns.run(
        sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(port), "tests.support.apps:asgi"
    )
    wait_until(lambda: "running on" in gunicorns.printed(), "uvicorn listens", 20)
    facts = look(upstream(tmp_path, f"127.0.0.1:{port}", more="keepalive 4; keepalive_timeout 5s;\n"))
    assert [(app.where, app.keep_alive) for app in facts.apps] == [(f"pid {child.pid}", 5.0)]
    assert len(of("upstream-keepalive", facts)) == 1


def test_a_process_on_another_host_cannot_be_driven(tmp_path: Path) -> None:
    facts = look(upstream(tmp_path, "192.0.2.1:40000"), process={"start": ["a"]})
    (unfit,) = of("process-unfit", facts)
    assert "no address of this machine" in unfit.message
    assert facts.servers == ()


def test_a_number_that_is_no_address_is_looked_up_as_nginx_does(tmp_path: Path) -> None:
    assert [each.subject for each in look(upstream(tmp_path, "999.1.1.1:80")).unseen if each.subject != "nginx"] == [
        "999.1.1.1:80"
    ]


def test_other_programs_and_other_hosts_are_left_alone(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        facts = look(upstream(tmp_path, f"127.0.0.1:{port}", "192.0.2.1:80", f"127.0.0.1:{free_port()}"))
    assert facts.apps == ()
    assert [server.ip for _, server in facts.servers] == ["127.0.0.1", "127.0.0.1"]
    assert {each.subject for each in facts.unseen} == {"nginx"}


def test_a_name_that_does_not_resolve_is_said(tmp_path: Path) -> None:
    (told,) = [each for each in look(upstream(tmp_path, "nowhere.invalid:80")).unseen if each.subject != "nginx"]
    assert told.evidence == f"{tmp_path}/nginx.conf:4"
    assert "nowhere.invalid does not resolve" in told.message


def test_a_process_that_is_not_what_the_settings_say_is_severe(tmp_path: Path, gunicorns: Gunicorns) -> None:
    port = free_port()
    gunicorns.master(f"127.0.0.1:{port}")
    stranger = gunicorns.run("sleep", "100").pid
    (tmp_path / "app.pid").write_text(f"{stranger}\n")
    facts = look(upstream(tmp_path, f"127.0.0.1:{port}"), process={"pid_file": f"{tmp_path}/app.pid", "start": ["a"]})
    (unfit,) = of("process-unfit", facts)
    assert f"pid {stranger} in {tmp_path}/app.pid is not the process that listens" in unfit.message
    assert len(facts.apps) == 1


def test_a_stale_pid_file_is_told_from_a_right_one(tmp_path: Path, gunicorns: Gunicorns) -> None:
    port = free_port()
    process = {"pid_file": f"{tmp_path}/app.pid", "start": ["a"]}
    master = gunicorns.master(f"127.0.0.1:{port}", "--pid", f"{tmp_path}/app.pid")
    conf = upstream(tmp_path, f"127.0.0.1:{port}")
    assert of("pid-file", look(conf, process=process)) == []
    master.kill()
    master.wait()
    (stale,) = of("pid-file", look(conf, process=process))
    assert stale.message == f"names pid {master.pid}, which is gone"


def test_a_command_that_would_start_a_server_is_examined_while_none_runs(tmp_path: Path) -> None:
    port = free_port()
    start = ["gunicorn", "--bind", "{host}:{port}", "--graceful-timeout", "60", "-k", "gthread", "app:app"]
    facts = look(upstream(tmp_path, f"127.0.0.1:{port}", more="keepalive 4;\n"), process={"start": start})
    where = "headgate.toml: upstream.app.process.start"
    assert [(app.where, app.keep_alive) for app in facts.apps] == [(where, 2.0)]
    for name in ("gunicorn-timeout", "graceful-disagrees", "upstream-keepalive"):
        assert where in of(name, facts)[0].evidence


def test_a_low_port_range_is_no_place_for_outgoing_connections(tmp_path: Path) -> None:
    low, high = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    facts = look(upstream(tmp_path, f"127.0.0.1:{high}", f"127.0.0.1:{low - 1}"))
    assert [each.subject for each in of("ephemeral-port", facts)] == [f"app: 127.0.0.1:{high}"]
    assert facts.somaxconn == int(Path("/proc/sys/net/core/somaxconn").read_text())


# --- systemd ----------------------------------------------------------------------------------------------------


def systemctl(directory: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> Path:
    """A systemctl that answers so to every question."""
    program = directory / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'E'\n{answer}\nE\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


def test_a_unit_is_asked_for_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemctl(
        tmp_path,
        monkeypatch,
        "LoadState=loaded\nActiveState=inactive\nMainPID=0\nRestart=always\nKillMode=control-group\nKillSignal=3\n"
        "TimeoutStopUSec=30s\nExecReload={ path=/bin/kill ; argv[]=/bin/kill -HUP $MAINPID }",
    )
    port = free_port()
    facts = look(upstream(tmp_path, f"127.0.0.1:{port}"), process={"unit": "app@{port}.service"})
    unit = f"app@{port}.service"
    assert facts.units[unit]["KillMode"] == "control-group"
    for name, told in (("stop-timeout", "TimeoutStopSec"), ("kill-mode", "KillMode"), ("kill-signal", "KillSignal")):
        (found,) = of(name, facts)
        assert found.evidence == f"unit {unit}, {told} of {unit}"


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/app@8001.service\n", "app@8001.service"),
        ("12:cpu:/\n1:name=systemd:/system.slice/system-app.slice/app@1.service\n", "app@1.service"),
        ("0::/user.slice/user-1.slice/user@1.service/app.slice/x.service\n", ""),
        ("0::/user.slice/user-1.slice/session-2.scope\n", ""),
        ("0::/\n", ""),
        ("", ""),
    ],
)
def test_a_control_group_names_the_service(cgroup: str, unit: str) -> None:
    assert servers._service(cgroup) == unit


def test_a_unit_counts_only_where_the_master_is_its_main_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gunicorns: Gunicorns
) -> None:
    port = free_port()
    master = gunicorns.master(f"127.0.0.1:{port}")
    monkeypatch.setattr(servers, "_service", lambda cgroup: "app.service")
    conf = upstream(tmp_path, f"127.0.0.1:{port}")
    program = systemctl(tmp_path, monkeypatch, f"LoadState=loaded\nMainPID={master.pid}\nRestart=always")
    (found,) = of("unit-unknown", look(conf, process={"start": ["a"]}))
    assert found.evidence == f"pid {master.pid}, headgate.toml: upstream.app.process"
    program.write_text(program.read_text().replace(f"MainPID={master.pid}", "MainPID=1"))
    (app,) = look(conf, process={"start": ["a"]}).apps
    assert app.unit == ""


def test_a_unit_that_systemd_does_not_know_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemctl(tmp_path, monkeypatch, "LoadState=not-found\nActiveState=inactive\nMainPID=0")
    facts = look(upstream(tmp_path, f"127.0.0.1:{free_port()}"), process={"unit": "app.service"})
    assert facts.units == {}
    (told,) = [each for each in facts.unseen if each.subject == "app.service"]
    assert told.message == "systemd calls it not-found"
    assert "not-found" in of("process-unfit", facts)[0].message


def test_without_systemd_a_unit_cannot_be_looked_at_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = look(upstream(tmp_path, f"127.0.0.1:{free_port()}"), process={"unit": "app.service"})
    assert "systemctl: No such file or directory" in [each.message for each in facts.unseen]


# --- nginx ------------------------------------------------------------------------------------------------------


def test_without_nginx_and_its_files_everything_is_said_and_nothing_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(check, "_SBIN", "")
    facts = look(tmp_path / "nginx.conf")
    (broken,) = of("conf-broken", facts)
    assert (broken.evidence, "No such file" in broken.message) == (f"{tmp_path}/nginx.conf", True)
    assert "nginx is not installed" in [each.message for each in facts.unseen]
    assert (facts.nginx, facts.master, facts.pid_files) == (None, None, ())


@needs_nginx
def test_a_running_nginx_is_seen_with_the_workers_that_it_leaves_behind(gunicorns: Gunicorns) -> None:
    port, app_port = free_port(), free_port()
    gunicorns.master(f"127.0.0.1:{app_port}", "--threads", "4", worker=GTHREAD, workers=1)
    text = (
        f"upstream app {{ server 127.0.0.1:{app_port}; }}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://app; }} }}"
    )
    with Nginx(text, workers=1, plane=False) as nginx, ExitStack() as held:
        conf = nginx.prefix / "nginx.conf"
        facts = look(conf)
        assert nginx.process is not None
        assert facts.master is not None
        assert (facts.master.pid, facts.master.replaced) == (nginx.process.pid, False)
        assert [(worker.pid, worker.leaving) for worker in facts.master.workers] == [(nginx.workers()[0], False)]
        assert facts.nginx is not None
        assert facts.nginx.version >= (1, 22)
        assert (facts.changed, facts.pid_files[0].fits, of("old-workers", facts)) == ((), True, [])

        def hanging() -> int:
            return gunicorns.seen.read_text().count("/hang") if gunicorns.seen.exists() else 0

        for _ in range(2):
            before = hanging()
            request = held.enter_context(socket.create_connection(("127.0.0.1", port)))
            request.sendall(b"GET /hang HTTP/1.0\r\n\r\n")
            wait_until(lambda: hanging() > before, "the request is inside")  # noqa: B023 - it is called at once
            nginx.reload()
        (old,) = of("old-workers", look(conf))
        assert old.message == "2 workers of earlier reloads have not ended; 1 serve"


@needs_nginx
def test_files_that_are_newer_than_the_workers_are_named(tmp_path: Path) -> None:
    with Nginx("", workers=1, plane=False) as nginx:
        conf = nginx.prefix / "nginx.conf"
        later = conf.stat().st_mtime + 60
        os.utime(conf, (later, later))
        (changed,) = of("not-loaded", look(conf))
        assert changed.evidence == str(conf)


@needs_nginx
def test_a_pid_file_that_names_a_stranger_does_not_hide_nginx() -> None:
    with Nginx("", workers=1, plane=False) as nginx:
        (nginx.prefix / "nginx.pid").write_text(f"{os.getpid()}\n")
        facts = look(nginx.prefix / "nginx.conf")
        assert nginx.process is not None
        assert facts.master is not None
        assert facts.master.pid == nginx.process.pid
        (foreign,) = of("pid-file", facts)
        assert foreign.message == f"names pid {os.getpid()}, which is another program"


@needs_nginx
def test_a_pid_file_that_a_killed_nginx_left_is_stale() -> None:
    with Nginx("", workers=1, plane=False) as nginx:
        assert nginx.process is not None
        pid = nginx.process.pid
        nginx.stop(signal.SIGKILL)
        facts = look(nginx.prefix / "nginx.conf")
        assert facts.master is None
        assert [finding.message for finding in of("pid-file", facts)] == [f"names pid {pid}, which is gone"]


@needs_nginx
def test_the_control_socket_is_protected_by_its_directory_alone() -> None:
    hook = 'upstream app { server 127.0.0.1:9; balancer_by_lua_block { require("headgate").balance("app") } }'
    with Nginx(hook, workers=1) as nginx:
        tables = {"control": str(nginx.socket), "snapshot": str(nginx.snapshot), "conf": f"{nginx.prefix}/nginx.conf"}
        nginx.prefix.chmod(0o755)
        for mode, open_to_all in ((0o700, False), (0o755, True)):
            nginx.socket.parent.chmod(mode)
            facts = look(nginx.prefix / "nginx.conf", nginx=tables)
            found = of("control-open", facts)
            assert [each.evidence for each in found] == ([str(nginx.socket)] if open_to_all else [])
        assert {each.check for each in examine(facts) if each.severity == "severe"} == {"control-open"}


@needs_nginx
def test_a_program_that_was_replaced_on_disk_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nginx"
    program.write_bytes(
        Path(subprocess.run(["which", "nginx"], capture_output=True, text=True).stdout.strip()).read_bytes()
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Nginx("", workers=1, plane=False) as nginx:
        assert of("nginx-replaced", look(nginx.prefix / "nginx.conf")) == []
        program.unlink()
        facts = look(nginx.prefix / "nginx.conf")
        assert len(of("nginx-replaced", facts)) == 1
        assert facts.nginx is not None
