"""Headgate as people install it: a wheel, `headgate install`, and a systemd that really runs the unit.

The tests of the class stand in the order of a service's life, and share one container.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.container import PYTHON, Container, missing, wheelhouse

NGINX = """\
    load_module /usr/lib/nginx/modules/ndk_http_module.so;
    load_module /usr/lib/nginx/modules/ngx_http_lua_module.so;
    user www-data;
    worker_processes 2;
    pid /run/nginx.pid;
    error_log /var/log/nginx/error.log notice;
    events {}
    http {
        access_log off;
        upstream app {
            server 127.0.0.1:8001;
            server 127.0.0.1:8002;
            server 127.0.0.1:8003;
            keepalive 16;
            keepalive_timeout 1s;
        }
        upstream own {
            server 127.0.0.1:8011;
        }
        server {
            listen 127.0.0.1:80;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_next_upstream off;
            location / { proxy_pass http://app; }
            location /own/ { proxy_pass http://own/; }
        }
    }
"""
GUNICORN = f"{PYTHON} -m gunicorn --workers 1 --no-control-socket --keep-alive 75 --graceful-timeout 20"
# Another user's, and with a PYTHONPATH of its own, in which the command would not find what it needs.
APP = f"""\
    [Service]
    Type=notify
    User=www-data
    Environment=APP_SERVER=127.0.0.1:%i PYTHONPATH=/srv
    ExecStart={GUNICORN} --bind 127.0.0.1:%i \\
        --worker-class controller.integration.worker.UvicornWorker controller.demo.app:app
    Restart=always
    RestartSec=0
    KillMode=mixed
    TimeoutStopSec=60
    [Install]
    WantedBy=multi-user.target
"""
SETTINGS = f"""\
    [defaults.warm_up]
    duration = "1s"
    [defaults.drain]
    settle = "0s"
    [upstream.app.process]
    unit = "app@{{port}}.service"
    [upstream.own.process]
    start = {json.dumps([*GUNICORN.split(), "--bind", "{address}", "controller.demo.wsgi:app"])}
"""
# The units to which a drop-in cannot be given, or only with a word of warning.
OWN_STOP = "[Service]\nExecStart=/bin/sleep 1000\nExecStop=/bin/true\n"
HASTY = "[Service]\nExecStart=/bin/sleep 1000\nTimeoutStopSec=5\n"

HEADGATE = "/opt/headgate/bin/headgate"
SERVERS = tuple(f"127.0.0.1:{port}" for port in (8001, 8002, 8003))
SERVING = f"{HEADGATE} status | grep -q '^app: 3 of 3 servers serving'"


def until(condition: str) -> str:
    """Shell: wait until this command says yes."""
    return "timeout 30 sh -c " + shlex.quote(f"until {condition}; do sleep 0.1; done")


class Host(Container):
    """The container, with words for what happens on it."""

    def headgate(self, *words: str) -> str:
        return self.run(HEADGATE, *words)

    def refused(self, *words: str) -> str:
        """What the command says as it fails."""
        done = self.run("sh", "-c", '"$@" 2>&1 && exit 1; true', "sh", HEADGATE, *words)
        return " ".join(done.split())

    def unit(self, name: str, *properties: str) -> list[str]:
        asked = self.run("systemctl", "show", *(f"--property={each}" for each in properties), name).splitlines()
        values = dict(line.split("=", 1) for line in asked)
        return [values.get(each, "") for each in properties]

    def masters(self) -> list[str]:
        """The main processes of all servers, that of `start` included."""
        pids = [self.unit(f"app@{port}", "MainPID")[0] for port in (8001, 8002, 8003)]
        return [*pids, self.run("cat", "/run/own.pid").strip()]

    def wait(self, condition: str) -> None:
        """Until this shell command says yes."""
        self.run("sh", "-c", until(condition))

    def until_serving(self) -> None:
        self.wait(SERVING)

    def under_load(self, *commands: str) -> dict[str, Any]:
        """Run shell commands while requests come, one after the other, and until all servers serve; the summary."""
        mix = "fast=70,echo=25,slow=5"
        told = self.run(
            "sh",
            "-ec",
            f"{PYTHON} -m controller.demo.load http://127.0.0.1 --rate 100 --mix {mix} >/run/load 2>/run/errors &\n"
            "load=$!; trap 'kill $load 2>/dev/null || true' EXIT\n"
            f"{until('[ -s /run/load ]')}\n"
            + "\n".join(f"{each} >&2" for each in (*commands, until(SERVING)))
            + "\nkill -INT $load; wait $load || true; tail -n 1 /run/load",
        )
        summary: dict[str, Any] = json.loads(told)["summary"]
        return summary


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    if reason := missing():
        if os.environ.get("HEADGATE_CONTAINERS") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    host = Host()
    try:
        host.install(wheelhouse(tmp_path_factory.mktemp("wheels")))
        host.write("/etc/nginx/nginx.conf", NGINX)
        for name, text in (("app@", APP), ("stops", OWN_STOP), ("hasty", HASTY)):
            host.write(f"/etc/systemd/system/{name}.service", text)
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "restart", "nginx")
        host.run("systemctl", "enable", "--now", *(f"app@{port}" for port in (8001, 8002, 8003)))
        yield host
    finally:
        host.close()


def no_failure(summary: dict[str, Any], at_least: int) -> None:
    assert summary["requests"] >= at_least
    assert summary["failed"] == 0, summary


@pytest.mark.container
@pytest.mark.timeout(600)
class TestUnderSystemd:
    def test_one_command_makes_it_a_service_that_runs_and_starts_at_boot(self, host: Host) -> None:
        assert "/etc/systemd/system/headgate.service" in host.headgate("install", "--diff")
        host.run("sh", "-c", "test ! -e /etc/systemd/system/headgate.service -a ! -e /etc/headgate")
        said = host.headgate("install", "--yes")
        pid, state, enabled, watchdog = host.unit("headgate", "MainPID", "ActiveState", "UnitFileState", "WatchdogUSec")
        assert f"headgate.service runs (pid {pid}), and starts at boot" in said
        assert (state, enabled, watchdog) == ("active", "enabled", "30s")
        assert host.headgate("install", "--yes") == "nothing to do: headgate.service runs, and starts at boot\n"
        assert host.unit("headgate", "MainPID") == [pid]
        host.write("/etc/headgate/headgate.toml", SETTINGS)
        assert "adopted: app, own" in host.headgate("adopt", "--yes")
        host.run("systemctl", "reload", "headgate")
        host.headgate("start", "own", "127.0.0.1:8011")
        host.run("sh", "-c", "grep -l 127.0.0.1:8011 /proc/[0-9]*/cmdline | head -n 1 | cut -d / -f 3 > /run/own.pid")
        host.until_serving()

    def test_little_is_exposed(self, host: Host) -> None:
        said = host.run("systemd-analyze", "--no-pager", "--threshold=30", "security", "headgate.service")
        (score,) = re.findall(r"exposure level for headgate.service: ([\d.]+)", said)
        print(f"systemd-analyze security: {score}")
        assert float(score) <= 3.0

    def test_a_reload_waits_and_fails_where_something_is_wrong(self, host: Host) -> None:
        (pid,) = host.unit("headgate", "MainPID")
        host.run("sh", "-c", "cp /etc/headgate/headgate.toml /run/toml; cp /etc/nginx/nginx.conf /run/conf")
        try:
            host.run("sh", "-c", "echo '[apii]' >> /etc/headgate/headgate.toml; ! systemctl reload headgate 2>&1")
            host.run("cp", "/run/toml", "/etc/headgate/headgate.toml")
            host.run("sh", "-c", "echo 'http {' >> /etc/nginx/nginx.conf; ! systemctl reload headgate 2>&1")
        finally:
            host.run("sh", "-c", "cp /run/toml /etc/headgate/headgate.toml; cp /run/conf /etc/nginx/nginx.conf")
        log = host.run("journalctl", "--no-pager", "-u", "headgate")
        assert "headgate.toml: apii: unknown key; did you mean api?" in log
        assert "/etc/nginx/nginx.conf:" in log
        host.run("systemctl", "reload", "headgate")
        assert host.unit("headgate", "MainPID", "ActiveState") == [pid, "active"]

    def test_a_daemon_that_hangs_is_seen_by_its_missing_pings_and_started_again(self, host: Host) -> None:
        host.write("/etc/systemd/system/headgate.service.d/quick.conf", "[Service]\nWatchdogSec=3\n")
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "restart", "headgate")
        try:
            pid, first = host.unit("headgate", "MainPID", "WatchdogTimestampMonotonic")
            later = f"test $(systemctl show -P WatchdogTimestampMonotonic headgate) -gt {int(first) + 4_000_000}"
            host.wait(later)
            assert host.unit("headgate", "MainPID", "NRestarts") == [pid, "0"], "pings came for longer than WatchdogSec"
            host.run("sh", "-c", f"kill -STOP {pid}")
            host.wait("test $(systemctl show -P NRestarts headgate) -eq 1 && systemctl is-active --quiet headgate")
            assert host.unit("headgate", "MainPID") != [pid]
            assert "Watchdog timeout" in host.run("journalctl", "--no-pager", "-u", "headgate")
        finally:
            host.run("rm", "-r", "/etc/systemd/system/headgate.service.d")
            host.run("systemctl", "daemon-reload")
            host.run("systemctl", "restart", "headgate")

    def test_restarts_of_the_service_lose_nothing_and_leave_servers_alone(self, host: Host) -> None:
        before = host.masters()
        assert "/headgate.service\n" in host.run("cat", f"/proc/{before[-1]}/cgroup"), "headgate started it"
        summary = host.under_load(
            "systemctl restart headgate",
            "kill -9 $(systemctl show -P MainPID headgate)",
            until("systemctl is-active --quiet headgate"),
            "systemctl restart headgate",
            "systemctl stop headgate; systemctl start headgate",
        )
        no_failure(summary, 300)
        assert host.masters() == before
        assert host.headgate("status").count("127.0.0.1:") == 4
        status = "import urllib.request as u; print(u.urlopen('http://127.0.0.1/own/fast').status)"
        assert host.run(PYTHON, "-c", status) == "200\n"

    def test_in_its_cage_it_can_do_all_that_it_must(self, host: Host) -> None:
        summary = host.under_load(f"{HEADGATE} restart app {SERVERS[0]}")
        no_failure(summary, 300)
        before = host.run("cat", "/etc/nginx/nginx.conf")
        host.run("sh", "-c", "echo '[nginx]\ndata_plane = \"reload\"' >> /etc/headgate/headgate.toml")
        host.run("systemctl", "stop", "headgate")
        host.headgate("adopt", "--yes")
        host.run("systemctl", "start", "headgate")
        host.until_serving()
        host.headgate("drain", "app", SERVERS[1], "--wait")  # writes nginx's files, tests them and reloads nginx
        assert f"server {SERVERS[1]} down;" in host.run("cat", "/etc/nginx/nginx.conf")
        host.headgate("enable", "app", SERVERS[1], "--wait")
        host.run("systemctl", "stop", "headgate")
        host.write("/etc/headgate/headgate.toml", SETTINGS)
        host.headgate("adopt", "--yes")
        assert host.run("cat", "/etc/nginx/nginx.conf") == before
        host.run("systemctl", "start", "headgate")
        host.until_serving()

    def test_a_plain_restart_of_an_application_unit_loses_nothing(self, host: Host) -> None:
        said = host.headgate("install", "--yes", "--app", "app@")
        assert "/etc/systemd/system/app@.service.d/headgate.conf is in force" in said
        assert host.headgate("install", "--yes", "--app", "app@.service") == "nothing to do: it is so already\n"
        before = host.masters()
        summary = host.under_load("systemctl restart app@8001")
        no_failure(summary, 200)
        after = host.masters()
        assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, True, True]
        log = host.run("journalctl", "--no-pager", "-u", "app@8001")
        assert re.search(r"app: 127.0.0.1:8001 gets no new request \(table \d+\); none is under way", log)
        assert "127.0.0.1:8001 is announced and probed" in log
        peers = json.loads(host.headgate("status", "--json"))["upstreams"][0]["servers"]
        assert [peer["quarantine"] for peer in peers] == [[], [], []]

    def test_units_that_are_restarted_all_at_once_go_in_turn(self, host: Host) -> None:
        before = host.masters()
        summary = host.under_load("systemctl restart app@8001 app@8002 app@8003")
        no_failure(summary, 300)
        assert not set(before[:3]) & set(host.masters())

    def test_without_headgate_a_unit_stops_and_starts_as_ever(self, host: Host) -> None:
        host.run("systemctl", "stop", "headgate")
        try:
            host.run("systemctl", "restart", "app@8002")
            assert host.unit("app@8002", "ActiveState", "Result") == ["active", "success"]
            assert "no daemon answers" in host.run("journalctl", "--no-pager", "-u", "app@8002")
        finally:
            host.run("systemctl", "start", "headgate")
        host.until_serving()

    def test_a_unit_that_cannot_be_drained_is_refused_with_the_reason(self, host: Host) -> None:
        assert "stops.service has an ExecStop of its own" in host.refused("install", "--yes", "--app", "stops")
        assert "systemd calls nowhere.service not-found" in host.refused("install", "--yes", "--app", "nowhere")
        said = host.headgate("install", "--diff", "--app", "hasty")
        assert "note: systemd lets hasty.service drain for 5 s (TimeoutStopSec), headgate.toml for 30 s" in said

    def test_after_a_reboot_nginx_finds_its_directory_before_headgate_runs(self, host: Host) -> None:
        host.reboot()
        assert host.run("stat", "-c", "%a %U", "/run/headgate") == "750 root\n"
        (nginx,), (headgate,) = (host.unit(each, "ActiveEnterTimestampMonotonic") for each in ("nginx", "headgate"))
        assert 0 < int(nginx) < int(headgate)
        host.until_serving()
        assert "3 of 3 servers serving" in host.headgate("status")

    def test_uninstall_waits_for_release_and_leaves_no_file(self, host: Host) -> None:
        said = host.refused("install", "--uninstall", "--yes")
        assert "nginx is adopted still: /etc/nginx/nginx.conf run `headgate release` first" in said
        assert host.unit("headgate", "ActiveState") == ["active"]
        host.headgate("release", "--yes")
        (before,) = host.unit("app@8001", "MainPID")
        said = host.headgate("install", "--uninstall", "--purge", "--yes")
        assert said.endswith("/run/headgate is gone\n/var/lib/headgate is gone\n")
        left = host.run("sh", "-c", "find /etc /run /var -iname '*headgate*' -not -path '/var/log/*'")
        assert left == ""
        assert host.unit("headgate", "LoadState") == ["not-found"]
        assert host.unit("app@8001", "MainPID", "ExecStop") == [before, ""]
        again = host.headgate("install", "--uninstall", "--purge", "--yes")
        assert again == "nothing to do: nothing of it is installed\n"
