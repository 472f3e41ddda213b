"""What goes wrong on edge hosts, done on purpose to the real thing: a clear error or recovery, and traffic goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from controller.demo.stage import UPSTREAM, Stage, until
from controller.errors import ApiError


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage("gthread", warm_up=1.0) as built:
        yield built


@pytest.fixture(autouse=True)
def _as_before(stage: Stage) -> Iterator[None]:
    """Each test leaves every server ready, up and warm."""
    yield
    for address in stage.addresses:
        if server(stage, address)["admin"] != "ready":
            stage.client.set_admin(UPSTREAM, address, "ready")
    settled(stage)


def server(stage: Stage, address: str) -> dict[str, object]:
    (upstream,) = stage.client.status()["upstreams"]
    return next(each for each in upstream["servers"] if each["address"] == address)


def wait(stage: Stage, what: str, done: object, timeout: float = 20.0) -> None:
    assert callable(done)
    until(done, what, timeout, stage.prefix / "headgate.log")


def settled(stage: Stage) -> None:
    def whole() -> bool:
        return all(s["effective_weight"] == s["weight"] for s in stage.client.status()["upstreams"][0]["servers"])

    wait(stage, "every server at full weight", whole)


@contextlib.contextmanager
def traffic(stage: Stage, rate: float = 80) -> Iterator[None]:
    """Load during which nothing may fail."""
    load = stage.load(rate, "--mix", "fast=9,echo=1")
    wait(stage, "traffic", lambda: load.read() and load.ticks)
    yield
    summary = load.finish()
    assert summary["failures"] == {}, summary
    assert summary["requests"] > 0


def command(stage: Stage, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "controller", "--config", str(stage.settings), *words],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_a_broken_nginx_conf_keeps_the_old_model_and_names_file_and_line(stage: Stage) -> None:
    conf = stage.prefix / "nginx.conf"
    good = conf.read_text()
    with traffic(stage):
        conf.write_text(good.replace("upstream app {", "upstream app {\n        server ;;\n        nonsense {"))
        stage.daemon.send_signal(signal.SIGHUP)
        wait(stage, "the error", lambda: stage.client.status()["config"]["state"] != "ok")
        config = stage.client.status()["config"]
        assert "nginx.conf:" in config["error"]
        assert len(stage.client.status()["upstreams"][0]["servers"]) == 3
        assert command(stage, "status").returncode == 0
        conf.write_text(good)
        stage.daemon.send_signal(signal.SIGHUP)
        wait(stage, "the mended file", lambda: stage.client.status()["config"]["state"] == "ok")


def test_broken_settings_keep_the_old_ones_and_name_the_key(stage: Stage) -> None:
    good = stage.settings.read_text()
    stage.settings.write_text(good.replace("rise = 2", "rize = 2"))
    try:
        result = command(stage, "status")
        assert result.returncode == 2
        assert "defaults.check.rize" in result.stderr
        stage.daemon.send_signal(signal.SIGHUP)
        log = stage.prefix / "headgate.log"
        wait(stage, "the complaint", lambda: "the old settings stay" in log.read_text())
        assert stage.daemon.poll() is None
    finally:
        stage.settings.write_text(good)


def test_a_second_daemon_ends_at_once_and_says_who_is_in_its_place(stage: Stage) -> None:
    second = command(stage, "run")
    assert second.returncode == 1
    assert "another daemon answers at" in second.stderr
    other = stage.prefix / "other.toml"
    other.write_text(stage.settings.read_text().replace("api.sock", "other.sock"))
    third = subprocess.run(
        [sys.executable, "-m", "controller", "--config", str(other), "run"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert third.returncode == 1
    assert "state.db" in third.stderr
    assert stage.client.status()["upstreams"]


def test_a_socket_directory_that_cannot_be_written_is_named(stage: Stage) -> None:
    other = stage.prefix / "other.toml"
    text = stage.settings.read_text().replace("state.db", "other.db")
    other.write_text(text.replace(json.dumps(str(stage.prefix / "api.sock")), '"/proc/headgate/api.sock"'))
    result = subprocess.run(
        [sys.executable, "-m", "controller", "--config", str(other), "run"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "/proc/headgate/api.sock" in result.stderr
    assert "api.socket" in result.stderr


def test_unknown_names_are_errors_that_list_the_known_ones(stage: Stage) -> None:
    wrong_server = command(stage, "drain", UPSTREAM, "127.0.0.1:1")
    assert wrong_server.returncode == 2
    assert all(address in wrong_server.stderr for address in stage.addresses)
    wrong_upstream = command(stage, "rollout", "web")
    assert wrong_upstream.returncode == 2
    assert UPSTREAM in wrong_upstream.stderr


def test_taking_away_the_last_server_is_refused_unless_forced(stage: Stage) -> None:
    first, second, last = stage.addresses
    for address in (first, second):
        assert command(stage, "maint", UPSTREAM, address).returncode == 0
    refused = command(stage, "drain", UPSTREAM, last)
    assert refused.returncode == 4
    assert "no other server of app serves" in refused.stderr
    assert server(stage, last)["admin"] == "ready"
    assert command(stage, "rollout", UPSTREAM, "--batch", "100%").returncode == 4


def test_a_foreign_pid_in_a_pid_file_is_never_signalled(stage: Stage) -> None:
    address = stage.addresses[0]
    pid_file = stage.prefix / f"app-{address.rpartition(':')[2]}.pid"
    real = pid_file.read_text()
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        with traffic(stage):
            pid_file.write_text(f"{stranger.pid}\n")
            result = command(stage, "restart", UPSTREAM, address)
            assert result.returncode == 1
            assert f"pid {stranger.pid}" in result.stdout + result.stderr
            assert stranger.poll() is None
            assert server(stage, address)["admin"] == "ready"
    finally:
        pid_file.write_text(real)
        stranger.kill()
        stranger.wait()


def test_a_dead_pid_in_a_pid_file_is_no_obstacle(stage: Stage) -> None:
    address = stage.addresses[0]
    pid_file = stage.prefix / f"app-{address.rpartition(':')[2]}.pid"
    old = int(pid_file.read_text())
    ended = subprocess.Popen(["true"])
    ended.wait()
    with traffic(stage):
        pid_file.write_text(f"{ended.pid}\n")
        result = command(stage, "restart", UPSTREAM, address)
        assert result.returncode == 0, result.stdout + result.stderr
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(old).status() == psutil.STATUS_ZOMBIE, "the stage, its parent, has not yet reaped it"
    assert stage.master(address) != old


def test_a_hanging_backend_is_taken_out_and_warms_up_when_it_answers_again(stage: Stage) -> None:
    address = stage.addresses[0]
    master = psutil.Process(stage.master(address))
    frozen = [master, *master.children(recursive=True)]
    for process in frozen:
        process.suspend()
    try:
        wait(stage, "the verdict", lambda: server(stage, address)["health"] == "down")
        assert "timeout" in str(server(stage, address)["reason"])
        with traffic(stage):
            pass
    finally:
        for process in frozen:
            process.resume()
    wait(stage, "the recovery", lambda: server(stage, address)["health"] == "up")
    assert server(stage, address)["warm_up"]["phase"] in ("running", "done")  # type: ignore[index]


def test_a_restarted_nginx_gets_its_table_back_even_without_the_daemon(stage: Stage) -> None:
    drained = stage.addresses[0]
    assert command(stage, "drain", UPSTREAM, drained, "--wait").returncode == 0
    stage.stop_daemon()
    before = stage.nginx_workers()
    stage.restart_nginx(signal.SIGKILL)
    assert not stage.nginx_workers() & before
    assert drained not in {who(stage) for _ in range(30)}, "the snapshot still drains it"
    stage.start_daemon()
    revision = stage.client.status()["revision"]
    stage.restart_nginx(signal.SIGTERM)
    wait(stage, "a new table", lambda: ready(stage) and stage.client.status()["revision"] >= revision)
    assert drained not in {who(stage) for _ in range(30)}


def who(stage: Stage) -> str:
    with urllib.request.urlopen(f"{stage.url}/who", timeout=10) as answer:
        return str(answer.headers["X-Served-By"])


def ask(stage: Stage, path: str) -> str:
    """What the API's socket answers; nothing where the status is an error."""
    words = ["curl", "-sf", "--unix-socket", str(stage.prefix / "api.sock"), f"http://x/{path}"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def ready(stage: Stage) -> bool:
    """Whether /readyz says that nothing is wrong."""
    return ask(stage, "readyz") != ""


def test_an_enlarged_dict_of_tables_keeps_the_drain_and_waits_for_what_is_in_flight(stage: Stage) -> None:
    first, second = stage.addresses[:2]
    assert command(stage, "drain", UPSTREAM, first, "--wait").returncode == 0
    slow = subprocess.Popen(["curl", "-s", "-o", "/dev/null", f"{stage.url}/slow?seconds=8"])
    try:
        wait(stage, "a request in flight", lambda: any(server(stage, a)["in_flight"] for a in stage.addresses))
        include, old = stage.prefix / "headgate.conf", stage.nginx_workers()
        include.write_text(include.read_text().replace("headgate_table 8m", "headgate_table 16m"))
        stage.nginx.send_signal(signal.SIGHUP)
        wait(stage, "new workers", lambda: stage.nginx_workers() - old)
        unknown = f'headgate_upstream_native_in_flight{{upstream="{UPSTREAM}"}} 1.0'
        wait(stage, "nginx seen anew", lambda: unknown in ask(stage, "metrics"))
        assert first not in {who(stage) for _ in range(30)}
        assert slow.poll() is None
        assert command(stage, "drain", UPSTREAM, second, "--wait").returncode == 0
        assert slow.wait(2) == 0, "the drain waited for the request, wherever it was"
    finally:
        slow.kill()
        slow.wait()


def test_requests_of_a_killed_nginx_worker_no_longer_count_as_in_flight(stage: Stage) -> None:
    slow = [subprocess.Popen(["curl", "-s", "-o", "/dev/null", f"{stage.url}/slow"]) for _ in range(6)]
    try:
        wait(
            stage,
            "requests in flight",
            lambda: sum(int(str(server(stage, a)["in_flight"])) for a in stage.addresses) == 6,
        )
        for pid, _ in stage.nginx_workers():
            os.kill(pid, signal.SIGKILL)
        wait(stage, "none in flight", lambda: not any(server(stage, a)["in_flight"] for a in stage.addresses), 4)
    finally:
        for process in slow:
            process.kill()
            process.wait()
    assert command(stage, "drain", UPSTREAM, stage.addresses[0], "--wait").returncode == 0


def test_a_daemon_that_stops_leaves_traffic_and_a_drain_as_they_are(stage: Stage) -> None:
    drained = stage.addresses[1]
    assert command(stage, "drain", UPSTREAM, drained, "--wait").returncode == 0
    with traffic(stage):
        stage.stop_daemon()
        assert drained not in {who(stage) for _ in range(20)}
        unreachable = command(stage, "status")
        assert unreachable.returncode == 3
        assert "headgate run" in unreachable.stderr
        stage.start_daemon()
        assert server(stage, drained)["admin"] == "drain"
        assert drained not in {who(stage) for _ in range(20)}


def drain_and_enable(stage: Stage, address: str, times: int = 1) -> None:
    for _ in range(times):
        stage.client.set_admin(UPSTREAM, address, "drain")
        stage.client.set_admin(UPSTREAM, address, "ready")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_under_the_store_stops_wishes_and_nothing_else(stage: Stage) -> None:
    disk = stage.prefix / "disk"
    disk.mkdir()
    good = stage.settings.read_text()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        stage.stop_daemon()
        stage.settings.write_text(good.replace(str(stage.prefix / "state.db"), str(disk / "state.db")))
        stage.start_daemon()
        with traffic(stage):
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"\0" * 4096):
                    pass
            address = stage.addresses[2]
            with pytest.raises(ApiError, match=r"state\.db") as refused:
                drain_and_enable(stage, address, times=200)  # SQLite has room in pages that it owns already
            assert refused.value.code == "store_failed"
            filler.unlink()
            wait(stage, "the store", lambda: ready(stage))
            drain_and_enable(stage, address)
    finally:
        stage.stop_daemon()
        subprocess.run(["umount", str(disk)], check=True)
        stage.settings.write_text(good)
        stage.start_daemon()


def test_a_rollout_by_the_command_shows_every_step_and_the_events_tell_it(stage: Stage) -> None:
    with traffic(stage):
        result = command(stage, "rollout", UPSTREAM)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rollout of app done" in result.stdout
    change = json.loads(command(stage, "changes", "--json").stdout)["changes"][0]
    assert (change["kind"], change["status"]) == ("rollout", "done")
    told = command(stage, "events").stdout
    assert f"change {change['id']}: rollout of app done" in told
    assert Path(stage.prefix / "state.db").stat().st_mode & 0o077 in (0o040, 0)
